"""What others take from this project by DVC: its artifacts, from a remote that is a folder or on S3."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from small_detector import Made, tiny_classifier, tiny_denoiser

from diffguard.deploy.bundle import check_bundle, save_bundle
from diffguard.errors import DataError
from diffguard.utils.hashing import hash_file
from tasks.config.project import ROOT


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "detector"
    save_bundle(Made(tiny_classifier(), tiny_denoiser()).detector("gated"), folder)
    return folder


def test_artifacts_are_outputs_of_stages():
    with Repo(str(ROOT)) as repo:
        named = {name: artifact.path for name, artifact in repo.artifacts.read()["dvc.yaml"].items()}
        outputs = {Path(output.fspath).relative_to(ROOT).as_posix() for output in repo.index.outs}
    assert named == {
        "detector": "data/digits/detector",
        "denoiser": "data/digits/models/seed-0/denoiser",
        "images": "data/digits/images",
    }
    assert set(named.values()) <= outputs


class Project:
    """A folder with Git and DVC in it."""

    def __init__(self, root: Path, *, git_root: Path | None = None) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        if not (root / ".dvc").exists():
            self("git", "init", "-q", str(git_root or root))
            self("dvc", "init", "-q", *(["--subdir"] if git_root else []))

    def __call__(self, program: str, *arguments: str, **environment: str) -> str:
        if program == "git":
            command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
        else:
            command = [sys.executable, "-m", program, *arguments]
        environment = {**os.environ, "DVC_NO_ANALYTICS": "1", **environment}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def publish(self, bundle: Path) -> None:
        """Add a bundle as the artifact `detector`, version 1, and push it to the remote `storage`."""
        shutil.copytree(bundle, self.root / "data" / "detector")
        artifacts = {"artifacts": {"detector": {"path": "data/detector", "type": "model"}}}
        (self.root / "dvc.yaml").write_text(yaml.safe_dump(artifacts))
        self("dvc", "add", "-q", "data/detector")
        self("git", "add", "-A")
        self("git", "commit", "-qm", "detector")
        self("git", "tag", "-am", "first", "detector@v1.0.0")
        self("dvc", "push", "-q")


def test_a_bundle_comes_from_a_remote_into_a_worktree_and_another_project(bundle, tmp_path):
    """The project is in a folder of a larger repository, and its cache on another file system if there is one."""
    made = Project(tmp_path / "all" / "part", git_root=tmp_path / "all")
    made("dvc", "remote", "add", "-q", "--default", "storage", str(tmp_path / "remote"))
    made.publish(bundle)
    made("git", "worktree", "add", "-q", str(tmp_path / "tree"))
    tree = Project(tmp_path / "tree" / "part")
    elsewhere = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    cache = elsewhere / f"diffguard-test-{os.getpid()}"
    try:
        tree("dvc", "cache", "dir", "-q", "--local", str(cache))
        tree("dvc", "config", "-q", "--local", "cache.type", "symlink")
        tree("dvc", "pull", "-q")
        assert "up to date" in tree("dvc", "status")
        with pytest.raises(DataError, match=r"a link out of the bundle; .*, or, if the link is DVC's, .*--relink$"):
            check_bundle(tree.root / "data" / "detector")
        tree("dvc", "config", "-q", "--local", "cache.type", "reflink,hardlink,copy")
        tree("dvc", "checkout", "-q", "--relink")
        assert check_bundle(tree.root / "data" / "detector").detector == "gated"
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(cache)], check=True)
        shutil.rmtree(cache)
    other = Project(tmp_path / "other")
    other("dvc", "import", "-q", str(tmp_path / "all"), "part/data/detector")
    assert hash_file(other.root / "detector") == hash_file(bundle)
    assert "up to date" in other("dvc", "status")


def test_a_bundle_comes_from_s3(bundle, tmp_path):
    server = pytest.importorskip("moto.server", reason="moto is not installed; it is in the extra dev")
    pytest.importorskip("dvc_s3", reason="dvc-s3 is not installed; it is in the extra s3")
    from boto3 import Session

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    try:
        url = "http://{}:{}".format(*running.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        Session("test", "test", region_name="us-east-1").client("s3", endpoint_url=url).create_bucket(Bucket="team")
        made = Project(tmp_path / "project")
        made("dvc", "remote", "add", "-q", "--default", "storage", "s3://team/diffguard")
        made("dvc", "remote", "modify", "storage", "endpointurl", url)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in keys.items():
                patch.setenv(name, value)
            made.publish(bundle)
            shutil.rmtree(made.root / ".dvc" / "cache")
            other = Project(tmp_path / "other")
            other("dvc", "artifacts", "get", str(made.root), "detector", "-o", "best")
        assert hash_file(other.root / "best") == hash_file(bundle)
    finally:
        running.stop()
