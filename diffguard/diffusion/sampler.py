"""How a variant samples: a denoiser under its schedule, sizes, clamping, solver and precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from diffguard.diffusion.cutouts import draw_crops, views_of
from diffguard.diffusion.early_stop import Similarity, psnr
from diffguard.diffusion.guidance import CleanGradient
from diffguard.diffusion.path_statistics import path_gaps
from diffguard.diffusion.reference import Inverted, invert
from diffguard.diffusion.resizing import Sizing
from diffguard.diffusion.schedules import SCHEDULES, Schedule
from diffguard.distances.functions import get_distance
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser, in_precision
from diffguard.settings import AdaptiveStop, ClassifierGuidance, Variant
from diffguard.utils.precision import resolve_precision


@dataclass(frozen=True)
class Sampler:
    """A denoiser under the settings that variants share: its schedule, sizes, clamping and precision."""

    denoiser: Denoiser
    schedule: Schedule
    sizing: Sizing
    clip: bool
    solver: str
    precision: str

    @classmethod
    def of(cls, variant: Variant, denoiser: Denoiser, input_size: int) -> "Sampler":
        """The sampler that a variant describes, for images of this side in pixels."""
        precision = variant.precision
        if precision == "auto":
            precision = resolve_precision(precision, denoiser.device)
        return cls(
            in_precision(denoiser, precision),
            SCHEDULES[variant.grid](denoiser.alphas_cumprod, variant.levels),
            Sizing(variant.process_method, input_size, denoiser.image_shape[-1]),
            variant.clip,
            variant.solver,
            precision,
        )

    @cached_property
    def gaps(self) -> Tensor:
        """float64 [K]: between the steps of inversion; see `path_gaps`."""
        return path_gaps(self.schedule.inversion.timestep, len(self.denoiser.alphas_cumprod))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] at the input size to latents."""
        return self.denoiser.encode(self.sizing.to_model(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images [B, C, H, W] in [0, 1] at the input size.

        As published, what a latent model decodes is clamped before it is brought to that size, and a pixel model's
        images after it.
        """
        images = self.denoiser.decode(latents)
        if images.shape != latents.shape:
            images = images.clamp(0, 1)
        return self.sizing.to_input(images).clamp(0, 1)

    def invert(
        self,
        latents: Tensor,
        stops: Sequence[int | AdaptiveStop],
        classifier: Classifier,
        label: Tensor,
        scale: float | None = None,
    ) -> list[Inverted]:
        """`invert` under guidance of this scale toward the label, or None: without a label."""
        names = {name for stop in stops if isinstance(stop, AdaptiveStop) for name in stop.thresholds}
        return invert(
            self.denoiser,
            latents,
            self.schedule,
            stops,
            clip=self.clip,
            label=None if scale is None else label,
            scale=1.0 if scale is None else scale,
            solver=self.solver,
            similarities={name: self.similarity(name, classifier) for name in names},
        )

    def similarity(self, name: str, classifier: Classifier) -> Similarity:
        """How alike latents are: psnr, or 1 - a distance of the images that they are, not clamped."""
        if name == "psnr":
            return lambda x, reference: psnr(self.sizing.crop(x), self.sizing.crop(reference))
        distance = get_distance(name)

        def similar(x: Tensor, reference: Tensor) -> Tensor:
            images, others = (self.sizing.crop(self.denoiser.decode(latents)) for latents in (x, reference))
            return 1 - distance(images, others, classifier)

        return similar

    def clean_gradient(self, guidance: ClassifierGuidance, classifier: Classifier) -> CleanGradient:
        """The gradient that a guidance asks for; its cutouts depend on the number of guided steps alone."""
        sizing, views = self.sizing, None
        if guidance.cutouts is not None and guidance.cutout_size is not None:
            crops = draw_crops(
                self.schedule.levels, guidance.cutouts, sizing.model_size, guidance.cutout_size, guidance.seed
            )
            views = views_of(crops, guidance.cutout_size, sizing.input_size).to(self.denoiser.device)
        return CleanGradient(classifier, self.denoiser.decode, guidance.scale, views, guidance.x0_estimate)
