"""Denoising errors: what a denoiser that is told labels knows of them, without a trajectory.

An image x_0 is brought to noise level t by x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, and the error under a label c is
the mean over the latents' elements of (eps - eps_theta(x_t, t, c))^2. The noise is the same under every label, so
that errors of one image differ by the label alone: an image is as hard to denoise under one label as under another,
and what its complexity adds to both goes away in their difference.

- `label_gain` compares the predicted label with none: the mean over levels and draws of the log-ratio of their errors.
- `posterior_odds` takes the denoiser for a classifier (diffusion classifier, arXiv 2303.16203, equation 4): the
  posterior of a label is the softmax over labels of minus the expected sum of squared errors.

Here are the plain formulas; `diffguard.engine` evaluates the network for many images at once.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_PAIRS = 3
"""Noisy images from which on labels are given up: fewer have no standard error to speak of."""


def content_of(image: Tensor) -> bytes:
    """What decides the noise of an image [C, H, W] in [0, 1]: a hash of its pixels, as 8-bit values."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()
    return hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()


def paired_noise(content: bytes, seed: int, draw: int, timestep: int, shape: Sequence[int]) -> Tensor:
    """The noise of one draw at one timestep: of an image's content and the seed alone.

    Args:
        content: see `content_of`.
        shape: of the latents of one image.

    Returns:
        Standard normal, float32, of this shape, on the CPU.
    """
    digest = hashlib.blake2b(content + struct.pack("<qqq", seed, draw, timestep), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    return torch.randn(tuple(shape), generator=generator)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t of latents and noise [B, ...] at noise levels alpha_bar, float64 [B]."""
    shape = (-1, *[1] * (latents.ndim - 1))
    signal, sigma = (root.to(latents.device, latents.dtype).view(shape) for root in _roots(alpha_bar))
    return signal * latents + sigma * noise


def denoising_error(eps: Tensor, noise: Tensor) -> Tensor:
    """The mean squared error of predicted noise [B, ...], float32 [B]."""
    return (eps.float() - noise.float()).square().flatten(1).mean(dim=1)


def label_gain(under_label: Tensor, under_none: Tensor, weights: Tensor) -> Tensor:
    """How much worse an image is denoised under its predicted label than under none.

    Args:
        under_label, under_none: errors [B, pairs], above 0, of the same noisy images.
        weights: of the pairs [pairs], at least 0.

    Returns:
        float64 [B]: the weighted mean of their log-ratio; higher = more OOD, 0: the label changes nothing.
    """
    ratios = under_label.double().log() - under_none.double().log()
    return (ratios * weights).sum(dim=-1) / weights.sum()


def posterior_odds(errors: Tensor, label: Tensor, weights: Tensor, elements: int) -> Tensor:
    """The log-odds of the denoiser's posterior against a label.

    Log-odds, since a posterior so close to 1 that it rounds to it would rank no image.

    Args:
        errors: [B, labels, pairs]; infinite under labels that were given up.
        label: int64 [B], an index of the labels.
        weights: of the pairs [pairs], at least 0.
        elements: of an image's latents: the posterior is of the sum of squared errors.

    Returns:
        float64 [B]: log (1 - p) / p of the label's posterior p; higher = more OOD.
    """
    logits = -elements * (errors.double() * weights).sum(dim=-1) / weights.sum()
    own = logits.gather(1, label[:, None])
    others = logits.scatter(1, label[:, None], -torch.inf)
    odds: Tensor = others.logsumexp(dim=1) - own[:, 0]
    return odds


def hopeless(errors: Tensor, weights: Tensor, limit: float) -> Tensor:
    """Which labels the noisy images so far leave no hope to be the best.

    Args:
        errors: [labels, pairs] of one image.
        weights: [pairs].
        limit: standard errors of the paired difference to the best label.

    Returns:
        bool [labels]; the two best are never hopeless, nor is any before there are `LEAST_PAIRS`.
    """
    pairs = errors.shape[1]
    if pairs < LEAST_PAIRS:
        return torch.zeros(len(errors), dtype=torch.bool)
    weighted = errors.double() * weights
    order = weighted.sum(dim=1).argsort()
    difference = weighted - weighted[order[0]]
    standard_error = difference.std(dim=1) / pairs**0.5
    is_hopeless: Tensor = difference.mean(dim=1) > limit * standard_error
    is_hopeless[order[:2]] = False
    return is_hopeless


def _roots(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
