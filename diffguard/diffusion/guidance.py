"""Guidance of a reconstruction: classifier-free guidance of the noise, and the classifier's clean gradient."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from diffguard.diffusion.cutouts import crop_and_resize
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser


def guided_eps(
    denoiser: Denoiser, x: Tensor, timestep: Tensor, label: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """Predict noise with classifier-free guidance (arXiv 2207.12598): eps_null + scale * (eps_label - eps_null).

    Args:
        x: latents [B, ...].
        timestep, label: int64 [B].
        mask: [B, 1, ...] of the latents' size, 1 where guidance acts; None: everywhere. Outside the mask the noise is
            unconditional (distinct semantic guidance).

    Returns:
        [B, ...].
    """
    null = torch.full_like(label, denoiser.null_label or 0)
    if not needs_both_labels(denoiser.null_label is not None, scale, mask is not None):
        return denoiser.eps(x, timestep, null if scale == 0 else label)
    both = denoiser.eps(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([null, label]))
    eps_null, eps_label = both.chunk(2)
    return mix_eps(eps_null, eps_label, scale, mask)


def needs_both_labels(has_null_label: bool, scale: float, masked: bool) -> bool:
    """Whether guidance of this scale needs the noise both with and without the label.

    Args:
        has_null_label: whether the denoiser can predict without a label.
        masked: whether guidance acts only inside a mask.
    """
    return has_null_label and scale != 0 and (scale != 1 or masked)


def mix_eps(eps_null: Tensor, eps_label: Tensor, scale: float | Tensor, mask: Tensor | None) -> Tensor:
    """Combine the noise without a label and with it to the guided noise; see `guided_eps`."""
    difference = scale * (eps_label - eps_null)
    return eps_null + (difference if mask is None else mask * difference)


@dataclass(frozen=True)
class CleanGradient:
    """The gradient of log p(label), summed over random cutouts of the estimate of the clean image.

    It does not pass through the denoiser (paper, section 3.2).

    Attributes:
        classifier: maps images in [0, 1] to logits.
        decode: maps latents to images in [0, 1], of the denoiser's size.
        scale: of the guidance.
        views: int64 [steps, cutouts, 2, input size], the rows and columns of the image in each cutout of each guided
            step; see `views_of`. None: the classifier is given the full image, at the denoiser's size.
        x0_estimate: whether the gradient is taken at the estimate of the clean image, or at the noisy one.
    """

    classifier: Classifier
    decode: Callable[[Tensor], Tensor]
    scale: float
    views: Tensor | None
    x0_estimate: bool = True

    def at(self, step: Tensor, label: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return the guide of these samples for `ddim_step`.

        Args:
            step: int64 [B], the number of guided steps that each sample has taken.
            label: int64 [B], the label to guide to.
        """
        return lambda x, x0, alpha_bar: self.scale * self(x, x0, alpha_bar, step, label)

    def __call__(self, x: Tensor, x0: Tensor, alpha_bar: Tensor, step: Tensor, label: Tensor) -> Tensor:
        """Compute the gradient at x_in = f * x0 + (1 - f) * x, f = sqrt(1 - alpha_bar).

        Args:
            x, x0: latents and the unclamped estimate of the clean latents, [B, ...].
            alpha_bar: float64 [B], of the noise level of x.
            step, label: see `at`.

        Returns:
            [B, ...].
        """
        x_in = self.gradient_input(x, x0, alpha_bar).detach().requires_grad_()
        with torch.enable_grad():
            images = self.decode(x_in)
            leaf, total = images.detach().requires_grad_(), torch.zeros_like(images)
            # Only one cutout's graph is in memory at a time.
            for view in self.views_at(leaf, step):
                logp = self.classifier(view).log_softmax(dim=1).gather(1, label[:, None]).sum()
                total += torch.autograd.grad(logp, leaf)[0]
            [gradient] = torch.autograd.grad(images, x_in, total)
        return gradient

    def gradient_input(self, x: Tensor, x0: Tensor, alpha_bar: Tensor) -> Tensor:
        """Return the latents x_in at which the gradient is taken."""
        if not self.x0_estimate:
            return x
        f = (1 - alpha_bar).sqrt().to(x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        return f * x0 + (1 - f) * x

    def views_at(self, images: Tensor, step: Tensor) -> Iterator[Tensor]:
        """Yield the classifier's inputs: one cutout of each sample at a time, [B, C, H, W]."""
        if self.views is None:
            yield images
            return
        for view in self.views[step.to(self.views.device)].unbind(dim=1):
            yield crop_and_resize(images, view)


def oracle_label(kind: str, true_label: int, num_classes: int, key: str, seed: int = 0) -> int | None:
    """Return the label that a variant's ``label`` setting guides to; None: the classifier's prediction.

    The oracle settings give an upper bound of the method.

    Args:
        kind: "predicted", "oracle" or "oracle-ind"; see `Variant`.
        true_label: negative for OOD images.
        key: content hash of the image; the random label of an OOD image depends only on it and on the seed.
    """
    if kind == "predicted" or (kind == "oracle-ind" and true_label < 0):
        return None
    if true_label >= 0:
        return true_label
    return int(sha256(f"{seed}:{key}".encode()).hexdigest(), 16) % num_classes
