"""Activations inside a denoiser: pooled outputs of one block, under a Gaussian of independent channels.

arXiv 2605.11014: one evaluation of the network, at the start of an inversion that is made anyway, with no label. The
Gaussian is fitted on the denoiser's training images, as that of a path is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.models.denoisers.base import Denoiser, networks_of
from diffguard.models.modules import find_module
from diffguard.settings import ActivationGaussian

LEAST_IMAGES = 8
"""Fewer do not make a variance."""

LEAST_SHARE = 1e-4
"""Least variance of a channel, as a share of the mean one: channels that hardly vary must not decide."""


@contextmanager
def captured(denoiser: Denoiser, block: str) -> Iterator[list[Tensor]]:
    """While it is open, the pooled outputs [B, C] of a block come into the list, one for each network call.

    Raises:
        SettingError: see `find_block`.
    """
    outputs: list[Tensor] = []
    hook = find_block(denoiser, block).register_forward_hook(lambda _, __, output: outputs.append(pooled(output)))
    try:
        yield outputs
    finally:
        hook.remove()


def pooled(output: Any) -> Tensor:
    """The mean over space, or over tokens, of what a block outputs, float32 [B, C]; of several tensors, of the first.

    Args:
        output: [B, C, h, w], [B, tokens, C] or [B, C].
    """
    values: Tensor = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
    if values.ndim == 4:
        values = values.mean(dim=(2, 3))
    elif values.ndim == 3:
        values = values.mean(dim=1)
    return values.float()


def find_block(denoiser: Any, block: str) -> nn.Module:
    """A module of the denoiser's predicting network by its dotted name.

    Raises:
        SettingError: there is no such module.
    """
    network = next(iter(networks_of(denoiser).values()), nn.Module())
    return find_module(network, block, "activations.block", "the denoiser's network")


def fit_activations(settings: ActivationGaussian, activations: Tensor) -> ActivationGaussian:
    """Fit a Gaussian of independent channels to the activations of InD images.

    Args:
        activations: [N, C].

    Raises:
        SettingError: there are fewer than `LEAST_IMAGES`.
    """
    if len(activations) < LEAST_IMAGES:
        raise SettingError(
            f"distance denoiser-activations: its Gaussian is fitted on at least {LEAST_IMAGES} images; "
            f"there are {len(activations)}"
        )
    values = activations.double()
    variance = values.var(dim=0)
    variance = variance.clamp(min=max(LEAST_SHARE * float(variance.mean()), 1e-12))
    return ActivationGaussian(block=settings.block, mean=values.mean(dim=0).tolist(), variance=variance.tolist())


def activation_score(gaussian: ActivationGaussian, activations: Tensor) -> Tensor:
    """Return the negative log-likelihood without its constant, per channel.

    Args:
        activations: [B, C].

    Returns:
        float64 [B], at least 0; higher = more OOD.
    """
    mean, variance = (torch.tensor(values, dtype=torch.float64) for values in (gaussian.mean, gaussian.variance))
    return ((activations.cpu().double() - mean).square() / variance).mean(dim=1) / 2
