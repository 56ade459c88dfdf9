"""Fitting a variant on InD images before it scores: thresholds of its stop, densities of its path or activations."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from diffguard.diffusion.activations import captured, fit_activations
from diffguard.diffusion.path_statistics import fit_path
from diffguard.diffusion.sampler import Sampler
from diffguard.engine import Engine, Request, Sample
from diffguard.models.classifiers.base import Classifier, predict_logits
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import ACTIVATIONS, STANDARD_PATH, AdaptiveStop, Variant
from diffguard.utils.finite import check_scores
from diffguard.utils.memory import MemorySafeBatches


def fit_variant(
    variant: Variant,
    denoiser: Denoiser,
    classifier: Classifier,
    batches: Iterable[Tensor],
    train: Iterable[Tensor] = (),
    *,
    slots: int = 256,
) -> Variant:
    """Fit a variant on InD images: the thresholds of an adaptive stop, the density of a path or of activations.

    Each null threshold becomes the median, over the calibration images, of its similarity at noise level
    ``median_at``.

    Args:
        batches: calibration images, [B, C, H, W] in [0, 1].
        train: other InD images, likewise, from which no threshold of scores comes; densities are fitted on them.
        slots: most images in a network evaluation; halved whenever the device runs out of memory.

    Returns:
        The variant with all thresholds, the path and the activations set.

    Raises:
        SettingError: there are too few images to fit a density, or the denoiser has no such block.
        NotFiniteError: a similarity, or a statistic of a path, is NaN or infinite.
    """
    with_stop = _fit_stop(variant, denoiser, classifier, batches, slots)
    if not with_stop.needs_train:
        return with_stop
    if variant.distance == ACTIVATIONS:
        return _fit_activations(variant, denoiser, train, slots)
    unfitted = Request(classifier, with_stop.model_copy(update={"path": STANDARD_PATH}))
    engine = Engine(denoiser, [unfitted], slots=slots)
    by_row = dict(engine.run(Sample(row, image) for row, image in enumerate(chain.from_iterable(train))))
    paths = torch.tensor([by_row[row][0].path for row in range(len(by_row))], dtype=torch.float64).view(-1, 6)
    check_scores(paths.abs().sum(dim=1).numpy(), "distance path")
    return with_stop.model_copy(update={"path": fit_path(paths, variant.path_components)})


@torch.no_grad()
def _fit_activations(variant: Variant, denoiser: Denoiser, train: Iterable[Tensor], slots: int) -> Variant:
    settings, activations = variant.activation_gaussian, list[Tensor]()

    def measure(images: list[Tensor]) -> None:
        batch = torch.stack(images).to(denoiser.device)
        sampler = Sampler.of(variant, denoiser, batch.shape[-1])
        timestep = torch.full((len(batch),), sampler.schedule.inversion.timesteps[0], device=batch.device)
        label = torch.full_like(timestep, denoiser.null_label or 0)
        with captured(sampler.denoiser, settings.block) as outputs:
            sampler.denoiser.eps(sampler.encode(batch), timestep, label)
        activations.append(torch.cat(outputs).cpu())

    safe_batches = MemorySafeBatches(slots, denoiser.device)
    for images in train:
        safe_batches.run(measure, list(images))
    values = torch.cat(activations) if activations else torch.empty(0, 1)
    return variant.model_copy(update={"activations": fit_activations(settings, values)})


def _fit_stop(
    variant: Variant, denoiser: Denoiser, classifier: Classifier, batches: Iterable[Tensor], slots: int
) -> Variant:
    stop = variant.stop
    if not isinstance(stop, AdaptiveStop) or stop.median_at is None:
        return variant
    level = stop.median_at
    similarities: dict[str, list[Tensor]] = {name: [] for name, value in stop.thresholds.items() if value is None}

    def measure(images: list[Tensor]) -> None:
        batch = torch.stack(images).to(denoiser.device)
        sampler = Sampler.of(variant, denoiser, batch.shape[-1])
        latents = sampler.encode(batch)
        label = predict_logits(classifier, batch).argmax(dim=1)
        [end] = sampler.invert(latents, [level], classifier, label, variant.inversion_scale)
        measured = {name: sampler.similarity(name, classifier)(end.latents, latents) for name in similarities}
        for name, values in measured.items():
            similarities[name].append(values)

    safe_batches = MemorySafeBatches(slots, denoiser.device)
    for images in batches:
        safe_batches.run(measure, list(images))
    values_by_name = {name: torch.cat(parts) for name, parts in similarities.items()}
    for name, values in values_by_name.items():
        check_scores(values.cpu().numpy(), f"stop.thresholds.{name}")
    medians = {name: float(values.median()) for name, values in values_by_name.items()}
    fitted = stop.model_copy(update={"thresholds": {**stop.thresholds, **medians}, "median_at": None})
    return variant.model_copy(update={"stop": fitted})
