"""What a run's denoiser knows and costs: its accuracy as a classifier, its size, its operations."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from diffguard.models.denoisers.base import Denoiser, networks_of
from diffguard.settings import TrainedDenoiser
from diffguard.training.previews import labels_as_classifier
from tasks.common.devices import leased_device
from tasks.config.run import Run
from tasks.models.loaded import load_models

BACKWARD = 2
"""Operations of a backward pass, as a multiple of the forward pass's."""


@dataclass(frozen=True)
class Costs:
    """Of one network call with one image, and of a training.

    Attributes:
        parameters: of its networks.
        macs: multiply-accumulates of a call that predicts the noise of one image.
        training_macs: of its training here, forward and backward; NaN: it was trained elsewhere.
    """

    parameters: float
    macs: float
    training_macs: float


def correct_as_classifier(run: Run, split: str) -> list[NDArray[np.float64]] | None:
    """Whether the denoiser, as a classifier, gives each InD image of a split its label; by training seed.

    Returns:
        Arrays of 0 and 1; None: it takes no labels, or the split has no InD images.
    """
    rows = run.scored[(run.scored["split"] == split) & (run.scored["role"] == "ind")]
    found = []
    with leased_device() as device:
        for seed in run.params.seeds:
            models = load_models(run.unchanged, seed, device)
            if not models.denoiser.num_labels or rows.empty:
                return None
            labels = labels_as_classifier(models.denoiser, models.read(rows)).numpy()
            found.append((labels == rows["label"].to_numpy()).astype(float))
    return found


def costs(run: Run) -> Costs:
    """What the denoiser of the first training seed costs."""
    with leased_device() as device:
        denoiser = load_models(run.unchanged, run.params.seeds[0], device).denoiser
        parameters = sum(each.numel() for network in networks_of(denoiser).values() for each in network.parameters())
        macs = _macs(denoiser)
    spec = run.benchmark.denoiser
    is_trained = isinstance(spec, TrainedDenoiser)
    images = spec.iterations * spec.batch_size if isinstance(spec, TrainedDenoiser) else 0
    return Costs(parameters, macs, (1 + BACKWARD) * macs * images if is_trained else np.nan)


@torch.no_grad()
def _macs(denoiser: Denoiser) -> float:
    x = denoiser.encode(torch.zeros(1, *denoiser.image_shape, device=denoiser.device))
    zero = torch.zeros(1, dtype=torch.long, device=x.device)
    with FlopCounterMode(display=False) as counter:
        denoiser.eps(x, zero, zero)
    return counter.get_total_flops() / 2
