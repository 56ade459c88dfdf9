"""What can be wrong with one's own benchmark: each is one line, before any model runs. And what doctor says."""

import hashlib
import http.server
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from functools import partial

import pytest
import torch
from own_project import CLASSES, own_benchmark, save_own, save_pictures, write_own
from PIL import Image
from tiny_models import save_conditional, save_dit, save_stable_diffusion, save_unconditional

import tasks.config.project
import tasks.doctor.command
import tasks.doctor.images
from diffguard.cli.main import main
from diffguard.errors import DataError, DiffGuardError, ServiceError, SettingError
from diffguard.models.classifiers.files import save_classifier
from diffguard.models.classifiers.small import ConvClassifier
from tasks.config.benchmark import Download
from tasks.config.run import open_run
from tasks.fetch import fetch, fetch_all
from tasks.models.checks import check_models
from tasks.prepare.fairness import unfair
from tasks.prepare.stage import prepare_if_changed
from tasks.validate import validate_manifest


@pytest.fixture
def root(tmp_path):
    save_own(tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def opened(root, tmp_path, monkeypatch):
    """All that a run does before a model is trained or scores, by the benchmark file as a test changed it."""

    def begin(change, root=root):
        benchmark = own_benchmark()
        change(benchmark)
        write_own(monkeypatch, tmp_path, benchmark)
        run = open_run(benchmark="mine", root=None if root is None else str(root))
        prepare_if_changed(run.benchmark, run.home, seed=0)
        check_models(run)
        return run

    return begin


def named(*keys, value):
    def change(benchmark):
        place = benchmark
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


def source(**settings):
    return named("ind", "animals", "source", value=settings)


def spec(model, **settings):
    return named("classifiers", "mine", value=settings) if model == "classifier" else named("denoiser", value=settings)


WRONG = {
    "an unknown key": (named("colour", value="red"), "data/benchmarks/mine.yaml: colour"),
    "a wrong kind": (source(kind="floppy"), "source: Input tag 'floppy'"),
    "a missing folder": (source(kind="folder", path="{root}/nowhere"), "nowhere: no such folder of images"),
    "a missing class": (
        source(kind="folder", path="{root}/ind", classes=["cat", "cow"]),
        "ind: there is no class folder 'cow'",
    ),
    "a class without images": (named("classes", value=[*CLASSES, "cow"]), "the InD dataset has no images of 'cow'"),
    "a class that is none": (named("classes", value=CLASSES[:3]), "'tree' is not one of the benchmark's classes"),
    "a list's label": (
        source(kind="list", path="{root}/list.txt", root="{root}"),
        "dataset animals: the label 7 is not within 0..3",
    ),
    "a list's line": (
        source(kind="list", path="{root}/torn.txt", root="{root}"),
        "torn.txt: line 2 is not `path label`",
    ),
    "a missing list": (source(kind="list", path="{root}/no.txt", root="{root}"), "no.txt: no such image list"),
    "an image that a list names": (
        source(kind="list", path="{root}/gone.txt", root="{root}"),
        "gone.txt: it names {root}/ind/cat/900.png, which is not there, nor are 1 more of its 3 images",
    ),
    "an unknown dataset": (source(kind="torchvision", name="MNISTT", root="{root}"), "has no dataset 'MNISTT'"),
    "a dataset that is not there": (
        source(kind="torchvision", name="CIFAR10", root="{root}"),
        "torchvision CIFAR10: it cannot be read under",
    ),
    "a download where none is": (
        source(kind="torchvision", name="MNIST", root="{root}", arguments={"download": True}),
        "nothing is downloaded here",
    ),
    "a dataset's column": (
        source(kind="huggingface", path="{root}/ind", split="train", image="photo"),
        "it has no column 'photo' (image); it has image, label",
    ),
    "too few images": (
        named("ind", "animals", "splits", value={"train": 1, "calibration": 24, "test": 900}),
        "dataset animals: 925 images are asked for, its source has 56",
    ),
    "too many classes for the classifier": (
        spec("classifier", kind="file", path="{root}/three.safetensors"),
        "mine: it has 3 classes, the benchmark 4",
    ),
    "more classes of the classifier": (
        spec("classifier", kind="file", path="{root}/nine.safetensors"),
        "mine: it has 9 classes, the benchmark 4; variant cam asks the denoiser for a label of each",
    ),
    "a grayscale classifier": (
        spec("classifier", kind="file", path="{root}/gray.safetensors"),
        "mine: it takes images of 1 channels; the benchmark's mode is RGB",
    ),
    "a classifier of another size": (
        spec(
            "classifier",
            kind="timm",
            name="test_vit",
            weights="{root}/vit.safetensors",
            arguments={"dynamic_img_size": False},
        ),
        "takes images of 160 pixels; the benchmark's image.size is 16",
    ),
    "a missing checkpoint": (
        spec("classifier", kind="timm", name="resnet18", weights="{root}/no.pth"),
        "no.pth: no such file of weights",
    ),
    "another network's checkpoint": (
        spec("classifier", kind="timm", name="test_resnet", weights="{root}/vit.safetensors"),
        "vit.safetensors: the weights do not fit classifier timm test_resnet: 77 of ",
    ),
    "a network that is none": (
        spec("classifier", kind="timm", name="resnet1800", weights="{root}/no.pth"),
        "timm has no 'resnet1800'; did you mean resnet",
    ),
    "an argument that is none": (
        spec("classifier", kind="torchvision", name="resnet18", weights="{root}/vit.safetensors", arguments={"x": 1}),
        "classifier torchvision resnet18: it cannot be built",
    ),
    "no CAM layer of that name": (
        spec("classifier", kind="timm", name="test_vit", weights="{root}/vit.safetensors", cam_layer="layer4"),
        "cam_layer: VisionTransformer has no module 'layer4'",
    ),
    "code that is not there": (
        spec("classifier", kind="object", object="nowhere:Net"),
        "nowhere:Net: cannot be imported as package.module:name",
    ),
    "code that is no network": (
        spec("classifier", kind="object", object="builtins:dict"),
        "builtins:dict: it returned dict, which is no torch.nn.Module",
    ),
    "code that is no denoiser": (
        spec("denoiser", kind="object", object="builtins:dict"),
        "builtins:dict: it is no denoiser: dict has no alphas_cumprod",
    ),
    "a missing denoiser": (
        spec("denoiser", kind="pretrained", path="{root}/nowhere"),
        "nowhere: no such folder of a denoiser",
    ),
    "a folder that is no denoiser": (
        spec("denoiser", kind="pretrained", path="{root}/near"),
        "near: no denoiser here",
    ),
    "a denoiser of fewer classes": (
        spec("denoiser", kind="pretrained", path="{root}/three"),
        "three: it knows 3 labels, the benchmark has 4 classes; give labels",
    ),
    "labels that it does not know": (
        spec("denoiser", kind="pretrained", path="{root}/three", labels=[0, 1, 2, 3]),
        "three: labels: 3 is not within 0..2",
    ),
    "a denoiser without labels": (
        spec("denoiser", kind="pretrained", path="{root}/unconditional"),
        "variant cam: guidance: label needs a class-conditional denoiser",
    ),
    "a denoiser of another size": (
        lambda benchmark: benchmark["image"].update(size=20),
        "denoiser: it takes images of 16 pixels, the benchmark's have 20; set process_method to resize or pad",
    ),
    "a grayscale benchmark": (
        named("image", "mode", value="L"),
        "denoiser: it takes images of 3 channels; the benchmark's mode is L",
    ),
    "a size that is fixed": (
        spec("denoiser", kind="pretrained", path="{root}/dit", size=32),
        "dit: size: this model takes images of 16 pixels alone",
    ),
    "a prompt without a class": (
        spec("denoiser", kind="pretrained", path="{root}/sd", prompt="a photo"),
        "denoiser.prompt: 'a photo' has no {} for the name of the class",
    ),
    "no OOD dataset of test": (
        lambda benchmark: [benchmark.pop("near"), benchmark.pop("far")],
        "near, far: no OOD dataset has a split test",
    ),
    "training without a train split": (
        lambda b: [b["ind"]["animals"]["splits"].pop("train"), b.update(denoiser={"kind": "trained"})],
        "denoiser: it is to be trained, and ind has no split train",
    ),
    "a detector without its train split": (
        lambda b: b["ind"]["animals"]["splits"].pop("train"),
        "detectors: knn is fitted on a split train, which ind does not have",
    ),
    "a path without its train split": (
        lambda b: [
            b["ind"]["animals"]["splits"].pop("train"),
            b["variants"].update(way={"stop": 2, "guidance": {"kind": "none"}, "distance": "path"}),
            b.update(detectors=["cam", "way"]),
        ],
        "detectors: way is fitted on a split train, which ind does not have",
    ),
}


def save_wrong_models(root):
    for name, classes, channels in (("three", 3, 3), ("nine", 9, 3), ("gray", 4, 1)):
        save_classifier(ConvClassifier(classes, 4, channels).eval(), root / f"{name}.safetensors")
    from tiny_models import timm_weights

    timm_weights(root / "vit.safetensors", "test_vit")
    save_conditional(root / "three", 3)
    save_unconditional(root / "unconditional")
    save_dit(root / "dit")
    save_stable_diffusion(root / "sd")
    (root / "list.txt").write_text("ind/cat/000.png 0\nind/cat/001.png 0\nind/dog/001.png 7\n")
    (root / "gone.txt").write_text("ind/cat/900.png 0\nind/cat/000.png 0\nind/dog/900.png 1\n")
    (root / "torn.txt").write_text("ind/cat/000.png 0\nind/dog/001.png\n")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    save_own(folder)
    save_wrong_models(folder)
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_benchmark_is_one_line(case, opened, wrong):
    change, message = WRONG[case]

    def with_classes(benchmark):
        if "list" in case:
            benchmark["classes"] = CLASSES
            benchmark["ind"]["animals"]["splits"] = {"train": 1, "calibration": 1, "test": "rest"}
        change(benchmark)

    with pytest.raises(DiffGuardError) as error:
        opened(with_classes, root=wrong)
    assert message.replace("{root}", str(wrong)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_root_that_is_not_given(opened):
    with pytest.raises(DiffGuardError, match=r"\{root\}/ind: root is not given \(--root, or make evaluate ROOT=…"):
        opened(lambda benchmark: None, root=None)


def test_an_empty_class_folder(opened, root):
    (root / "ind" / "cow").mkdir()
    with pytest.raises(DataError, match="cow: this class folder has no images; add some, or name it in exclude"):
        opened(lambda benchmark: None)
    opened(lambda benchmark: benchmark["ind"]["animals"]["source"].update(exclude=["cow"]))


def test_a_corrupt_image(opened, root):
    path = root / "near" / "000.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"near/000\.png: the image cannot be read"):
        opened(lambda benchmark: None)


def test_an_image_without_its_last_rows(opened, root):
    picture = Image.open(root / "near" / "000.png")
    rows = b"".join(b"\0" + picture.crop((0, row, picture.width, row + 1)).tobytes() for row in range(5))
    file = io.BytesIO()
    picture.save(file, "png")
    header = file.getvalue()[:33]  # the signature and IHDR

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    (root / "near" / "000.png").write_bytes(header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"near/000\.png: .* \(rows of it are missing\); mend or remove it"):
        opened(lambda benchmark: None)


def test_the_same_image_in_ind_and_ood(opened, root):
    (root / "near" / "copy.png").write_bytes((root / "ind" / "cat" / "000.png").read_bytes())
    with pytest.raises(DataError, match=r"copy\.png: the same image is InD and OOD, as .*cat/000\.png; remove one, or"):
        opened(lambda benchmark: None)
    run = opened(lambda benchmark: benchmark.update(duplicates="drop"))
    assert (run.manifest["dataset"] == "near").sum() == 6


def test_a_hub_id_without_a_network(opened, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ServiceError) as error:
        opened(spec("denoiser", kind="pretrained", path="google/ddpm-cifar10-32"))
    assert "denoiser google/ddpm-cifar10-32: the Hugging Face hub cannot be reached" in str(error.value)
    assert "give its folder as path" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_files_give_away_is_told(opened, root):
    for path in sorted((root / "far").iterdir()):
        Image.open(path).resize((40, 40)).save(path.with_suffix(".jpg"), quality=30)
        path.unlink()
    run = opened(lambda benchmark: None)
    warnings = unfair(run.manifest, run.benchmark.image)
    assert warnings[0] == "far: its files are JPEG, InD's PNG"
    assert warnings[1].startswith("far: 40x40 files are shrunk 2.5x, InD's of 24x20 are shrunk 1.25x: smoothness")
    assert any(line.startswith("far: file size alone tells it from InD with AUROC 100 %") for line in warnings)
    assert not any(line.startswith("near") for line in warnings)
    assert set(run.manifest.loc[run.manifest["dataset"] == "far", "source_quality"]) == {30}


def examine(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["doctor", *arguments])
    return end.value.code, capsys.readouterr().out


def test_doctor_finds_nothing_and_tells_the_cost(opened, root, tmp_path, monkeypatch, capsys):
    benchmark = own_benchmark()
    benchmark["classifiers"]["mine"] = {"kind": "trained", "width": 4, "epochs": 2, "batch_size": 8}
    write_own(monkeypatch, tmp_path, benchmark)
    code, before = examine(capsys, "--benchmark", "mine", "--root", str(root), "--price", "2")
    assert code == 0, before
    assert "ind animals: 56 images, of which 56 were read; not prepared yet" in before
    assert "mine: ConvClassifier, 0.0 M parameters, to be trained" in before
    assert "scoring 52 images about" in before
    assert "at 2 an hour" in before
    assert before.endswith("nothing is wrong\n")
    prepare_if_changed(open_run(benchmark="mine", root=str(root)).benchmark, tmp_path / "data" / "mine", seed=0)
    code, after = examine(capsys, "--benchmark", "mine", "--root", str(root), "--limit", "4")
    assert code == 0
    assert "ind animals: calibration 24, train 16, test 16" in after
    assert "scoring 36 images about" in after


def test_doctor_names_every_problem(wrong, tmp_path, monkeypatch, capsys):
    benchmark = own_benchmark()
    benchmark["near"]["near"]["source"]["path"] = "{root}/nowhere"
    benchmark["denoiser"]["path"] = "{root}/three"
    write_own(monkeypatch, tmp_path, benchmark)
    code, out = examine(capsys, "--benchmark", "mine", "--root", str(wrong))
    assert code == 1
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 2
    assert "nowhere: no such folder of images" in failed[0]
    assert "three: it knows 3 labels" in failed[1]
    assert out.endswith("2 problems found\n")


def test_doctor_looks_at_every_label_and_counts_them(root, tmp_path, monkeypatch, capsys):
    save_pictures(root / "ind" / "cat", 80, 5)
    paths = [f"ind/cat/{number:03d}.png 0" for number in range(80)]
    paths += [f"ind/{name}/000.png {label}" for label, name in enumerate(CLASSES[1:], 1)]

    def examined(last, classes=CLASSES):
        (root / "list.txt").write_text("\n".join([*paths, last]))
        benchmark = own_benchmark() | {"classes": classes}
        benchmark["ind"]["animals"]["source"] = {"kind": "list", "path": "{root}/list.txt", "root": "{root}"}
        write_own(monkeypatch, tmp_path, benchmark)
        _, out = examine(capsys, "--benchmark", "mine", "--root", str(root))
        return out, [line for line in out.splitlines() if line.startswith("FAIL  images")]

    out, failed = examined("ind/tree/001.png 3")
    assert not failed
    assert "ind: cat 80, dog 1, fish 1, tree 2" in out
    for last, problem in {
        "ind/tree/001.png 7": "tree/001.png: dataset animals: the label 7 is not within 0..3",
        "ind/tree/900.png 3": f"list.txt: it names {root}/ind/tree/900.png, which is not there",
    }.items():
        _, [failed] = examined(last)
        assert problem in failed
    _, [failed] = examined("ind/tree/001.png 3", [*CLASSES, "cow"])
    assert "the InD dataset has no images of 'cow'" in failed


def test_doctor_sees_an_image_on_both_sides(root, tmp_path, monkeypatch, capsys):
    shutil.copy(root / "ind" / "cat" / "000.png", root / "near" / "copy.png")
    for duplicates, code in {"error": 1, "drop": 0}.items():
        write_own(monkeypatch, tmp_path, own_benchmark() | {"duplicates": duplicates})
        found, out = examine(capsys, "--benchmark", "mine", "--root", str(root))
        assert found == code
        assert ("copy.png: the same image is InD and OOD, as" in out) == (code == 1)


def test_doctor_sees_that_nothing_is_left_for_the_rest(root, tmp_path, monkeypatch, capsys):
    benchmark = own_benchmark()
    benchmark["ind"]["animals"]["splits"] = {"train": 32, "calibration": 24, "test": "rest"}
    write_own(monkeypatch, tmp_path, benchmark)
    code, out = examine(capsys, "--benchmark", "mine", "--root", str(root))
    assert code == 1
    assert "dataset animals: its source has 56 images, which leaves none for the rest" in out


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def archives(tmp_path):
    """A server of two archives of pictures, and a plain file."""
    folder = tmp_path / "served"
    save_pictures(folder / "pictures", 3, 0)
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        tar.add(folder / "pictures", "pictures")
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        for path in (folder / "pictures").iterdir():
            archive.write(path, f"pictures/{path.name}")
    with tarfile.open(folder / "evil.tar", "w") as tar:
        info = tarfile.TarInfo("../escaped.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def download(name, unpack, sha256=None):
        digest = sha256 or hashlib.sha256((folder / name).read_bytes()).hexdigest()
        return Download(url=f"http://127.0.0.1:{server.server_port}/{name}", sha256=digest, unpack=unpack)

    yield download
    server.shutdown()
    server.server_close()


def test_archives_are_fetched_once_and_whole(archives, tmp_path):
    there = tmp_path / "downloads"
    downloads = {"one": archives("a.tar.gz", "tar"), "two": archives("b.zip", "zip"), "raw": archives("b.zip", "none")}
    fetch_all(downloads, there)
    for name in ("one", "two"):
        assert len(list((there / name / "pictures").glob("*.png"))) == 3
    assert [path.name for path in (there / "raw").iterdir()] == ["b.zip"]
    (there / "one" / "mark").touch()
    fetch_all(downloads, there)
    assert (there / "one" / "mark").exists()
    other = Download(url=downloads["two"].url, sha256=downloads["two"].sha256, unpack="zip")
    fetch("one", other, there)
    assert not (there / "one" / "mark").exists()
    fetch_all({}, tmp_path / "none")
    assert (tmp_path / "none").is_dir()


def test_what_was_fetched_is_checked(archives, tmp_path):
    with pytest.raises(DataError, match=r"downloads.one: .*a\.tar\.gz is not what the benchmark file says"):
        fetch("one", archives("a.tar.gz", "tar", sha256="0" * 64), tmp_path)
    assert not (tmp_path / "one").exists()
    with pytest.raises(DataError, match=r"downloads.evil: .*evil\.tar cannot be unpacked as tar .*escaped"):
        fetch("evil", archives("evil.tar", "tar"), tmp_path / "downloads")
    assert not (tmp_path / "escaped.txt").exists()
    assert not (tmp_path / "downloads" / "escaped.txt").exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.zip", "http://127.0.0.1:9/"])
def test_without_a_network_the_way_around_is_told(tmp_path, url):
    with pytest.raises(ServiceError) as error:
        fetch("one", Download(url=url, sha256="0" * 64), tmp_path)
    assert str(error.value).startswith(f"downloads.one: {url} cannot be fetched")
    assert "bring its content to" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_label_free_folder_is_not_ind(opened, root):
    save_pictures(root / "ind", 1, 99)
    with pytest.raises(DataError, match=r"ind/000\.png: it is in no class folder, and dataset animals is InD"):
        opened(lambda benchmark: None)


def test_transparent_and_deep_images_are_brought_to_the_format(opened, root):
    gray = torch.arange(400).reshape(20, 20).numpy().astype("uint16") * 160
    Image.fromarray(gray).save(root / "near" / "deep.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(root / "near" / "clear.png")
    Image.new("P", (20, 20)).save(root / "near" / "palette.gif")
    run = opened(lambda benchmark: None)
    rows = run.manifest[run.manifest["dataset"] == "near"]
    assert set(rows["source_format"]) == {"PNG", "GIF"}
    for path, origin in zip(rows["path"], rows["origin"], strict=True):
        with Image.open(run.home / path) as image:
            assert (image.mode, image.size) == ("RGB", (16, 16))
            if origin.endswith("deep.png"):
                assert image.getextrema()[0][1] > 200
            if origin.endswith("clear.png"):
                assert image.getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_class_of_few_images_is_no_mistake(images, opened, root):
    for path in sorted((root / "ind" / "fish").iterdir())[images:]:
        path.unlink()
    run = opened(lambda benchmark: None)
    assert (run.manifest["class_name"] == "fish").sum() == images
    validate_manifest(run.manifest, run.home, 16, "RGB", 4)


NAMES = {
    "a way out": ("../x", "near"),
    "a path": ("a/b", "near"),
    "another system's path": ("a\\b", "near"),
    "hidden": (".near", "near"),
    "a colon": ("near:1", "near"),
    "a line": ("ne\nar", "near"),
    "nothing": ("", "near"),
    "a very long one": ("x" * 81, "near"),
    "a classifier": ("a/b", "classifiers"),
    "a variant": ("a|b", "variants"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_no_file_can_have_is_refused(case, opened):
    name, where = NAMES[case]

    def change(benchmark):
        benchmark[where] = {name: next(iter(benchmark[where].values()))}
        benchmark["detectors"] = None

    with pytest.raises(SettingError, match=r"mine\.yaml: .*cannot name a file; use 1 to 80 characters"):
        opened(change)


def test_names_that_differ_by_case_alone(opened):
    with pytest.raises(SettingError, match=r"'Near': another name differs from it by its letters' case alone"):
        opened(lambda benchmark: benchmark["far"].update(Near=benchmark["far"].pop("far")))


ENCODINGS = {
    "another encoding": (lambda text: text.encode() + b"# caf\xe9\n", r"not UTF-8: byte \d+ \(0xe9, in line \d+\)"),
    "UTF-16": (lambda text: text.encode("utf-16"), r"not UTF-8: byte 0 \(0xff, in line 1\); save it as UTF-8"),
    "a key twice": (
        lambda text: text.encode() + b"name: other\n",
        r"not valid YAML \('name' is there twice in .* line",
    ),
    "a zero byte": (lambda text: text.encode() + b"# \0\n", r"not valid YAML \(unacceptable character"),
}


@pytest.mark.parametrize("case", ENCODINGS)
@pytest.mark.parametrize("file", ["data/benchmarks/mine.yaml", "params.yaml"])
def test_a_settings_file_of_another_encoding(case, file, opened, tmp_path):
    change, message = ENCODINGS[case]
    if "params" in file and case == "a key twice":
        message = message.replace("'name'", "'benchmark'")

        def change(text):
            return text.encode() + b"benchmark: other\n"

    opened(lambda benchmark: None)
    path = tasks.config.project.ROOT / file
    path.write_bytes(change(path.read_text()))
    with pytest.raises(DataError, match=message) as error:
        open_run(benchmark="mine", root=str(tmp_path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_file(opened, root):
    opened(lambda benchmark: None)
    path = tasks.config.project.ROOT / "data" / "benchmarks" / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_run(benchmark="mine", root=str(root)).benchmark.name == "mine"

    def by_list(benchmark):
        (root / "list.txt").write_bytes(b"\xef\xbb\xbfnear/000.png 0\nnear/001.png 0\n")
        source = {"kind": "list", "path": "{root}/list.txt", "root": "{root}"}
        benchmark["near"]["near"]["source"] = source

    run = opened(by_list)
    assert (run.manifest["dataset"] == "near").sum() == 2

    def torn(benchmark):
        by_list(benchmark)
        (root / "list.txt").write_bytes(b"near/000.png 0\nnear/caf\xe9.png 0\n")

    with pytest.raises(DataError, match=r"list\.txt: not UTF-8: byte 23 \(0xe9, in line 2\)"):
        opened(torn)


def test_class_folders_and_files_whose_names_are_no_utf8(opened, root):
    name = os.fsdecode(b"caf\xe9")
    (root / "ind" / "cat").rename(root / "ind" / name)
    (root / "near" / "000.png").rename(root / "near" / os.fsdecode(b"\xff.png"))
    run = opened(lambda benchmark: None)
    assert run.classes[0] == r"caf\udce9"
    assert (run.manifest["origin"].str.endswith(r"near/\udcff.png")).sum() == 1


def test_a_disk_without_room_is_a_problem(opened, capsys, monkeypatch, root):
    opened(lambda benchmark: None)
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(tasks.doctor.command.shutil, "disk_usage", lambda path: usage._replace(free=10 * 2**20))
    code, printed = examine(capsys, "--benchmark", "mine", "--root", str(root))
    assert code == 1
    assert re.search(r"FAIL  disk      .*: 0\.0 GiB are free, and the run takes about 0\.1; make room", printed)


def test_what_is_no_image_in_a_folder_is_counted(opened, capsys, root):
    (root / "ind" / "cat" / "notes.txt").write_text("x")
    (root / "ind" / "cat" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (4, 4)).save(root / "ind" / "cat" / ".ipynb_checkpoints" / "000-checkpoint.png")
    opened(lambda benchmark: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.doctor.images, "is_prepared", lambda *_: False)
        _, printed = examine(capsys, "--benchmark", "mine", "--root", str(root))
    assert "warn  images    ind animals: 1 passed over (1 .txt)" in printed
    assert "cat 14, dog 14, fish 14, tree 14" in printed


def test_a_busy_machine_is_said_beside_what_was_measured_on_it(capsys, root, tmp_path, monkeypatch):
    write_own(monkeypatch, tmp_path, own_benchmark())
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        _, out = examine(capsys, "--benchmark", "mine", "--root", str(root))
    finally:
        other.kill()
        other.wait()
    [line] = [line for line in out.splitlines() if line.startswith("warn  one image")]
    found = re.search(r"other programs take ([\d.]+) of this machine's \d+ cores, which these times include", line)
    assert float(found[1]) >= 0.5
