"""Every kind of classifier, denoiser and source, by nothing but the benchmark file."""

import gzip
import struct
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
import pytest
import torch
from own_project import CLASSES, own_benchmark, save_own, save_pictures, with_code, write_own
from PIL import Image
from published_keys import filled, latent_keys, unet_keys, vq_keys
from safetensors.torch import save_file
from tiny_models import (
    save_conditional,
    save_dit,
    save_latent,
    save_stable_diffusion,
    save_unconditional,
    timm_weights,
    unet,
)

from diffguard.cli.main import main
from diffguard.deploy.bundle import load_bundle
from diffguard.errors import DataError, ServiceError, SettingError
from diffguard.models.conversion import convert
from diffguard.models.gradcam import cam_maps
from diffguard.utils.importing import import_object
from tasks.bundle import bundle
from tasks.calibrate import calibrate
from tasks.config.benchmark import DENOISER
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.models.checks import check_models, open_model
from tasks.models.loaded import load_models
from tasks.prepare.stage import prepare_if_changed
from tasks.score.plan import plan
from tasks.score.stage import score_shards
from tasks.train.stage import train

OWN_CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.convolutions(x).mean(dim=(2, 3)))


def knows_more():
    net = Net(9)
    net.head.bias.data[7] = 5
    return net


class Denoiser:
    alphas_cumprod = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    num_labels, null_label, image_shape, device = 5, 5, (3, 16, 16), torch.device("cpu")

    def to(self, device):
        return self

    def encode(self, images):
        return images * 2 - 1

    def decode(self, latents):
        return (latents + 1) / 2

    def eps(self, x, timestep, label):
        return 0.1 * x * label.view(-1, 1, 1, 1)


def inverted(images, others, classifier):
    return (images.mean(dim=1) - others.mean(dim=1)).abs().amax(dim=(1, 2))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    save_own(folder)
    with with_code(folder, my_models=OWN_CODE):
        yield folder


@pytest.fixture
def scored(root, tmp_path, monkeypatch):
    """Prepares, opens the models, and scores, by the benchmark file as a test changed it."""

    def score(change):
        benchmark = own_benchmark()
        change(benchmark)
        write_own(monkeypatch, tmp_path, benchmark)
        run = open_run(benchmark="mine", root=str(root))
        prepare_if_changed(run.benchmark, run.home, seed=0)
        for model in (DENOISER, *run.params.classifiers):
            train(run, model, 0)
        items = plan(run)
        score_shards(run, items, range(run.shards), "cpu")
        for item in items:
            table = item.read()
            assert list(table["id"]) == list(run.scored["id"])
            assert np.isfinite(table["score"]).all()
            assert table["score"].nunique() > 1 or item.name == "msp"
        return run, {item.name: item.read() for item in items}

    return score


VIT = {
    "image_size": 16,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 16,
    "num_classes": 4,
}


def vit_weights(path):
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(**VIT)
    torch.nn.init.normal_(network.heads.head.weight)
    save_file(network.state_dict(), path)


def resnet_weights(path):
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    # As a training loop leaves it.
    state = {f"module.{key}": value for key, value in mobilenet_v3_small(num_classes=4).state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, path)


SMALL_VIT = {"img_size": 16, "patch_size": 4}
CLASSIFIERS = {
    "file": ({"kind": "file", "path": "{root}/classifier.safetensors"}, None, "stages.2"),
    "timm, CNN": (
        {"kind": "timm", "name": "test_resnet", "weights": "{root}/w"},
        lambda path: timm_weights(path, "test_resnet"),
        None,
    ),
    "timm, ViT": (
        {"kind": "timm", "name": "test_vit", "weights": "{root}/w", "arguments": SMALL_VIT},
        lambda path: timm_weights(path, "test_vit", **SMALL_VIT),
        "blocks.5.norm1",
    ),
    "timm, Swin": (
        {
            "kind": "timm",
            "name": "swin_tiny_patch4_window7_224",
            "weights": "{root}/w",
            "arguments": {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 12, "depths": [1, 1, 1, 1]},
        },
        lambda path: timm_weights(
            path,
            "swin_tiny_patch4_window7_224",
            img_size=16,
            patch_size=2,
            window_size=2,
            embed_dim=12,
            depths=[1, 1, 1, 1],
        ),
        None,
    ),
    "torchvision": (
        {"kind": "torchvision", "name": "mobilenet_v3_small", "weights": "{root}/w", "mean": [0.5], "std": [0.5]},
        resnet_weights,
        None,
    ),
    "torchvision, its layer given": (
        {"kind": "torchvision", "name": "mobilenet_v3_small", "weights": "{root}/w", "cam_layer": "features.1"},
        resnet_weights,
        "features.1",
    ),
    "object": ({"kind": "object", "object": "my_models:Net", "arguments": {"classes": 4}}, None, "convolutions"),
    "object, a ViT": (
        {
            "kind": "object",
            "object": "torchvision.models.vision_transformer:VisionTransformer",
            "arguments": VIT,
        },
        vit_weights,
        "encoder.layers.encoder_layer_1.ln_1",
    ),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_of_each_kind(kind, scored, root):
    settings, save, layer = CLASSIFIERS[kind]
    path = root / f"{kind}.{'pth' if settings['kind'] == 'torchvision' else 'safetensors'}"
    if save is not None:
        save(path)
        settings = {**settings, "weights": str(path)}
    run, _ = scored(lambda benchmark: benchmark.update(classifiers={"mine": settings}))
    classifier = load_models(run, 0, "cpu").classifiers["mine"]
    named = dict(getattr(classifier, "network", classifier).named_modules())
    if layer is not None:
        assert classifier.cam_layer is named[layer]
    images = torch.rand(2, 3, 16, 16)
    maps = cam_maps(classifier, images, torch.tensor([0, 1]))
    assert maps.shape == (2, 16, 16)
    assert classifier.features(images).ndim == 2


def save_converted(folder, state, **shape):
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder.with_suffix(".pt"))
    convert(folder.with_suffix(".pt"), folder, **shape)


def save_guided_diffusion(folder):
    """The layout of 256x256_diffusion_uncond.pt."""
    state = unet_keys(32, (1, 1, 2), 1, (False, False, True), 3, 6, adm=True)
    save_converted(folder, filled(state), image_size=32, head_channels=16)


def save_cin256(folder):
    """The layout of cin256-v2's model.ckpt, with four labels and the null one."""
    unet = unet_keys(32, (1, 1, 2), 1, (False, True, True), 3, 3, adm=False, context=48)
    state = latent_keys(unet, vq_keys(32, (1, 1, 2), 1, 3, 64), len(CLASSES) + 1, 48)
    save_converted(folder, filled(state), image_size=64, heads=1)


DENOISERS = {
    "guided-diffusion's checkpoint, converted": (save_guided_diffusion, {}),
    "latent diffusion's checkpoint, converted": (save_cin256, {}),
    "unconditional pixel": (save_unconditional, {}),
    "class-conditional pixel": (save_conditional, {}),
    "predicting v": (lambda folder: save_conditional(folder, prediction="v_prediction"), {}),
    "of more labels": (lambda folder: save_conditional(folder, 9), {"labels": [7, 0, 8, 3]}),
    "DiT": (save_dit, {}),
    "DiT of more labels": (lambda folder: save_dit(folder, 10), {"labels": [9, 8, 7, 6]}),
    "latent diffusion": (save_latent, {}),
    "Stable Diffusion": (save_stable_diffusion, {}),
    "Stable Diffusion, at another size": (
        lambda folder: save_stable_diffusion(folder, "v_prediction"),
        {"size": 32, "prompt": "{}, a drawing", "null_prompt": "a drawing"},
    ),
}
UNCONDITIONAL = ("unconditional pixel", "guided-diffusion's checkpoint, converted")


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_denoiser_of_each_kind(kind, scored, root):
    save, settings = DENOISERS[kind]
    folder = root / "denoisers" / kind
    if not folder.exists():
        save(folder)

    def change(benchmark):
        benchmark["denoiser"] = {"kind": "pretrained", "path": str(folder), **settings}
        benchmark["process_method"] = "resize" if "size" in settings or "converted" in kind else "none"
        guided = "classifier-guided" if kind in UNCONDITIONAL else "cam"
        benchmark["detectors"] = [guided, "unconditional"]
        benchmark["default"] = guided

    run, tables = scored(change)
    denoiser = load_models(run, 0, "cpu").denoiser
    assert denoiser.num_labels == (0 if kind in UNCONDITIONAL else 4)
    if denoiser.num_labels:
        # It is the label that makes the difference.
        assert not np.allclose(tables["cam"]["score"], tables["unconditional"]["score"], rtol=1e-3)


def test_a_denoiser_of_ones_own(scored):
    spec = {"kind": "object", "object": "my_models:Denoiser", "labels": [4, 2, 1, 0]}
    run, _ = scored(lambda benchmark: benchmark.update(denoiser=spec))
    denoiser = load_models(run, 0, "cpu").denoiser
    x = torch.ones(5, 3, 16, 16)
    found = denoiser.eps(x, torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 2, 3, 4]))
    assert torch.allclose(found[:, 0, 0, 0], torch.tensor([0.4, 0.2, 0.1, 0.0, 0.5]))


def test_a_classifier_that_knows_more_labels_than_there_are_classes(scored):
    """Here it says label 7 of every image, which is the name of none."""

    def change(benchmark):
        benchmark["classifiers"] = {"mine": {"kind": "object", "object": "my_models:knows_more"}}
        benchmark |= {"detectors": ["unconditional"], "default": "unconditional"}

    run, tables = scored(change)
    assert set(tables["unconditional"]["predicted"]) == {7}
    items = plan(run)
    [entry] = calibrate(run, items)["mine"]["unconditional"]
    assert (list(entry["thresholds"]), entry["pooled_classes"]) == (["label 7"], CLASSES)
    evaluate(run, items)
    assert (run.results / "verdicts.png").is_file()
    folder = bundle(run, items)
    with pytest.raises(DataError, match=r"my_models:knows_more, .*--trust-code my_models"):
        load_bundle(folder, "cpu")
    detector = load_bundle(folder, "cpu", trust=run.code)
    assert detector.decide(detector.prepare(detector.example)[None])[0].class_name == "label 7"


def test_a_distance_and_a_detector_of_ones_own(scored):
    def change(benchmark):
        benchmark["variants"]["cam"]["distance"] = "my_models:inverted"

    scored(change)


@pytest.mark.parametrize("size", [16, 19])
def test_models_trained_on_the_spot(size, scored):
    def change(benchmark):
        benchmark["image"]["size"] = size
        benchmark["classifiers"] = {"mine": {"kind": "trained", "width": 4, "blocks": [0, 1], "epochs": 1}}
        small = {"channels": [8, 16], "norm_groups": 4, "iterations": 3, "batch_size": 4}
        benchmark["denoiser"] = {"kind": "trained", "recipe": "cifar10-cpu", **small}

    scored(change)


def test_the_command_trains_within_a_time_budget(root, tmp_path, monkeypatch, capsys):
    benchmark = own_benchmark()
    small = {"channels": [8, 16], "norm_groups": 4, "iterations": 10**6, "batch_size": 4}
    benchmark["denoiser"] = {"kind": "trained", **small}
    write_own(monkeypatch, tmp_path, benchmark)
    chosen = ["--benchmark", "mine", "--root", str(root)]
    with pytest.raises(SystemExit) as end:
        main(["train", "denoiser", *chosen, "--minutes", "0.02"])
    assert end.value.code == 0
    run = open_run(benchmark="mine", root=str(root))
    assert capsys.readouterr().out.splitlines()[-1] == str(run.model(0, DENOISER))
    assert open_model(run, run.model(0, DENOISER)).num_labels == 4
    for options, message in {
        ("denoiser", "--minutes", "0"): "minutes: 0 is not more than 0",
        ("mine", "--minutes", "1"): "minutes: mine of mine is not trained here",
        ("yours",): "model: 'yours' is not one of denoiser, mine",
    }.items():
        with pytest.raises(SystemExit, match=message):
            main(["train", *options, *chosen])


def test_a_changed_model_is_not_taken_for_the_old_one(scored, root, tmp_path):
    save_conditional(root / "changing", 4)
    spec = {"kind": "pretrained", "path": "{root}/changing"}
    run, _ = scored(lambda benchmark: benchmark.update(denoiser=spec))
    network = unet(5)
    torch.nn.init.normal_(network.conv_out.weight)
    network.save_pretrained(root / "changing" / "unet")
    with pytest.raises(DataError, match="weights that it refers to have changed"):
        open_model(run, run.model(0, DENOISER))


def idx_file(path, values):
    """The format of MNIST's own files."""
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.tobytes())
    with gzip.open(path.with_suffix(".gz"), "wb") as file:
        file.write(header + values.tobytes())


def save_mnist(root):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 40)):
        idx_file(raw / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        idx_file(raw / f"{name}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))


def save_list(root):
    lines = [f"ind/{name}/{number:03d}.png {label}" for label, name in enumerate(CLASSES) for number in range(14)]
    (root / "list.txt").write_text("\n".join(lines) + "\n\n")


def save_dataset(root):
    import datasets

    paths = sorted((root / "ind").rglob("*.png"))
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)})
    rows = {"img": [str(path) for path in paths], "kind": [CLASSES.index(path.parent.name) for path in paths]}
    datasets.DatasetDict({"all": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(root / "saved")


SOURCES = {
    "folder": (None, {"kind": "folder", "path": "{root}/ind"}, None),
    "list": (save_list, {"kind": "list", "path": "{root}/list.txt", "root": "{root}"}, CLASSES),
    "torchvision": (
        save_mnist,
        {"kind": "torchvision", "name": "MNIST", "root": "{root}", "arguments": {"train": True}},
        None,
    ),
    "torchvision, a folder": (
        None,
        {"kind": "torchvision", "name": "ImageFolder", "root": "{root}/ind"},
        None,
    ),
    "datasets, saved": (
        save_dataset,
        {"kind": "huggingface", "path": "{root}/saved", "split": "all", "image": "img", "label": "kind"},
        None,
    ),
    "datasets, files": (None, {"kind": "huggingface", "path": "{root}/ind", "split": "train"}, None),
    "letters": (None, {"kind": "letters", "characters": "ABCD", "size": 16}, None),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_of_each_kind(kind, root, tmp_path, monkeypatch):
    save, settings, classes = SOURCES[kind]
    if save is not None:
        save(root)
    benchmark = own_benchmark()
    [ind] = benchmark["ind"].values()
    ind["source"] = settings
    ind["splits"] |= {"test": 8}
    if classes is not None:
        benchmark["classes"] = classes
    if kind == "torchvision":
        benchmark["near"]["near"]["source"] = {**settings, "arguments": {"train": False}}
    write_own(monkeypatch, tmp_path, benchmark)
    run = open_run(benchmark="mine", root=str(root))
    prepare_if_changed(run.benchmark, run.home, seed=0)
    manifest = run.manifest
    rows = manifest[manifest["role"] == "ind"]
    labels = 10 if kind == "torchvision" else 4
    assert len(run.classes) == labels
    assert rows.groupby("split").size().to_dict() == {"train": 16, "calibration": 24, "test": 8}
    if labels == 4:
        # Of every class alike, in each split.
        assert (rows.groupby(["split", "label"]).size().unstack().std(axis=1) < 1.5).all()
        assert rows["label"].nunique() == 4
    first = rows.iloc[0]
    with Image.open(run.home / first["path"]) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    if kind in ("folder", "list", "datasets, saved", "datasets, files"):
        assert set(rows["source_format"]) == {"PNG"}
        assert (rows[["source_width", "source_height"]] == [24, 20]).all(axis=None)
        assert (rows["source_bytes"] > 100).all()
    # Nothing has changed: nothing is made again.
    stamp = (run.home / "manifest.parquet").stat().st_mtime_ns
    prepare_if_changed(run.benchmark, run.home, seed=0)
    assert (run.home / "manifest.parquet").stat().st_mtime_ns == stamp


@pytest.fixture
def prepared(root, tmp_path, monkeypatch):
    """Prepares a benchmark of the InD pictures that a source names; returns the InD rows of the manifest."""

    def prepare(source):
        benchmark = own_benchmark() | {"classes": CLASSES}
        benchmark["ind"]["animals"]["source"] = source
        write_own(monkeypatch, tmp_path, benchmark)
        run = open_run(benchmark="mine", root=str(root))
        prepare_if_changed(run.benchmark, run.home, seed=0)
        return run.manifest[run.manifest["role"] == "ind"]

    return prepare


def test_new_files_are_noticed(prepared, tmp_path):
    for number, name in enumerate(CLASSES):
        save_pictures(tmp_path / "pictures" / name, 11, number)
    source = {"kind": "folder", "path": str(tmp_path / "pictures")}
    assert len(prepared(source)) == 44
    save_pictures(tmp_path / "pictures" / "cat", 12, 0)
    assert len(prepared(source)) == 45


def test_changed_images_behind_a_list_are_noticed(prepared, tmp_path):
    for number, name in enumerate(CLASSES):
        save_pictures(tmp_path / "ind" / name, 14, number)
    save_list(tmp_path)
    source = {"kind": "list", "path": str(tmp_path / "list.txt"), "root": str(tmp_path)}
    before = set(prepared(source)["content_hash"])
    save_pictures(tmp_path / "ind" / "cat", 3, 99)
    assert len(set(prepared(source)["content_hash"]) - before) == 3


def test_scores_made_elsewhere(root, tmp_path, monkeypatch):
    import yaml

    write_own(monkeypatch, tmp_path, own_benchmark())
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    params["score"]["imported"] = {"theirs": {"file": str(tmp_path / "scores.parquet")}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    run = open_run(benchmark="mine", root=str(root), variants=["theirs"])
    prepare_if_changed(run.benchmark, run.home, seed=0)
    for model in (DENOISER, "mine"):
        train(run, model, 0)
    ids = run.scored["id"]
    scores = pd.DataFrame({"id": ids[::-1], "score": np.arange(len(ids))[::-1] * 0.5})
    scores.to_parquet(tmp_path / "scores.parquet")
    [item] = plan(run)
    score_shards(run, [item], range(run.shards), "cpu")
    assert list(item.read()["score"]) == [0.5 * number for number in range(len(ids))]
    scores[1:].to_parquet(tmp_path / "scores.parquet")
    [item] = plan(run)
    with pytest.raises(DataError, match=r"scores\.parquet.*1"):
        score_shards(run, [item], range(run.shards), "cpu")


def test_pretrained_weights_that_cannot_be_fetched(scored, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ServiceError, match=r"resnet18: its pre-trained weights cannot be fetched .*give a local"):
        scored(lambda b: b.update(classifiers={"mine": {"kind": "torchvision", "name": "resnet18"}}))


@pytest.mark.parametrize(
    ("kind", "maker"), [("torchvision", "torchvision.models.get_model"), ("timm", "timm.create_model")]
)
def test_classes_in_another_order_than_the_classifiers(kind, maker, root, tmp_path, monkeypatch):
    # Its pre-trained weights are not at hand; its names are.
    make = import_object(":".join(maker.rsplit(".", 1)))
    monkeypatch.setattr(maker, lambda name, **_: make(name))

    def opened(classes):
        benchmark = own_benchmark() | {"classes": classes, "detectors": ["unconditional"], "default": "unconditional"}
        benchmark["classifiers"]["mine"] = {"kind": kind, "name": "resnet18"}
        write_own(monkeypatch, tmp_path, benchmark)
        return check_models(open_run(benchmark="mine", root=str(root)))["mine"]

    assert opened(["tench", "goldfish", "shark", "dog"]).class_names[:2] == ["tench", "goldfish"]
    assert opened(4).num_classes == 1000
    with pytest.raises(SettingError) as error:
        opened(["tench", "dog", "goldfish", "shark"])
    assert "mine: its label 1 is 'goldfish', the benchmark's 2; give classes in the classifier's order" in str(
        error.value
    )


def test_names_of_imagenets_classes(root, tmp_path, monkeypatch):
    benchmark = own_benchmark() | {"classes": "ResNet50_Weights.IMAGENET1K_V2"}
    write_own(monkeypatch, tmp_path, benchmark)
    assert open_run(benchmark="mine", root=str(root)).classes[0] == "tench"
    write_own(monkeypatch, tmp_path, benchmark | {"classes": "ResNet51"})
    with pytest.raises(SettingError, match="classes: 'ResNet51' is not the name of weights of torchvision"):
        _ = open_run(benchmark="mine", root=str(root)).classes
