"""How alike the noisy latents of an inversion are to the image, by noise level: what adaptive early-stop goes by."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffguard.diffusion.sampler import Sampler
from diffguard.distances.functions import check_distances
from diffguard.metrics import bootstrap_weights, interval
from diffguard.settings import Variant, parse_settings
from tasks.common.devices import leased_device
from tasks.config.run import Run
from tasks.config.study import Curve
from tasks.models.loaded import load_models

DRAWS = 1000


def curve(run: Run, settings: Curve, place: str) -> dict[str, Any]:
    """Measure the curves on test images, with the first training seed and classifier.

    Args:
        place: the study's file, for messages.

    Returns:
        ``similarities``: {similarity: {dataset: [interval of the mean at each level]}}; ``datasets``: their roles;
        ``at``; ``difference``: {similarity: {dataset: the mean of InD images less that of an OOD dataset's at level
        ``at``, with interval}}; ``images`` of each dataset.
    """
    variant = parse_settings(Variant, settings.base, f"{place}: curve.base")
    test = run.scored[run.scored["split"] == "test"].sort_values("content_hash")
    roles = dict(test.groupby("dataset", sort=False)["role"].first())
    datasets = sorted(roles, key=lambda name: ("ind", "near", "far").index(roles[name]))
    values: dict[str, dict[str, Tensor]] = {name: {} for name in settings.similarities}
    with leased_device() as device:
        models = load_models(run, run.params.seeds[0], device)
        classifier = models.classifiers[run.params.classifiers[0]]
        sampler = Sampler.of(variant, models.denoiser, run.benchmark.image.size)
        for dataset in datasets:
            rows = test[test["dataset"] == dataset].head(settings.images)
            for name, found in _similarities(sampler, classifier, models.read(rows), settings.similarities).items():
                values[name][dataset] = found
    [ind, *ood] = datasets
    rng, draws = np.random.default_rng(0), dict[str, dict[str, Any]]()
    for dataset in datasets:
        count = len(values[settings.similarities[0]][dataset])
        weights = bootstrap_weights(rng, count, DRAWS) / count
        for name in settings.similarities:
            draws.setdefault(name, {})[dataset] = weights @ values[name][dataset].numpy()
    return {
        "at": settings.at,
        "datasets": {dataset: roles[dataset] for dataset in datasets},
        "images": {dataset: len(values[settings.similarities[0]][dataset]) for dataset in datasets},
        "similarities": {
            name: {dataset: [interval(level) for level in of.T] for dataset, of in by_dataset.items()}
            for name, by_dataset in draws.items()
        },
        "difference": {
            name: {
                dataset: interval(by_dataset[ind][:, settings.at - 1] - by_dataset[dataset][:, settings.at - 1])
                for dataset in ood
            }
            for name, by_dataset in draws.items()
        },
    }


@torch.no_grad()
def _similarities(sampler: Sampler, classifier: Any, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Of the latents at every level to the image's own, [N, levels]."""
    check_distances([name for name in names if name != "psnr"], images.shape[-1])
    latents = sampler.encode(images)
    levels = range(1, sampler.schedule.levels + 1)
    label = torch.zeros(len(images), dtype=torch.long, device=images.device)
    ends = sampler.invert(latents, list(levels), classifier, label)
    similarities = {name: sampler.similarity(name, classifier) for name in names}
    return {
        name: torch.stack([similar(end.latents, latents) for end in ends], dim=1).double().cpu()
        for name, similar in similarities.items()
    }
