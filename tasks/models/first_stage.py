"""Published autoencoders of latent denoisers: whether a benchmark's OOD images come from what they were trained on."""

import json
import re
from pathlib import Path
from typing import Any

from diffguard.settings import PretrainedDenoiser
from tasks.config.benchmark import Dataset, load_benchmark
from tasks.config.run import Run

FIRST_STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "VQ-f4 of latent diffusion": (
        "vqvae",
        {"block_out_channels": [128, 256, 512], "latent_channels": 3, "num_vq_embeddings": 8192},
    ),
    # Its fine-tuned versions changed the decoder alone. That of SDXL has the same shape and another scaling factor.
    "KL-f8 of Stable Diffusion and DiT": (
        "vae",
        {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "scaling_factor": 0.18215},
    ),
}
"""Autoencoders that were trained on OpenImages (arXiv 2112.10752, table 8): folder and what its config.json says.

A converted checkpoint keeps no name; its architecture is what it is known by.
"""


def first_stage(path: str) -> str | None:
    """The published autoencoder of a denoiser in Diffusers' layout, by its architecture; None: another one, or none.

    Args:
        path: a folder, or a hub id, which is looked up in the hub's cache alone.
    """
    for name, (part, published) in FIRST_STAGES.items():
        config = {"scaling_factor": 0.18215, **_config(path, part)}  # old files leave out Diffusers' default
        if all(config.get(key) == value for key, value in published.items()):
            return name
    return None


def seen_datasets(run: Run) -> list[str]:
    """Return a warning for each OOD dataset of OpenImages' if the denoiser's first stage was trained on OpenImages.

    A dataset is known by its name, or by the places that the benchmark's file gives.
    """
    spec = run.benchmark.denoiser
    if not isinstance(spec, PretrainedDenoiser):
        return []
    # As the file has it: what {root} stands for says nothing about a dataset.
    datasets = load_benchmark(run.benchmark.name).ood
    names = [name for name, dataset in datasets.items() if _is_openimages(name, dataset)]
    if not names or (stage := first_stage(spec.path)) is None:
        return []
    return [
        f"{name}: the denoiser's first stage ({stage}, by its architecture) was trained on OpenImages, where this "
        "dataset comes from: it may reconstruct these images too well; report them apart, or compare with a denoiser "
        "on pixels"
        for name in names
    ]


def _is_openimages(name: str, dataset: Dataset) -> bool:
    places = [getattr(part.source, key, "") for part in dataset.parts for key in ("path", "root", "name")]
    return any("openimage" in re.sub(r"[\W_]", "", text.lower()) for text in (name, *places))


def _config(path: str, part: str) -> dict[str, Any]:
    """A part's config.json; {} if it is not there, or not readable: opening the denoiser says so."""
    file = Path(path) / part / "config.json" if Path(path).is_dir() else _cached(path, f"{part}/config.json")
    if file is None:
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _cached(path: str, name: str) -> Path | None:
    """A file of a hub id in the hub's cache; None: it is not there."""
    from huggingface_hub import try_to_load_from_cache

    from diffguard.models.denoisers.loading import is_id

    file = try_to_load_from_cache(path, name) if is_id(path) else None
    return Path(file) if isinstance(file, str) else None
