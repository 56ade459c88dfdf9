"""What files give away about a dataset, and what the denoiser has seen: on real files, as prepare, doctor and the
report tell it."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from own_project import own_benchmark, save_own, save_pictures, write_own
from PIL import Image
from published_keys import vq_keys
from tiny_models import save_latent

from diffguard.cli.main import main
from diffguard.models.conversion import vq_config
from tasks.config.run import open_run
from tasks.evaluate.report import report
from tasks.models.first_stage import first_stage, seen_datasets
from tasks.prepare.fairness import dataset_warnings, unfair
from tasks.prepare.stage import prepare_if_changed

WHAT_TO_DO = (
    "smoothness alone tells them apart (AUROC of the factor 100 %); bring InD's files through the same resizing "
    "first, or hold every figure against that of the row complexity, the control"
)


@pytest.fixture
def resizing(tmp_path, monkeypatch):
    """What is said of sizes, where InD files and those of `near` and `far` have these sides."""

    def told(ind, near, far, image):
        root = tmp_path / "own"
        for number, (folder, sizes) in enumerate({"ind/cat": ind, "ind/dog": ind, "near": near, "far": far}.items()):
            for part, side in enumerate(sizes):
                save_pictures(root / folder / str(part), 12 // len(sizes), 10 * number + part, size=side)
        benchmark = own_benchmark() | {"image": image, "classes": ["cat", "dog"]}
        benchmark["ind"]["animals"]["splits"] = {"train": 4, "calibration": 8, "test": "rest"}
        write_own(monkeypatch, tmp_path, benchmark)
        run = open_run(benchmark="mine", root=str(root))
        prepare_if_changed(run.benchmark, run.home, seed=0)
        assert {Image.open(run.home / path).size for path in run.manifest["path"]} == {(run.benchmark.image.size,) * 2}
        return [line for line in unfair(run.manifest, run.benchmark.image) if "file size" not in line]

    return told


def test_enlarged_ood_beside_native_ind(resizing):
    image = {"size": 32, "mode": "RGB"}
    assert resizing([(32, 32)], [(28, 28)], [(128, 128)], image) == [
        f"near: 28x28 files are enlarged 1.14x, InD's of 32x32 are native: {WHAT_TO_DO}",
        f"far: 128x128 files are shrunk 4x, InD's of 32x32 are native: {WHAT_TO_DO}",
    ]


def test_what_is_resized_alike_is_no_warning(resizing):
    sizes = [(28, 28), (32, 40), (50, 36), (64, 64)]
    assert resizing(sizes, sizes, sizes, {"size": 32, "mode": "RGB"}) == []


def test_sizes_on_both_sides_of_inds(resizing):
    near, far = resizing([(48, 48)], [(32, 32), (72, 72)], [(64, 64), (128, 128)], {"size": 32, "mode": "RGB"})
    assert near.startswith("near: 32x32 to 72x72 files are shrunk 2.25x to native, InD's of 48x48 are shrunk 1.5x: ")
    assert far.startswith("far: 64x64 to 128x128 files are shrunk 4x to shrunk 2x, InD's of 48x48 are shrunk 1.5x: ")


def test_what_counts_is_the_short_side_after_resizing(resizing):
    """InD is brought to 36 pixels before the crop, so files of 36 pixels are the native ones."""
    image = {"size": 32, "mode": "RGB", "resize": 36}
    near, *far = resizing([(36, 36)], [(32, 32)], [(36, 60)], image)
    assert near.startswith("near: 32x32 files are enlarged 1.12x, InD's of 36x36 are native: ")
    assert far == ["far: width alone tells it from InD with AUROC 100 % (median 60, InD 36)"]


def test_prepare_doctor_and_the_report_tell_it(tmp_path, monkeypatch, capsys):
    root = tmp_path / "own"
    save_own(root)
    for path in (root / "far").iterdir():
        Image.open(path).resize((12, 12)).save(path)
    write_own(monkeypatch, tmp_path, own_benchmark())
    line = "far: 12x12 files are enlarged 1.33x, InD's of 24x20 are shrunk 1.25x: smoothness alone"

    def doctor():
        with pytest.raises(SystemExit) as end:
            main(["doctor", "--benchmark", "mine", "--root", str(root)])
        assert end.value.code == 0
        return capsys.readouterr().out

    assert f"warn  fairness  {line}" in doctor()  # of a sample
    run = open_run(benchmark="mine", root=str(root))
    prepare_if_changed(run.benchmark, run.home, seed=0)
    assert f"warning: {line}" in capsys.readouterr().out
    assert f"warn  fairness  {line}" in doctor()  # of the manifest
    assert f"- warning: {line}" in report({}, dataset_warnings(run))


def save_config(network, folder, **arguments):
    with torch.device("meta"):
        network(**arguments).save_config(folder)


KL_F8 = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def test_a_published_first_stage_is_known_after_its_conversion(tmp_path):
    published = vq_config(vq_keys(128, (1, 2, 4), 2, 3, 8192), "cin256-v2", 256)
    save_config(VQModel, tmp_path / "cin256-v2" / "vqvae", **published)
    assert first_stage(str(tmp_path / "cin256-v2")) == "VQ-f4 of latent diffusion"
    save_config(VQModel, tmp_path / "codes" / "vqvae", **published | {"num_vq_embeddings": 16384})
    save_config(AutoencoderKL, tmp_path / "sd" / "vae", **KL_F8)
    save_config(AutoencoderKL, tmp_path / "sdxl" / "vae", **KL_F8, scaling_factor=0.13025)
    save_latent(tmp_path / "tiny")
    assert first_stage(str(tmp_path / "sd")) == "KL-f8 of Stable Diffusion and DiT"
    (tmp_path / "torn" / "vqvae").mkdir(parents=True)
    (tmp_path / "torn" / "vqvae" / "config.json").write_text("{")
    for name in ("codes", "sdxl", "tiny", "torn", "nowhere"):
        assert first_stage(str(tmp_path / name)) is None


def test_a_first_stage_of_the_hub_is_looked_up_in_its_cache(tmp_path, monkeypatch):
    cached = tmp_path / "models--facebook--DiT-XL-2-256"
    save_config(AutoencoderKL, cached / "snapshots" / "abc" / "vae", **KL_F8)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert first_stage("facebook/DiT-XL-2-256") == "KL-f8 of Stable Diffusion and DiT"
    assert first_stage("facebook/DiT-XL-2-512") is None


def test_openimages_under_a_first_stage_that_was_trained_on_it(tmp_path, monkeypatch, capsys):
    root = tmp_path / "openimages-and-more"  # what {root} stands for says nothing
    save_own(root)
    save_pictures(root / "others" / "open_images", 4, 20)
    lists = root / "lists"
    lists.mkdir()
    (lists / "test_openimage_o.txt").write_text("far/000.png 0\nfar/001.png 0\n")
    benchmark = own_benchmark()
    benchmark["far"] = {
        "far": {
            "source": {"kind": "list", "path": "{root}/lists/test_openimage_o.txt", "root": "{root}"},
            "splits": {"test": "rest"},
        },
        "OpenImage-O": {"source": {"kind": "folder", "path": "{root}/others"}, "splits": {"validation": "rest"}},
    }
    write_own(monkeypatch, tmp_path, benchmark)

    def warned():
        return seen_datasets(open_run(benchmark="mine", root=str(root)))

    assert warned() == []  # the denoiser is one on pixels
    save_config(VQModel, root / "denoiser" / "vqvae", **vq_config(vq_keys(128, (1, 2, 4), 2, 3, 8192), "x", 256))
    lines = warned()
    assert {line.split(":")[0] for line in lines} == {"far", "OpenImage-O"}
    assert all("\n" not in line and "VQ-f4 of latent diffusion" in line for line in lines)
    with pytest.raises(SystemExit):
        main(["doctor", "--benchmark", "mine", "--root", str(root)])
    assert f"warn  fairness  {lines[0]}" in capsys.readouterr().out
    config = root / "denoiser" / "vqvae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_vq_embeddings": 256}))
    assert warned() == []
