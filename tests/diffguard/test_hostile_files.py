"""Files passed on: what they name is not run, what they claim takes no memory, where they point is not read."""

import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_detector import Made
from tiny_models import save_conditional, save_dit, save_stable_diffusion

import diffguard.mlflow
import tasks.fetch
from diffguard.cli.main import main
from diffguard.deploy.bundle import INFO_FILE, load_bundle, save_bundle
from diffguard.errors import DataError, DiffGuardError
from diffguard.models.classifiers.files import load_classifier, save_classifier
from diffguard.models.denoisers.loading import open_denoiser
from diffguard.models.folder import CLASSIFIER_FILE, REFERENCE_FILE, WEIGHTS_FILE, open_model
from diffguard.models.weights import read_weights
from diffguard.settings import PretrainedDenoiser
from diffguard.utils.hashing import hash_file, hash_values

NOT_IMPORTED = r"names the code {}, which is not imported because a file says so; .*--trust-code {}"
CANARY = """
from pathlib import Path
Path({ran!r}).write_text("imported")

def make(*arguments, **options):
    Path({ran!r}).write_text("called")
"""


@pytest.fixture(autouse=True)
def ran(tmp_path, monkeypatch):
    """A file that is there once a hostile file's code ran; nothing of it may be, whatever the test does."""
    ran = tmp_path / "it-ran"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "canary.py").write_text(CANARY.format(ran=str(ran)))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield ran
    sys.modules.pop("canary", None)
    assert not ran.exists()


@pytest.fixture(scope="module")
def made(classifier, denoiser):
    return Made(classifier, denoiser)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A bundle as it should be, of a variant, two baselines and what combines them."""
    folder = tmp_path_factory.mktemp("whole") / "detector"
    save_bundle(made.detector("gated"), folder)
    return folder


@pytest.fixture
def bundle(whole, tmp_path):
    """Its copy, to be made hostile."""
    shutil.copytree(whole, tmp_path / "bundle")
    return tmp_path / "bundle"


def signed(bundle, change=lambda info: None):
    """Change what a bundle says of itself and hash it anew, as its author can."""
    written = json.loads((bundle / INFO_FILE).read_text())
    change(written["info"])
    paths = [path for path in bundle.rglob("*") if path.is_file() and path.name != INFO_FILE]
    written["files"] = {path.relative_to(bundle).as_posix(): hash_file(path) for path in paths}
    written["hash"] = hash_values({"info": written["info"], "files": written["files"]})
    (bundle / INFO_FILE).write_text(json.dumps(written))


def refers(bundle, model, **spec):
    """Put a reference in a model's place."""
    shutil.rmtree(bundle / model)
    (bundle / model).mkdir()
    (bundle / model / REFERENCE_FILE).write_text(json.dumps({"spec": spec, "weights": "0" * 64}))
    signed(bundle)


def detector_is(name):
    return lambda bundle: signed(bundle, lambda info: info["baselines"]["pixel-knn"].update(detector=name))


def variant_is(**changes):
    return lambda bundle: signed(bundle, lambda info: info["variants"]["guided"].update(changes))


def linked(bundle, ran):
    (bundle / "example.png").unlink()
    (bundle / "example.png").symlink_to("/etc/hostname")


def timm_is(bundle, name, **arguments):
    """A network of timm by reference, whose weights are one small tensor."""
    spec = {"kind": "timm", "name": name, "weights": WEIGHTS_FILE, "arguments": arguments}
    refers(bundle, "classifier", **spec)
    save_file({"head.weight": torch.ones(6, 4)}, bundle / "classifier" / WEIGHTS_FILE)
    signed(bundle)


def change_table(path, **columns):
    pd.read_parquet(path).assign(**columns).to_parquet(path)


def change_fitted(path, change):
    tensors = load_file(path)
    save_file({key: change(value).contiguous() if value.ndim > 1 else value for key, value in tensors.items()}, path)
    if len(load_file(path)["values"]) < len(tensors["labels"]):
        save_file({key: change(value).contiguous() for key, value in tensors.items()}, path)


def many_rows(path):
    """A name of 100,000 letters, which is written once and stands for 12,000 rows."""
    row = pa.Table.from_pandas(pd.read_parquet(path)[:1].assign(id="x" * 100_000))
    rows = pa.concat_tables([row] * 1000).combine_chunks()
    with pq.ParquetWriter(path, row.schema, compression="zstd") as table:
        for _ in range(12):
            table.write_table(rows)


DEEP = "[" * 200_000
CONV, RESIDUAL, WHITENED = (
    "diffguard.models.classifiers:ConvClassifier",
    "diffguard.models.classifiers:ResidualClassifier",
    "diffguard.models.classifiers:WhitenedClassifier",
)
STOP = {"min_level": 1, "max_level": 3, "thresholds": {"canary:make": 0.5}}
BUNDLES = {
    "a classifier of one's own code": (
        lambda b: refers(b, "classifier", kind="object", object="canary:make"),
        NOT_IMPORTED.format("canary:make", "canary"),
    ),
    "a command in the classifier's place": (
        lambda b: refers(b, "classifier", kind="object", object="os:system", arguments={"command": "touch it-ran"}),
        NOT_IMPORTED.format("os:system", "os"),
    ),
    "a denoiser of one's own code": (
        lambda b: refers(b, "denoiser", kind="object", object="canary:make", labels=None),
        NOT_IMPORTED.format("canary:make", "canary"),
    ),
    "a detector of one's own code": (detector_is("canary:make"), NOT_IMPORTED.format("canary:make", "canary")),
    "what pytorch-ood imports": (
        detector_is("pytorch_ood.detector:torch"),
        NOT_IMPORTED.format("pytorch_ood.detector:torch", "pytorch_ood.detector"),
    ),
    "what is beside its detectors": (detector_is("pytorch_ood.utils:make"), "pytorch_ood.utils:make, which is not"),
    "a name within this library": (
        detector_is("diffguard.cli.main:main"),
        "diffguard.cli.main:main, which is not imported",
    ),
    "a distance of one's own code": (variant_is(distance="canary:make"), NOT_IMPORTED.format("canary:make", "canary")),
    "a similarity of one's own code": (variant_is(stop=STOP), NOT_IMPORTED.format("canary:make", "canary")),
    "weights elsewhere": (
        lambda b: refers(b, "classifier", kind="timm", name="test_resnet", weights="/etc/hostname"),
        r"reference.json: weights: '/etc/hostname' is not a file of this folder",
    ),
    "weights above": (
        lambda b: refers(b, "classifier", kind="timm", name="test_resnet", weights="../denoiser/x.safetensors"),
        r"reference.json: weights: '\.\./denoiser/x\.safetensors' is not a file of this folder",
    ),
    "a checkpoint by an argument": (
        lambda b: refers(b, "classifier", kind="timm", name="test_resnet", arguments={"checkpoint_path": "/tmp/x"}),
        r"reference.json: arguments: checkpoint_path opens another file",
    ),
    "a denoiser elsewhere": (
        lambda b: refers(b, "denoiser", kind="pretrained", path="/srv/models/x"),
        r"reference.json: path: '/srv/models/x' is not a file of this folder",
    ),
    "a denoiser above": (
        lambda b: refers(b, "denoiser", kind="pretrained", path="../denoiser"),
        r"reference.json: path: '\.\./denoiser' is not a file of this folder",
    ),
    "images of another side": (
        lambda b: signed(b, lambda info: info["image"].update(size=16)),
        r"detector guided: its images are 16 pixels wide, of 1 channels; the denoiser takes 8, of 1",
    ),
    "images of another mode": (
        lambda b: signed(b, lambda info: info["image"].update(mode="RGB")),
        r"detector guided: its images are 8 pixels wide, of 3 channels; the denoiser takes 8, of 1",
    ),
    "an example that is no picture": (
        lambda b: [(b / "example.png").write_text("x"), signed(b)],
        r"example.png: the image cannot be read",
    ),
    "a table that is none": (
        lambda b: [(b / "calibration.parquet").write_text("a,b"), signed(b)],
        r"calibration.parquet: not a Parquet file",
    ),
    "fitted values without labels": (
        lambda b: [save_file({"values": torch.ones(3)}, next((b / "fitted").iterdir())), signed(b)],
        r"fitted/.*: not values and their labels",
    ),
    "a reference that is none": (
        lambda b: [refers(b, "denoiser"), (b / "denoiser" / REFERENCE_FILE).write_text("[1]"), signed(b)],
        r"reference.json: not a reference to a model",
    ),
    "settings that are nested without end": (
        lambda b: (b / INFO_FILE).write_text(DEEP),
        r"detector.json: damaged",
    ),
    "a reference that is nested without end": (
        lambda b: [refers(b, "denoiser"), (b / "denoiser" / REFERENCE_FILE).write_text(DEEP), signed(b)],
        r"reference.json: not a reference to a model",
    ),
    "this library's network by reference, of any width": (
        lambda b: refers(b, "classifier", kind="object", object=CONV, arguments={"num_classes": 6, "width": 40_000}),
        r"reference.json: object: .*ConvClassifier is no model that is referred to",
    ),
    "weights that are not there": (
        lambda b: refers(b, "classifier", kind="timm", name="test_resnet", weights="weights.safetensors"),
        r"reference.json: weights: 'weights.safetensors' is not a file of this folder",
    ),
    "layers by an argument": (
        lambda b: timm_is(b, "vit_tiny_patch16_224", depth=10**6, embed_dim=3),
        r"arguments: depth 1000000; no network has more",
    ),
    "a width by an argument": (
        lambda b: timm_is(b, "vit_tiny_patch16_224", depth=1, embed_dim=60_000),
        r"its arguments ask for 43,318,921,000 numbers, and its weights hold 24",
    ),
    "rows beyond memory": (lambda b: [many_rows(b / "calibration.parquet"), signed(b)], r"bytes of table; make"),
    "scores of text": (
        lambda b: [change_table(b / "calibration.parquet", score="x"), signed(b)],
        r"its parts do not fit together \(could not convert",
    ),
    "fitted values of other images": (
        lambda b: [change_fitted(b / "fitted/pixels.safetensors", lambda v: v[:, :7]), signed(b)],
        r"fitted/pixels.safetensors: values of the shape \(7,\), and of an image \(64,\) is seen",
    ),
    "fitted values that are too few": (
        lambda b: [change_fitted(b / "fitted/pixels.safetensors", lambda v: v[:1]), signed(b)],
        r"pixel-knn: .*KNN cannot be fitted on the split train \(k=3 exceeds",
    ),
    "a detector's arguments of another kind": (
        lambda b: signed(b, lambda info: info["baselines"]["pixel-knn"].update(arguments={"k": "x"})),
        r"its parts do not fit together \('<' not supported",
    ),
    "a combination of itself": (
        lambda b: signed(b, lambda info: info["combine"]["gated"].update(of=["gated", "guided"])),
        r"its parts do not fit together \(maximum recursion",
    ),
    "a pipe in a file's place": (
        lambda b: [(b / "example.png").unlink(), signed(b), os.mkfifo(b / "example.png")],
        r"example.png: neither a file nor a folder",
    ),
    "a link out": (lambda b: [linked(b, None), signed(b)], r"example.png: a link out of the bundle"),
    "a folder linked in": (
        lambda b: [(b / "classifier" / "more").symlink_to("/etc"), signed(b)],
        r"more: a link out of the bundle",
    ),
    "a file named above": (
        lambda b: hashed(b, "../../x"),
        r"detector.json: it names '\.\./\.\./x', which is no file of the bundle",
    ),
    "an absolute name": (
        lambda b: hashed(b, "/etc/hostname"),
        r"detector.json: it names '/etc/hostname', which is no file of the bundle",
    ),
}


WHOLE_TO_COPY = (
    "images of another side",
    "images of another mode",
    "an example that is no picture",
    "a table that is none",
    "fitted values without labels",
    "layers by an argument",
    "a width by an argument",
    "rows beyond memory",
    "scores of text",
    "fitted values of other images",
    "fitted values that are too few",
    "a detector's arguments of another kind",
    "a combination of itself",
)
"""What is told once it is opened: copying a bundle looks at hashes and names."""


def hashed(bundle, name):
    """List another file with a hash."""
    written = json.loads((bundle / INFO_FILE).read_text())
    written["files"][name] = "0" * 64
    written["hash"] = hash_values({"info": written["info"], "files": written["files"]})
    (bundle / INFO_FILE).write_text(json.dumps(written))


@pytest.mark.parametrize("name", BUNDLES)
def test_a_hostile_bundle_is_one_line(name, bundle, tmp_path, monkeypatch, capsys):
    change, message = BUNDLES[name]
    monkeypatch.chdir(tmp_path)
    change(bundle)
    with pytest.raises(DiffGuardError, match=message) as error:
        load_bundle(bundle, "cpu")
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit) as stopped:
        main(["score", str(bundle / "example.png"), "--detector", str(bundle)])
    assert str(stopped.value.code) == f"error: {error.value}"
    if name not in WHOLE_TO_COPY:
        with pytest.raises(DataError, match=message):
            diffguard.mlflow.save_model(bundle, tmp_path / "model")


def test_code_runs_once_it_is_trusted_and_no_other(bundle, ran):
    detector_is("canary:make")(bundle)
    for trust in ((), ["canar"], ["canary:mak"], ["canary.make"], ["other"]):
        with pytest.raises(DataError, match="--trust-code canary"):
            load_bundle(bundle, "cpu", trust=trust)
    assert not ran.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever becomes of a detector that is none)
        load_bundle(bundle, "cpu", trust=["canary"])
    assert ran.read_text() == "called"
    ran.unlink()


@pytest.mark.parametrize("entry", ["os.", ":x", "a-b", "a:b:c", "../x", ""])
def test_a_wrong_word_of_trust_is_named(bundle, entry):
    with pytest.raises(DiffGuardError, match=r"--trust-code: .* is not package"):
        load_bundle(bundle, "cpu", trust=[entry])


def test_mlflow_trusts_what_was_trusted_when_it_was_logged(bundle, tmp_path, monkeypatch, ran):
    """Of a store's model, not of a folder that says so of itself; and its code is found only then."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    detector_is("canary:make")(bundle)
    diffguard.mlflow.save_model(bundle, tmp_path / "model", trust=["canary"])
    with pytest.raises(DataError, match="--trust-code canary"):
        diffguard.mlflow.load_model(str(tmp_path / "model"))
    assert not ran.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 (it is no detector; but it was asked)
        diffguard.mlflow._load_pyfunc(str(tmp_path / "model" / "detector"))
    assert ran.read_text() == "called"
    ran.unlink()


def saved_by(name, config=None):
    def save(path, classifier):
        save_classifier(classifier, path)
        metadata = {"class": name, "config": json.dumps(classifier.config if config is None else config)}
        save_file(load_file(path), path, metadata)

    return save


CONFIG = {"num_classes": 6, "width": 4, "in_channels": 1, "mean": 0.3, "std": 0.35}
CLASSIFIERS = {
    "a command": (saved_by("os:system", {"command": "touch it-ran"}), NOT_IMPORTED.format("os:system", "os")),
    "one's own class": (saved_by("canary:make"), NOT_IMPORTED.format("canary:make", "canary")),
    "a name that is none": (saved_by("canary"), "names the code canary, which is not imported"),
    "a function of the library": (
        saved_by("diffguard.models.classifiers.files:load_classifier", {"path": "/x"}),
        "not imported",
    ),
    "widths beyond memory": (saved_by(CONV, {**CONFIG, "width": 10**9}), "width: 1000000000 is more than its weights"),
    "blocks beyond memory": (saved_by(RESIDUAL, {"num_classes": 6, "blocks": [10**8]}), "blocks: .* is more than"),
    "lists beyond memory": (saved_by(RESIDUAL, {"num_classes": 6, "blocks": [1] * 1000}), "blocks: .* is more than"),
    "stages beyond memory": (saved_by(WHITENED, {"num_classes": 6, "stages": [10**8]}), "stages: .* is more than"),
    "stages of another": (saved_by(WHITENED, {"num_classes": 6, "stages": [4]}), "do not fit WhitenedClassifier"),
    "stages that are none": (saved_by(WHITENED, {"num_classes": 6, "stages": ["x"]}), "not a classifier that"),
    "another width": (saved_by(CONV, {**CONFIG, "width": 8}), "do not fit ConvClassifier: 1. have another shape"),
    "arguments that are none": (saved_by(CONV, {**CONFIG, "code": "x"}), "unexpected keyword argument 'code'"),
    "a mean of text": (saved_by(CONV, {**CONFIG, "mean": "x"}), "mean: 'x' is not a number"),
    "a detector in a classifier's place": (
        saved_by("diffguard.detectors:HighFrequency", {}),
        "HighFrequency returns no torch.nn.Module",
    ),
    "a configuration that is nested without end": (
        lambda path, classifier: save_file({"a": torch.ones(1)}, path, {"class": CONV, "config": DEEP}),
        "not a classifier that DiffGuard saved",
    ),
    "no configuration": (saved_by(CONV, [1]), "not a classifier that DiffGuard saved"),
    "a header that claims more": (
        lambda path, classifier: path.write_bytes((2**40).to_bytes(8, "little") + b"{}"),
        "not a classifier that DiffGuard saved",
    ),
    "a pickle": (lambda path, classifier: torch.save(Harmful(), path), "not a classifier that DiffGuard saved"),
}


class Harmful:
    def __reduce__(self):
        return (os.system, ("touch it-ran",))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_hostile_classifier_is_one_line(name, classifier, tmp_path, monkeypatch):
    save, message = CLASSIFIERS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / CLASSIFIER_FILE
    save(path, classifier)
    with pytest.raises(DataError, match=message) as error:
        load_classifier(path)
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=message):
        open_model(tmp_path / "model", ["a"], 8)
    with pytest.raises(SystemExit) as stopped:
        main(["score", str(path), "--classifier", str(path), "--denoiser", str(tmp_path)])
    assert str(stopped.value.code) == f"error: {error.value}"


def set_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DENOISERS = {
    "layers beyond memory": (
        save_conditional,
        lambda f: set_json(f / "unet/config.json", layers_per_block=10**9),
        "config.json: layers_per_block: 1000000000 layers",
    ),
    "channels beyond memory": (
        save_conditional,
        lambda f: set_json(f / "unet/config.json", block_out_channels=[2**20, 2**21]),
        "do not fit the UNet2DModel of config.json: .* have another shape",
    ),
    "a side beyond memory": (
        save_conditional,
        lambda f: set_json(f / "unet/config.json", sample_size=10**9),
        "config.json: sample_size: 1000000000 is not within",
    ),
    "places beyond memory": (
        save_dit,
        lambda f: set_json(f / "transformer/config.json", sample_size=2**15),
        "config.json: sample_size: 32768 is not within 1..512",
    ),
    "steps beyond memory": (
        save_conditional,
        lambda f: set_json(f / "scheduler/scheduler_config.json", num_train_timesteps=10**13),
        "num_train_timesteps: 10000000000000 is not within",
    ),
    "pickled code": (
        save_conditional,
        lambda f: [
            (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
            torch.save({"conv_in.weight": Harmful()}, f / "unet/diffusion_pytorch_model.bin"),
        ],
        r"diffusion_pytorch_model\.bin: not a file of weights \(it holds a posix.system",
    ),
    "parts elsewhere": (
        save_conditional,
        lambda f: [
            (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
            (f / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "../../x.safetensors"}})
            ),
        ],
        r"index.json: it names '\.\./\.\./x\.safetensors', which is not a file of its folder",
    ),
    "a text encoder of any class": (
        save_stable_diffusion,
        lambda f: set_json(f / "model_index.json", text_encoder=["transformers", "pipeline"]),
        "model_index.json: text_encoder: pipeline is not one of CLIPTextModel",
    ),
    "attention that is fetched as code": (
        save_stable_diffusion,
        lambda f: set_json(f / "text_encoder/config.json", attn_implementation="someone/kernel"),
        "text_encoder/config.json: attention by 'someone/kernel', which is fetched as code",
    ),
    "a text encoder's own package": (
        save_stable_diffusion,
        lambda f: set_json(f / "text_encoder/config.json", quantization_config={"quant_method": "gptq"}),
        "text_encoder/config.json: quantization_config: code or a package that the file chooses",
    ),
    "a text encoder's layers beyond memory": (
        save_stable_diffusion,
        lambda f: set_json(f / "text_encoder/config.json", num_hidden_layers=10**6),
        "text_encoder/config.json: num_hidden_layers: 1000000 is not within",
    ),
    "a tokenizer of one's own code": (
        save_stable_diffusion,
        lambda f: set_json(f / "model_index.json", tokenizer=["canary", "make"]),
        "model_index.json: tokenizer: make is not one of CLIPTokenizer",
    ),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_hostile_denoiser_is_one_line(name, tmp_path, monkeypatch):
    save, change, message = DENOISERS[name]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "denoiser"
    save(folder)
    change(folder)
    with pytest.raises(DiffGuardError, match=message) as error:
        open_denoiser(PretrainedDenoiser(kind="pretrained", path=str(folder)), ["cat", "dog"])
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "model.bin"])
def test_a_checkpoint_with_code_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "hooks": Harmful()}, tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: .*it holds a posix\.system, and only weights"):
        read_weights(tmp_path / name)


def test_a_checkpoint_that_unpacks_to_more_is_one_line(tmp_path):
    torch.save({"a": torch.zeros(2**22)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert read_weights(tmp_path / "plain.pt")["a"].shape == (2**22,)
    with pytest.raises(DataError, match=r"x\.pt: not a file of weights \(it unpacks to 16,777,"):
        read_weights(tmp_path / "x.pt")


def test_a_checkpoint_of_one_number_that_counts_as_many_is_one_line(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"x\.pt: a: a tensor of 1,000,000,000 numbers, of which it holds fewer"):
        read_weights(tmp_path / "x.pt")


def a_zip(path, name, mode=0o644):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/hostname")


def a_tar(path, name, kind=tarfile.REGTYPE, size=3):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, "/etc/hostname", size if kind == tarfile.REGTYPE else 0
    with tarfile.open(path, "w") as archive:
        archive.addfile(member, io.BytesIO(b"abc"))


def many(path):
    """An archive whose thousand members say that they hold 4 GiB each."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1000):
            archive.writestr(f"{number:04}", b"")
    entry, content = b"PK\x01\x02", path.read_bytes()
    first, *entries = content.split(entry)  # the directory's, in which the size is at the place 20
    claimed = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(entry.join([first, *(each[:20] + claimed + each[24:] for each in entries)]))


def claims(path):
    """An archive that says it holds a pebibyte."""
    member = tarfile.TarInfo("x")
    member.size = 2**50
    path.write_bytes(member.tobuf() + b"abc".ljust(512 * 4, b"\0"))


ARCHIVES = {
    "zip above": ("zip", lambda p: a_zip(p, "../x"), "'../x' would land outside"),
    "zip absolute": ("zip", lambda p: a_zip(p, "/etc/x"), "'/etc/x' would land outside"),
    "zip of another system": ("zip", lambda p: a_zip(p, "..\\x"), "would land outside"),
    "zip with a drive": ("zip", lambda p: a_zip(p, "C:/x"), "would land outside"),
    "zip with a link": ("zip", lambda p: a_zip(p, "x", stat.S_IFLNK | 0o777), "'x' is a link"),
    "tar above": ("tar", lambda p: a_tar(p, "../x"), "'../x' would be extracted to .* outside the destination"),
    "tar with a link out": ("tar", lambda p: a_tar(p, "x", tarfile.SYMTYPE), "'x' is a link to an absolute path"),
    "tar with a device": ("tar", lambda p: a_tar(p, "x", tarfile.CHRTYPE), "'x' is a special file"),
    "tar beyond the disk": ("tar", lambda p: claims(p), r"holds 1,048,576\.0 GiB, and .* are free"),
    "zip beyond the disk": ("zip", lambda p: many(p), r"holds .* GiB, and .* are free"),
    "no zip": ("zip", lambda p: p.write_bytes(b"PK\3\4 no"), "cannot be unpacked as zip"),
    "no tar": ("tar", lambda p: p.write_bytes(b"no"), "cannot be unpacked as tar"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_one_line_and_leaves_nothing(name, tmp_path):
    kind, make, message = ARCHIVES[name]
    (tmp_path / "inner" / "folder").mkdir(parents=True)
    path = tmp_path / "inner" / "folder" / "archive"
    make(path)
    with pytest.raises(DataError, match=f"the archive cannot be unpacked as {kind}") as error:
        tasks.fetch._unpack(path, kind, "the archive")
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
    assert {each for each in tmp_path.rglob("*") if each.is_file() and "code" not in each.parts} == {path}
    assert not Path("/etc/x").exists()
