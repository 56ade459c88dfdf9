"""What steers a reconstruction: how noise is predicted under a label, and the classifier's gradient."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguard.classifiers import Classifier
from diffguard.denoisers import Denoiser

Crop = tuple[int, int, int]
"""size, x offset, y offset of a square cutout, in pixels."""


def guided_eps(
    denoiser: Denoiser, x: Tensor, timestep: Tensor, label: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    """Noise under classifier-free guidance: eps_null + scale * (eps_label - eps_null).

    Args:
        x: latents [B, ...]. timestep, label: int64 [B].
        mask: [B, 1, ...] of the latents' size, 1 where guidance acts; None: everywhere. Outside it
            the noise is unconditional (distinct semantic guidance).
    """
    if denoiser.null_label is None or (scale == 1 and mask is None):
        return denoiser.eps(x, timestep, label)
    null = torch.full_like(label, denoiser.null_label)
    if scale == 0:
        return denoiser.eps(x, timestep, null)
    both = denoiser.eps(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([null, label]))
    eps_null, eps_label = both.chunk(2)
    step = scale * (eps_label - eps_null)
    return eps_null + (step if mask is None else mask * step)


@dataclass(frozen=True)
class CleanGradient:
    """Gradient of log p(label), summed over random cutouts of the estimate of the clean image.

    It stops at its input: it does not pass through the denoiser (paper, section 3.2).

    Attributes:
        decode: latents to images in [0, 1], of the denoiser's size.
        label: int64 [B].
        scale: of the guidance.
        crops: for each guided step, its cutouts; see `draw_crops`. None: the classifier sees the
            whole image, of the denoiser's size.
        cutout_size: side to which each cutout is resized, in pixels.
        input_size: side that the classifier sees; a second resize leads there.
        x0_estimate: take the gradient at the estimate of the clean image, not at the noisy one.
    """

    classifier: Classifier
    decode: Callable[[Tensor], Tensor]
    label: Tensor
    scale: float
    crops: list[list[Crop]] | None
    cutout_size: int
    input_size: int
    x0_estimate: bool = True

    def __call__(self, x: Tensor, x0: Tensor, abar: Tensor, step: int, rows: Tensor) -> Tensor:
        """The gradient at x_in = f * x0 + (1 - f) * x, f = sqrt(1 - abar), for the samples in rows.

        Args:
            x, x0: latents and the unclamped estimate of the clean ones, [len(rows), ...].
            abar: float64 scalar, of x's level.
            step: how many guided steps these samples have made before.
        """
        f = float((1 - abar).sqrt())
        x_in = (f * x0 + (1 - f) * x if self.x0_estimate else x).detach().requires_grad_()
        with torch.enable_grad():
            logp = x_in.new_zeros(())
            for seen in self._views(self.decode(x_in), step):
                picked = self.classifier(seen).log_softmax(dim=1).gather(1, self.label[rows, None])
                logp = logp + picked.sum()
            [gradient] = torch.autograd.grad(logp, x_in)
        return gradient

    def _views(self, images: Tensor, step: int) -> Iterator[Tensor]:
        if self.crops is None:
            yield images
            return
        for crop in self.crops[step]:
            yield F.interpolate(cut(images, crop, self.cutout_size), size=self.input_size, mode="nearest")


def cut(images: Tensor, crop: Crop, size: int) -> Tensor:
    """A square crop of each image, resized to `size` by nearest neighbour."""
    side, ox, oy = crop
    return F.interpolate(images[:, :, oy : oy + side, ox : ox + side], size=size, mode="nearest")


def draw_crops(steps: int, cutouts: int, side: int, cutout_size: int, seed: int) -> list[list[Crop]]:
    """The cutouts of each guided step, the same for every image, from a generator of their own.

    As published: size int(u * (side - c) + c) with u uniform in [0, 1), then the x, then the y
    offset, uniform integers.
    """
    generator = torch.Generator().manual_seed(seed)
    largest, smallest = side, min(side, cutout_size)

    def one() -> Crop:
        size = int(torch.rand([], generator=generator) * (largest - smallest) + smallest)
        ox = int(torch.randint(0, side - size + 1, (), generator=generator))
        oy = int(torch.randint(0, side - size + 1, (), generator=generator))
        return size, ox, oy

    return [[one() for _ in range(cutouts)] for _ in range(steps)]
