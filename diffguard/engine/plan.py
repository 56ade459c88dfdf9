"""What requests need, as keys: whose inversion, where it stops, and which reconstructions follow.

Equal keys are worked off once, whichever requests have them. Nothing here touches a tensor: the engine works off
what is planned, and `diffguard.engine.cost` counts it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from diffguard.diffusion.guidance import needs_both_labels
from diffguard.diffusion.schedules import denoising_start
from diffguard.engine.types import Request
from diffguard.settings import (
    LABEL_GAIN,
    POSTERIOR,
    AdaptiveStop,
    AllLabels,
    ClassifierGuidance,
    LabelGuidance,
    NoGuidance,
    Variant,
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class StepGroup:
    """What steps share that are taken together; each is there once.

    Attributes:
        gradient: by its index in `Plan.gradients`; None: they are not under classifier guidance.
    """

    sampler: int
    gradient: int | None


class MaskKey(NamedTuple):
    """Where guidance acts: a classifier's CAM of a label above a cut."""

    classifier: int
    label: int
    cut: float


class GradientKey(NamedTuple):
    """Classifier guidance: the gradient of a classifier, under a sampler, with these settings."""

    sampler: int
    classifier: int
    guidance: ClassifierGuidance


class Conditioning(NamedTuple):
    """What steers a trajectory.

    Attributes:
        label: what the network is told.
        scale: of classifier-free guidance toward the label.
        mask: where classifier-free guidance acts; None: everywhere.
        gradient: classifier guidance, by its index in `Plan.gradients`; None: there is none.
        target: the label that classifier guidance leads to.
    """

    label: int
    scale: float = 1.0
    mask: MaskKey | None = None
    gradient: int | None = None
    target: int = 0


class InversionKey(NamedTuple):
    """One inversion of an image."""

    sampler: int
    conditioning: Conditioning


class ReconstructionKey(NamedTuple):
    """A reconstruction: it starts where `inversion` reached `level`, with the step of index `start`."""

    inversion: InversionKey
    level: int
    start: int
    conditioning: Conditioning

    @property
    def sampler(self) -> int:
        return self.inversion.sampler


class NoiseKey(NamedTuple):
    """An image at a noise level that one draw of noise brought it to."""

    sampler: int
    seed: int
    draw: int
    level: int


class Reconstructions(NamedTuple):
    """Those of one request and image: its own, of which the nearest counts, and the unconditional one if wanted."""

    conditional: list[ReconstructionKey]
    unconditional: ReconstructionKey | None


class StopRule(NamedTuple):
    """Where an inversion stops; similarities may look through a classifier."""

    stop: int | AdaptiveStop
    classifier: int | None


class Plan:
    """The keys of requests. Classifiers, samplers, stop rules and gradients go by their index here.

    Args:
        requests: those that agree share trajectories.
        num_labels: of the denoiser.
        null_label: of the denoiser; None: it takes no labels.

    Attributes:
        classifiers: of the requests, each once.
        sampler_variants: a representative variant of each sampler.
        rules: the stop rules of the requests, each once.
        classifier_of: the index of each request's classifier.
        gradients: of the requests that have classifier guidance, each once.
        sampler_of: the index of each request's sampler.
        rule_of: the index of each request's stop rule.
        gradient_of: the index of each such request's gradient.
        noisy_images: of each request, the noisy images at which it takes denoising errors, and their weights, a draw
            after the other.
    """

    def __init__(self, requests: Sequence[Request], num_labels: int, null_label: int | None) -> None:
        self.requests = list(requests)
        self.num_labels, self.null_label = num_labels, null_label
        self.unconditional = Conditioning(null_label or 0)  # ignored where the denoiser takes no labels
        self.classifiers, self.classifier_of = _distinct(
            [request.classifier for request in requests], lambda one, other: one is other
        )
        self.sampler_variants, self.sampler_of = _distinct(
            [request.variant for request in requests], lambda one, other: _sampling(one) == _sampling(other)
        )
        rules = [
            _stop_rule(request.variant.stop, classifier)
            for request, classifier in zip(requests, self.classifier_of, strict=True)
        ]
        self.rules, self.rule_of = _distinct(rules, lambda one, other: one == other)
        guided = {
            index: GradientKey(self.sampler_of[index], self.classifier_of[index], request.variant.guidance)
            for index, request in enumerate(requests)
            if isinstance(request.variant.guidance, ClassifierGuidance)
        }
        self.gradients, indices = _distinct(list(guided.values()), lambda one, other: one == other)
        self.gradient_of = dict(zip(guided, indices, strict=True))
        self.noisy_images = [
            _noisy_images(request.variant, sampler) for request, sampler in zip(requests, self.sampler_of, strict=True)
        ]
        self._without_gradient = [StepGroup(sampler, None) for sampler in range(len(self.sampler_variants))]
        self._with_gradient = [StepGroup(key.sampler, index) for index, key in enumerate(self.gradients)]

    def inversion(self, request: int, label: int) -> InversionKey:
        """The inversion of a request for an image that it guides to this label."""
        scale = self.requests[request].variant.inversion_scale
        conditioning = self.unconditional if scale is None else self._toward(label, scale)
        return InversionKey(self.sampler_of[request], conditioning)

    def conditionings(self, request: int, label: int) -> list[Conditioning]:
        """What steers each reconstruction of a request; more than one where the nearest counts."""
        guidance, classifier = self.requests[request].variant.guidance, self.classifier_of[request]
        if isinstance(guidance, AllLabels):
            return [Conditioning(each_label) for each_label in range(self.num_labels)]
        if isinstance(guidance, NoGuidance) or guidance.scale == 0:
            return [self.unconditional]
        if isinstance(guidance, LabelGuidance):
            mask = None if guidance.cam_cut is None else MaskKey(classifier, label, guidance.cam_cut)
            return [self._toward(label, guidance.scale, mask)]
        # The denoiser itself is unconditional there.
        return [self.unconditional._replace(gradient=self.gradient_of[request], target=label)]

    def reconstructions(
        self, request: int, label: int, level: int, levels: int, *, with_unconditional: bool = False
    ) -> Reconstructions:
        """What a request reconstructs of an image whose inversion has stopped.

        Args:
            label: that it guides to.
            level: where the inversion stopped.
            levels: of the schedule.
            with_unconditional: the unconditional one is wanted in any case.
        """
        variant, inversion = self.requests[request].variant, self.inversion(request, label)
        start = denoising_start(level, levels, variant.forback_skip_diff, variant.skip_first_steps)
        conditional = [
            ReconstructionKey(inversion, level, start, conditioning)
            for conditioning in self.conditionings(request, label)
        ]
        unconditional = None
        if with_unconditional or variant.needs_unconditional:
            unconditional = ReconstructionKey(inversion, level, start, self.unconditional)
        return Reconstructions(conditional, unconditional)

    def compared_labels(self, request: int, label: int) -> list[int]:
        """Under which labels a request takes denoising errors, of an image of this label; its own is the first."""
        if self.requests[request].variant.distance == LABEL_GAIN:
            return [label, self.unconditional.label]
        return [label, *(other for other in range(self.num_labels) if other != label)]

    def group(self, key: InversionKey | ReconstructionKey) -> StepGroup:
        """With which of other trajectories' steps those of this one are taken."""
        gradient = key.conditioning.gradient
        return self._without_gradient[key.sampler] if gradient is None else self._with_gradient[gradient]

    def network_labels(self, conditioning: Conditioning) -> tuple[int, ...]:
        """The labels under which the network is evaluated at each step; the last is the conditioning's own."""
        has_null_label, is_masked = self.null_label is not None, conditioning.mask is not None
        if needs_both_labels(has_null_label, conditioning.scale, is_masked):
            return self.unconditional.label, conditioning.label
        return (conditioning.label,)

    def _toward(self, label: int, scale: float, mask: MaskKey | None = None) -> Conditioning:
        return self.unconditional if scale == 0 else Conditioning(label, scale, mask)


def _noisy_images(variant: Variant, sampler: int) -> list[tuple[NoiseKey, float]]:
    if variant.distance not in (LABEL_GAIN, POSTERIOR):
        return []
    errors = variant.denoising_errors
    weights = errors.weights or (1.0,) * variant.max_level
    return [
        (NoiseKey(sampler, errors.seed, draw, level), weight)
        for draw in range(errors.draws)
        for level, weight in enumerate(weights, start=1)
        if weight
    ]


def _sampling(variant: Variant) -> tuple[object, ...]:
    """What variants must agree on to share a sampler."""
    return (variant.grid, variant.levels, variant.clip, variant.solver, variant.precision, variant.process_method)


def _stop_rule(stop: int | AdaptiveStop, classifier: int) -> StopRule:
    looks_through = isinstance(stop, AdaptiveStop) and set(stop.thresholds) != {"psnr"}
    return StopRule(stop, classifier if looks_through else None)


def _distinct(values: Sequence[T], same: Callable[[T, T], bool]) -> tuple[list[T], list[int]]:
    """The values that differ, in order, and for each value the index of its like among them."""
    distinct: list[T] = []
    indices = []
    for value in values:
        index = next((index for index, other in enumerate(distinct) if same(value, other)), len(distinct))
        if index == len(distinct):
            distinct.append(value)
        indices.append(index)
    return distinct, indices
