"""The published implementation's schedule of network calls, for comparison only.

Inversion evaluates the network on the full batch until the slowest image has stopped; from there on images are denoised
alone when they stop by themselves; a guided step evaluates it twice, once for the noise and once, again at the
same place, for the estimate that the gradient is taken at. The arithmetic is the library's own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguard.diffusion.ddim import ddim_step
from diffguard.diffusion.early_stop import last_level, stops_here
from diffguard.diffusion.sampler import Sampler
from diffguard.distances.functions import get_distance
from diffguard.models.classifiers.base import Classifier, predict_logits
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import AdaptiveStop, ClassifierGuidance, Variant


@dataclass
class Counts:
    """Calls of the network, and images in them."""

    calls: int = 0
    image_forwards: int = 0


class Counting:
    """A denoiser that counts."""

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser, self.counts = denoiser, Counts()

    def __getattr__(self, name: str) -> object:
        return getattr(self._denoiser, name)

    def eps(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        self.counts.calls += 1
        self.counts.image_forwards += len(x)
        return self._denoiser.eps(x, timestep, label)


@torch.no_grad()
def published_scores(
    images: Tensor, denoiser: Denoiser, classifier: Classifier, variant: Variant, denoise_batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scores and stop levels of a batch, by the published schedule.

    Args:
        denoise_batch: how many images are denoised together; None: one where they stop by themselves.
    """
    assert isinstance(variant.guidance, ClassifierGuidance)
    sampler = Sampler.of(variant, denoiser, images.shape[-1])
    label = predict_logits(classifier, images).argmax(dim=1)
    reference = sampler.encode(images)
    latents, level = _invert(sampler, reference, variant, classifier)
    size = denoise_batch or (1 if isinstance(variant.stop, AdaptiveStop) else len(images))
    scores = []
    for first in range(0, len(images), size):
        part = slice(first, first + size)
        pair = _denoise(sampler, latents[part], level[part], label[part], variant, classifier, alone=size == 1)
        made, without = (sampler.decode(each) for each in pair)
        against = without if variant.against == "unconditional" else images[part]
        scores.append(get_distance(variant.distance)(against, made, classifier))
    return torch.cat(scores), level


def _invert(sampler: Sampler, latents: Tensor, variant: Variant, classifier: Classifier) -> tuple[Tensor, Tensor]:
    names = variant.stop.thresholds if isinstance(variant.stop, AdaptiveStop) else {}
    similarities = {name: sampler.similarity(name, classifier) for name in names}
    x, ends = latents, latents.clone()
    level = torch.zeros(len(x), dtype=torch.long)
    nothing = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for move in range(last_level(variant.stop)):
        k = torch.full((len(x),), move)
        eps = sampler.denoiser.eps(x, sampler.schedule.inversion.timestep[k].to(x.device), nothing)
        clip = torch.full_like(k, sampler.clip and move > 0, dtype=torch.bool)
        x, _ = ddim_step(x, eps, sampler.schedule.inversion, k, clip=clip)
        stopping = stops_here(variant.stop, k + 1, x, latents, similarities) & (level == 0)
        ends[stopping], level[stopping] = x[stopping], move + 1
        if level.all():
            break
    return ends, level


def _denoise(
    sampler: Sampler,
    latents: Tensor,
    level: Tensor,
    label: Tensor,
    variant: Variant,
    classifier: Classifier,
    *,
    alone: bool,
) -> tuple[Tensor, Tensor]:
    assert isinstance(variant.guidance, ClassifierGuidance)
    gradient = sampler.clean_gradient(variant.guidance, classifier)
    [start] = {int(each) for each in sampler.schedule.start(level, variant.forback_skip_diff, variant.skip_first_steps)}
    guided, without = latents, latents
    both = variant.against == "unconditional"
    for move in range(start, -1, -1):
        k = torch.full((len(latents),), move)
        timestep = sampler.schedule.denoising.timestep[k].to(latents.device)
        clip = torch.full_like(k, sampler.clip, dtype=torch.bool)

        def ask(x: Tensor, timestep: Tensor = timestep) -> Tensor:
            return sampler.denoiser.eps(x, timestep.repeat(len(x) // len(timestep)), torch.zeros_like(label))

        if both and alone:
            eps, eps_without = ask(torch.cat([guided, without])).chunk(2)
        else:
            eps, eps_without = ask(guided), ask(without) if both else None
        if variant.guidance.x0_estimate:
            ask(guided)  # the second time at the same place
        guide = gradient.at(start - k, label)
        guided, _ = ddim_step(guided, eps, sampler.schedule.denoising, k, clip=clip, guide=guide)
        if eps_without is not None:
            without, _ = ddim_step(without, eps_without, sampler.schedule.denoising, k, clip=clip)
    return guided, without
