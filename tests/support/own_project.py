"""A project of someone's own: pictures in folders, and a benchmark file that names them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from small_project import work_in, write_params
from tiny_models import SIDE, save_conditional

from diffguard.models.classifiers.files import save_classifier
from diffguard.models.classifiers.small import ConvClassifier

CLASSES = ["cat", "dog", "fish", "tree"]


def save_pictures(folder: Path, count: int, seed: int, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> None:
    """Different pictures: a colour of their own with noise on it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, 3) // 2 + rng.integers(0, 128, (*size, 3))
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{number:03d}.png")


def save_own(root: Path) -> None:
    """Pictures of four classes and of two others, a classifier and a denoiser."""
    for number, name in enumerate(CLASSES):
        save_pictures(root / "ind" / name, 14, number)
    save_pictures(root / "near", 6, 10)
    save_pictures(root / "far", 6, 11)
    save_conditional(root / "denoiser", len(CLASSES))
    torch.manual_seed(0)
    classifier = ConvClassifier(len(CLASSES), width=4, in_channels=3).eval()
    save_classifier(classifier, root / "classifier.safetensors")


@contextmanager
def with_code(root: Path, **modules: str) -> Iterator[Path]:
    """The folder with modules of someone's own in it, which can be imported."""
    for name, code in modules.items():
        (root / f"{name}.py").write_text(code)
    sys.path.insert(0, str(root))
    try:
        yield root
    finally:
        sys.path.remove(str(root))


def own_benchmark() -> dict:
    return {
        "name": "mine",
        "image": {"size": SIDE, "mode": "RGB"},
        "ind": {
            "animals": {
                "source": {"kind": "folder", "path": "{root}/ind"},
                "splits": {"train": 16, "calibration": 24, "test": "rest"},
            }
        },
        "near": {"near": {"source": {"kind": "folder", "path": "{root}/near"}, "splits": {"test": "rest"}}},
        "far": {"far": {"source": {"kind": "folder", "path": "{root}/far"}, "splits": {"test": "rest"}}},
        "classifiers": {"mine": {"kind": "file", "path": "{root}/classifier.safetensors"}},
        "denoiser": {"kind": "pretrained", "path": "{root}/denoiser"},
        "variants": {
            "cam": {"stop": 2, "guidance": {"kind": "label", "scale": 2, "cam_cut": 0.3}, "distance": "l1"},
            "unconditional": {"stop": 2, "guidance": {"kind": "none"}, "distance": "l1"},
            "classifier-guided": {
                "stop": 2,
                "guidance": {"kind": "classifier", "cutouts": 2, "cutout_size": 8},
                "distance": "l1",
                "against": "unconditional",
            },
        },
        "detectors": ["cam", "msp", "knn"],
        "default": "cam",
    }


def write_own(patch, project: Path, benchmark: dict) -> None:
    """A project folder whose benchmark is this one, beside params.yaml's."""
    (project / "data" / "benchmarks").mkdir(parents=True, exist_ok=True)
    write_params(project)
    (project / "data" / "benchmarks" / "mine.yaml").write_text(yaml.safe_dump(benchmark))
    work_in(patch, project)
