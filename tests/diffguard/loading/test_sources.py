"""A detector by name, from real places: a web server, S3, an archive, a DVC project, and a stand-in for the hub."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import yaml
from hub_server import Hub, hub_of, serving

from diffguard.deploy.bundle import hash_bundle
from diffguard.errors import DataError, DiffGuardError, ServiceError, SettingError
from diffguard.images import to_picture
from diffguard.loading import cache, open_detector
from diffguard.loading.cache import cached_bundle
from diffguard.loading.sources import source_of
from diffguard.utils.hashing import hash_file, hash_values

FIRST, SECOND = "1" * 40, "2" * 40


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    """The folder of copies, empty."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "detectors"


@pytest.fixture
def place(bundle, tmp_path):
    """A copy of the bundle that a test may change."""
    return shutil.copytree(bundle, tmp_path / "place" / "detector")


@pytest.fixture
def site(place):
    with serving(partial(Quiet, directory=str(place.parent))) as url:
        yield f"{url}/detector"


def fetched(uri, expected=None):
    return cached_bundle(uri, source_of(uri), expected)


def refused(uri, expected=None, kind=DataError):
    with pytest.raises(kind) as error:
        fetched(uri, expected)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_web_server_is_asked_for_the_bundles_files_alone(site, place, bundle, copies, body):
    (place / "more.bin").write_bytes(b"not of the bundle")
    (place / "classifier" / "model.safetensors").chmod(0o600)
    detector = open_detector(f"{site}?sha256={hash_bundle(bundle)}", "cpu")
    assert detector.bundle_hash == hash_bundle(bundle)
    [copy] = copies.glob("*/*")
    assert (copy.name, hash_file(copy)) == (hash_bundle(bundle), hash_file(bundle))
    assert [each.name.partition("-")[0] for each in copies.iterdir()] == ["detector"]


def test_an_archive_is_read_through_fsspecs_own_urls(bundle, tmp_path):
    with zipfile.ZipFile(tmp_path / "detector.zip", "w") as archive:
        for file in bundle.rglob("*"):
            archive.write(file, Path("detector", file.relative_to(bundle)))
    assert hash_file(fetched(f"zip://detector::file://{tmp_path}/detector.zip")) == hash_file(bundle)


def test_a_file_url_is_opened_where_it_is(bundle, copies):
    assert open_detector(f"file://{bundle}?sha256={hash_bundle(bundle).upper()}", "cpu").info.detector == "gated"
    assert not copies.exists()
    with pytest.raises(DataError, match=r"its detector.json has the SHA-256 .*, not 0{64}; another detector is there"):
        open_detector(f"file://{bundle}?sha256={'0' * 64}", "cpu")


def test_s3(bundle, monkeypatch):
    server = pytest.importorskip("moto.server", reason="moto is not installed; it is in the extra dev")
    pytest.importorskip("s3fs", reason="s3fs is not installed; it is in the extra s3")
    import s3fs

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    try:
        for key, value in {
            "ENDPOINT_URL": f"http://{host}:{port}",
            "ACCESS_KEY_ID": "a",
            "SECRET_ACCESS_KEY": "b",
        }.items():
            monkeypatch.setenv(f"AWS_{key}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        files = s3fs.S3FileSystem()
        files.mkdir("team")
        files.put(str(bundle), "team/detector", recursive=True)
        assert hash_file(fetched("s3://team/detector")) == hash_file(bundle)
        assert "s3://team/nothing: no detector there (detector.json is missing)" in refused("s3://team/nothing")
    finally:
        running.stop()


@pytest.fixture
def project(bundle, tmp_path):
    """A project with DVC whose bundle is an artifact, registered once; its data are in its cache and not in Git."""
    root = tmp_path / "project"
    shutil.copytree(bundle, root / "data" / "detector")
    (root / "dvc.yaml").write_text(yaml.safe_dump({"artifacts": {"best": {"path": "data/detector", "type": "model"}}}))

    def run(*command):
        name = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        command = ("git", *name, *command[1:]) if command[0] == "git" else (sys.executable, "-m", *command)
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "add", "-q", "data/detector")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "detector")
    run("git", "tag", "best@v1.0.0")
    shutil.rmtree(root / "data" / "detector")
    return root, run("git", "rev-parse", "HEAD")


def test_dvc_by_artifact_path_version_and_commit(project, bundle):
    root, commit = project
    places = ("best@v1.0.0", "best@HEAD", f"data/detector@{commit}")
    assert {hash_file(fetched(f"dvc://{root}#{each}")) for each in places} == {hash_file(bundle)}
    assert "the repository has no revision v2" in refused(f"dvc://{root}#best@v2")
    assert "no detector there (detector.json is missing)" in refused(f"dvc://{root}#data@{commit}")
    shutil.rmtree(root)
    assert hash_file(fetched(f"dvc://{root}#data/detector@{commit}")) == hash_file(bundle)  # a commit does not change
    assert "cannot be" in refused(f"dvc://{root}#best@v1.0.0", kind=DiffGuardError)


@pytest.fixture
def hub(bundle, place, monkeypatch):
    (place / "README.md").write_text("a card, which is no file of the bundle")
    with hub_of(Hub("team/detector", {FIRST: place, SECOND: bundle}, {"main": FIRST, "v2": SECOND})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        yield hub


def test_the_hub_by_branch_and_commit(hub, bundle, copies):
    copy = fetched("hf://team/detector")
    assert hash_file(copy) == hash_file(bundle)
    assert not [each for each in hub.asked if "README" in each or "resolve/main" in each]
    assert hash_file(fetched(f"hf://team/detector@{SECOND}")) == hash_file(bundle)
    hub.asked.clear()
    fetched(f"hf://team/detector@{SECOND}")
    fetched("hf://team/detector", hash_bundle(bundle))
    assert hub.asked == []  # their content is known
    fetched("hf://team/detector")
    assert hub.asked  # a branch may have moved
    assert "hf://team/nothing: cannot be read (" in refused("hf://team/nothing", kind=ServiceError)
    assert "hf://team/detector@v3: cannot be read (" in refused("hf://team/detector@v3", kind=ServiceError)


def test_the_command_line_scores_with_a_detector_of_the_hub(hub, made, tmp_path):
    to_picture(made.new[0]).save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-m", "diffguard.cli.main", "score", "image.png", "--detector", "hf://team/detector@v2"],
        cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 3), done.stderr
    assert done.stderr.splitlines()[-1].startswith("1 images: 1 ")


def test_a_place_that_cannot_be_reached_is_no_reason_to_take_an_old_copy(place, bundle):
    with serving(partial(Quiet, directory=str(place.parent))) as url:
        uri = f"{url}/detector"
        fetched(uri)
    said = refused(uri, kind=ServiceError)
    assert said.startswith(f"{uri}: cannot be read (")
    assert said.endswith(f"name its content: {uri}?sha256={hash_bundle(bundle)}")
    assert hash_file(fetched(uri, hash_bundle(bundle))) == hash_file(bundle)


def test_what_was_changed_there_is_refused_and_leaves_nothing(site, place, copies):
    file = place / "denoiser" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert f"{site}/denoiser/unet/diffusion_pytorch_model.safetensors: not as it was written" in refused(site)
    assert list(copies.iterdir()) == []
    said = refused(site, "0" * 64)
    assert f"{site}: its detector.json has the SHA-256 {hash_bundle(place)}, not 000" in said
    assert list(copies.iterdir()) == []


def test_a_copy_that_was_damaged_is_made_again(site, bundle):
    copy = fetched(site)
    (copy / "classifier" / "model.safetensors").write_bytes(b"")
    assert fetched(site, hash_bundle(bundle)) == copy
    assert hash_file(copy) == hash_file(bundle)


def test_files_outside_of_the_bundle_are_not_written(site, place, copies):
    values = json.loads((place / "detector.json").read_text())
    values["files"]["../../../outside"] = hash_file(place / "detector.json")
    values["hash"] = hash_values({"info": values["info"], "files": values["files"]})
    (place / "detector.json").write_text(json.dumps(values))
    (place.parent / "outside").write_text("x")
    assert "it names '../../../outside', which is no file of the bundle" in refused(site)
    assert list(copies.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "words"), [("INFO", "its detector.json has more than"), ("BUNDLE", "it has more than")]
)
def test_what_is_too_large_is_not_copied(site, hub, copies, monkeypatch, limit, words):
    monkeypatch.setattr(f"diffguard.loading.sources.MAX_{limit}_BYTES", 5000 if limit == "INFO" else 100_000)
    for uri in (site, "hf://team/detector"):
        assert f"{uri}: {words}" in refused(uri)
    assert list(copies.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(site, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    said = refused(site)
    assert said.startswith(f"{site}: {tmp_path}/file: cannot be written (")
    assert said.endswith("set DIFFGUARD_CACHE to another folder")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nowhere://me:secret@bucket/detector", r"^nowhere://…@bucket/detector: nowhere://: no file system of fsspec"),
        ("dvc://project", "not of the form dvc://REPOSITORY#NAME@REVISION"),
        ("hf://detector", "not of the form hf://owner/name"),
        ("s3://bucket/detector?sha256=12", "not the 64 hexadecimal digits of a SHA-256"),
        ("file://host/detector", "write file:///folder with three slashes"),
    ],
)
def test_a_uri_of_another_form_is_refused_in_one_line(uri, words):
    with pytest.raises(SettingError, match=words) as error:
        open_detector(uri)
    assert "\n" not in str(error.value)
