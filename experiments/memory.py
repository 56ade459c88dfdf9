"""Peak memory of scoring many small images: does it grow with the dataset?

    python experiments/memory.py [--images 100000]

Letters of the benchmark `glyphs`, 16x16, through the pipeline's own scoring stage: PNG files, manifest,
shards; a small denoiser with random weights. The process's peak resident memory is read as shards end.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
import yaml
from diffusers import UNet2DModel
from peak_memory import peak_memory

import tasks.config.project
import tasks.config.run
import tasks.prepare.stage
from diffguard.models.classifiers.files import save_classifier
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.loading import save_denoiser
from diffguard.models.denoisers.noise_schedule import make_scheduler
from diffguard.models.denoisers.pixel import PixelDenoiser
from tasks.config.benchmark import load_benchmark
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.prepare.stage import prepare
from tasks.score.plan import plan
from tasks.score.stage import score_shards


def make_project(root: Path, images: int) -> None:
    """A project folder with so many images to score and untrained models."""
    (root / "data" / "benchmarks").mkdir(parents=True)
    glyphs = yaml.safe_load((ROOT / "data" / "benchmarks" / "glyphs.yaml").read_text())
    [ind] = glyphs["ind"].values()
    ind["splits"] = {"train": 26, "calibration": 520, "validation": 26, "test": images - 676}
    glyphs["near"] = {"numerals": {**glyphs["near"]["numerals"], "splits": {"test": 130}}}
    glyphs["far"] = {}
    (root / "data" / "benchmarks" / "glyphs.yaml").write_text(yaml.safe_dump(glyphs))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"benchmark": "glyphs", "classifiers": ["ordinary"]}
    chosen = ("cfg-w1", "cfg-early-stop")
    params["score"]["variants"] = {name: params["score"]["variants"][name] for name in chosen}
    params["score"]["baselines"], params["combine"] = {}, {}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for module in (tasks.config.project, tasks.prepare.stage, tasks.config.run):
        module.ROOT = root
    prepare(load_benchmark("glyphs"), root / "data" / "glyphs", seed=0)
    torch.manual_seed(0)
    models = root / "data" / "glyphs" / "models" / "seed-0"
    kind = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 14}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, **kind, **blocks)
    save_denoiser(PixelDenoiser(unet, make_scheduler("squaredcos_cap_v2", 1e-4, 0.02)), models / "denoiser")
    (models / "ordinary").mkdir()
    save_classifier(ConvClassifier(13, width=8), models / "ordinary" / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        make_project(root, options.images)
        run = open_run()
        measured: list[tuple[int, float]] = []

        def note(images: int) -> None:
            measured.append(((measured[-1][0] if measured else 0) + images, peak_memory(torch.device("cpu"))))
            if len(measured) % 40 == 0:
                print(f"{measured[-1][0]} images: {measured[-1][1]:.0f} MiB", flush=True)

        started = time.perf_counter()
        score_shards(run, plan(run), range(run.shards), "cpu", note)
        seconds = time.perf_counter() - started
        first, last = max(memory for images, memory in measured if images <= 1280), measured[-1][1]
        print(
            f"{measured[-1][0]} images in {seconds:.0f} s; peak resident memory {first:.0f} MiB after the first 1,000, "
            f"{last:.0f} MiB at the end ({last / first - 1:+.1%})"
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
