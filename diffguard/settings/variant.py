"""A variant: one named, complete setting of the method."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from diffguard.settings.base import Settings
from diffguard.settings.distances import (
    ACTIVATIONS,
    LABEL_GAIN,
    PATH,
    POSTERIOR,
    SINGLE_STEP,
    check_score_name,
    check_similarity_name,
)

Six = Annotated[tuple[float, ...], Field(min_length=6, max_length=6)]


class PathGaussian(Settings):
    """A Gaussian of the path statistics of InD images; see `diffguard.diffusion.path_statistics.fit_path`.

    Attributes:
        mean: of the six.
        covariance: of the six, its rows.
    """

    mean: Six
    covariance: Annotated[tuple[Six, ...], Field(min_length=6, max_length=6)]


class PathMixture(Settings):
    """A mixture of Gaussians of the path statistics of InD images; see `fit_path` there.

    Attributes:
        weights: of the components, in (0, 1]; they add up to 1.
        components: in the units of the statistics.
    """

    weights: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    components: tuple[PathGaussian, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "PathMixture":
        if len(self.weights) != len(self.components):
            raise ValueError(f"it has {len(self.components)} components and weights of {len(self.weights)}")
        if not math.isclose(sum(self.weights), 1, rel_tol=1e-6):
            raise ValueError(f"its weights add up to {sum(self.weights):g}, not to 1")
        return self


def _kind_of_path(path: Any) -> str:
    # No key of its own says the kind: bundles from before there were mixtures have none.
    is_mixture = isinstance(path, PathMixture) or (isinstance(path, dict) and "weights" in path)
    return "mixture" if is_mixture else "gaussian"


PathDensity = Annotated[
    Annotated[PathGaussian, Tag("gaussian")] | Annotated[PathMixture, Tag("mixture")], Discriminator(_kind_of_path)
]
"""What is fitted to the path statistics of InD images."""

STANDARD_PATH = PathGaussian(
    mean=(0.0,) * 6, covariance=tuple(tuple(float(i == j) for j in range(6)) for i in range(6))
)
"""In place of a density that is not fitted yet, where no score counts."""


class DenoisingErrors(Settings):
    """How denoising errors are measured, of distance ``label-gain`` and ``denoiser-posterior``.

    The image is brought to the noise levels 1 to `Variant.stop` by noise that its content and `seed` decide, the same
    under every label; see `diffguard.diffusion.denoising_errors`.

    Attributes:
        draws: of noise, at each level.
        seed: of the noise.
        weights: of the levels, from 1 up; one of weight 0 is left out. None: equal.
        prune: of ``denoiser-posterior``: a label is given up once its error exceeds the best label's by so many
            standard errors of their paired difference (from three noisy images on); None: none is.
    """

    draws: int = Field(default=1, ge=1)
    seed: int = 0
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    prune: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "DenoisingErrors":
        if self.weights is not None and not sum(self.weights):
            raise ValueError("weights: at least one is above 0")
        return self


class ActivationGaussian(Settings):
    """What pooled activations of the denoiser are compared with; see `diffguard.diffusion.activations`.

    Attributes:
        block: dotted name of a module of the denoiser's network, whose output counts.
        mean, variance: of each channel, of InD images; None: `DiffGuard.fit` sets them.
    """

    block: Annotated[str, Field(min_length=1)] = "mid_block"
    mean: tuple[float, ...] | None = None
    variance: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ActivationGaussian":
        if len(self.mean or ()) != len(self.variance or ()):
            raise ValueError("mean and variance are of the same channels")
        return self


class AdaptiveStop(Settings):
    """Adaptive early-stop of the inversion (paper, section 3.3), for each sample by itself.

    After each step from ``min_level`` on, the noisy latents are compared with the input's; a sample
    stops the first time *any* similarity is under its threshold, at ``max_level`` at the latest.

    Attributes:
        thresholds: by similarity: ``psnr`` in dB (values in [-1, 1], peak 255, as published), or a
            distance d, whose similarity is 1 - d. None: `DiffGuard.fit` sets it to the median over
            the calibration images at level ``median_at``.
    """

    min_level: int = Field(default=1, ge=1)
    max_level: int = Field(ge=1)
    thresholds: dict[Annotated[str, AfterValidator(check_similarity_name)], float | None] = Field(min_length=1)
    median_at: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "AdaptiveStop":
        if self.max_level < self.min_level:
            raise ValueError("max_level is under min_level")
        if (None in self.thresholds.values()) != (self.median_at is not None):
            raise ValueError("median_at is needed where a threshold is null, and only there")
        return self


class LabelGuidance(Settings):
    """Classifier-free guidance toward the predicted label (arXiv 2207.12598).

    ``scale`` 1 is plain label-conditional prediction, 0 unconditional. ``cam_cut`` adds distinct
    semantic guidance: inside the mask where GradCAM exceeds it (a negative cut: falls under its
    magnitude) the noise is guided, outside it is unconditional. The published code ignores the mask
    at scale 1; here it counts at every scale.
    """

    kind: Literal["label"] = "label"
    scale: float = 1.0
    cam_cut: float | None = Field(default=None, ge=-1, le=1)


class ClassifierGuidance(Settings):
    """Classifier guidance with the clean gradient (paper, section 3.2) over random cutouts.

    Attributes:
        cutouts: how many, their log-probabilities summed; None: the classifier sees the whole image.
        cutout_size: side in pixels of the smallest cutout, and what each is resized to.
        seed: of the cutouts, drawn anew for every image as published.
        x0_estimate: take the gradient at the estimate of the clean image, not at the noisy one.
    """

    kind: Literal["classifier"] = "classifier"
    scale: float = 3.0
    cutouts: int | None = Field(default=8, ge=1)
    cutout_size: int | None = Field(default=None, ge=1)
    seed: int = 100
    x0_estimate: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "ClassifierGuidance":
        if (self.cutouts is None) != (self.cutout_size is None):
            raise ValueError("cutout_size is needed with cutouts, and only there")
        return self


class NoGuidance(Settings):
    """Control: reconstruction without a label."""

    kind: Literal["none"] = "none"


class AllLabels(Settings):
    """Control that ignores the classifier: one reconstruction under each label, the nearest counts."""

    kind: Literal["all-labels"] = "all-labels"


Guidance = Annotated[LabelGuidance | ClassifierGuidance | NoGuidance | AllLabels, Field(discriminator="kind")]


_OF_PATHS = {"path": None, "path_components": 1}
"""Settings of distance `PATH` alone, and their defaults."""


class Variant(Settings):
    """Everything that decides a DiffGuard score, but for the models.

    In a settings file it is its attributes, or a name in `PRESETS`, or ``preset`` with such a name
    beside the attributes that differ.

    Attributes:
        grid: the schedule: which timesteps and noise levels sampling visits, and where the network is evaluated; a
            name in `diffguard.diffusion.schedules.SCHEDULES`.
        levels: K, the number of sampling steps (some schedules have more; see there).
        stop: the level where every inversion ends, or an adaptive early-stop. A level is a number of
            inversion steps; level 0 is the image.
        inversion_scale: invert under the label with this classifier-free guidance; None, published
            and the default: without a label.
        forback_skip_diff: where denoising starts after an inversion that ended at a level: at step
            index level + forback_skip_diff - 2, K - 1 at most. 1 denoises each step that inversion
            took. guided-diffusion's levels lie one index higher: 2 is exact there, and 3 the
            published off-by-one. 0: at K - 1 - skip_first_steps, whatever the level.
        skip_first_steps: see forback_skip_diff.
        guidance: what steers the reconstruction.
        label: whose label it is guided to: the classifier's prediction, or, to measure how good the
            method could be, the truth: ``oracle`` takes the true label of InD images and a random one
            for OOD images, ``oracle-ind`` the true label of InD images alone.
        process_method: how images come to the denoiser's size and back: ``resize`` (bilinear,
            not antialiased), ``pad`` (black), or ``none`` (they must have it).
        distance: what the score is. ``path``: no reconstruction is made (guidance none), and the score
            is that of DiffPath: how unlikely the inversion path's statistics are. ``label-gain``,
            ``denoiser-posterior`` and ``denoiser-activations``: nothing is inverted either; the first two measure
            denoising errors at the noise levels 1 to `stop`, the last looks at the first evaluation of an inversion.
        path: what the statistics of a path are compared with; None: `DiffGuard.fit` sets it.
        path_components: how many Gaussians are fitted to them; more than one are a mixture.
        errors: how denoising errors are measured; None: as `DenoisingErrors` has it by default.
        activations: which ones count and what they are compared with; None: those of the block in the middle.
        against: what the reconstruction is compared with: the ``input``, or the ``unconditional`` reconstruction from
            the same noise. ``gain``: the input too, less the unconditional reconstruction's distance from the input:
            how much farther from the input the label leads than no label does. The score has either sign.
        clip: clamp the estimate of the clean latents to [-1, 1] at each step.
        solver: the rule of a step, of inversion and denoising: ``ddim`` (first order, published), or
            ``dpm-solver++``, its second-order multistep rule (2M, arXiv 2211.01095), which evaluates the
            network no more often.
        precision: what the denoiser's network computes in (autocast). ``auto``: bfloat16 where the device has units
            for it (`diffguard.utils.precision.has_bfloat16_units`), else float32. Scores of different precision differ
            by rounding; what is stored of a run says what ``auto`` was there.
    """

    unwritten = frozenset({*_OF_PATHS, "errors", "activations"})

    grid: Literal["trailing", "guided-diffusion", "latent-diffusion"] = "trailing"
    levels: int = Field(default=10, ge=1)
    stop: int | AdaptiveStop
    inversion_scale: float | None = None
    forback_skip_diff: int = Field(default=1, ge=0)
    skip_first_steps: int = Field(default=0, ge=0)
    guidance: Guidance
    label: Literal["predicted", "oracle", "oracle-ind"] = "predicted"
    process_method: Literal["none", "resize", "pad"] = "none"
    distance: Annotated[str, AfterValidator(check_score_name)]
    path: PathDensity | None = None
    path_components: int = Field(default=1, ge=1)
    errors: DenoisingErrors | None = None
    activations: ActivationGaussian | None = None
    against: Literal["input", "unconditional", "gain"] = "input"
    clip: bool = True
    solver: Literal["ddim", "dpm-solver++"] = "ddim"
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        changes = {"preset": values} if isinstance(values, str) else values
        if not isinstance(changes, dict) or "preset" not in changes:
            return values
        name = changes["preset"]
        if name not in PRESETS:
            raise ValueError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
        return {**PRESETS[name].own(), **{key: value for key, value in changes.items() if key != "preset"}}

    @model_validator(mode="after")
    def _consistent(self) -> "Variant":
        levels = self.levels
        if self.grid == "latent-diffusion" and levels <= 1000:
            # Published: more where K does not divide 1000 training steps; `check_request` knows the denoiser's own.
            levels = len(range(1, 1000, 1000 // levels))
        if not 1 <= self.max_level <= levels:
            raise ValueError(f"stop: level {self.max_level} is not within 1..{levels}")
        if isinstance(self.stop, AdaptiveStop) and (self.stop.median_at or 0) > levels:
            raise ValueError(f"stop.median_at: level {self.stop.median_at} is not within 1..{levels}")
        if self.skip_first_steps >= self.levels or (self.skip_first_steps and self.forback_skip_diff):
            raise ValueError("skip_first_steps: needs forback_skip_diff 0, and is less than levels")
        if self.distance != PATH:
            for name, default in _OF_PATHS.items():
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: it belongs to distance {PATH} alone")
        if self.against == "gain" and self.reconstructs and not self._is_guided:
            raise ValueError(
                "against: gain compares guidance with none, and this variant has none, so every score would be 0; "
                "set a guidance whose scale is not 0, or leave against out"
            )
        return self

    @model_validator(mode="after")
    def _path_alone(self) -> "Variant":
        if self.distance != PATH:
            return self
        if self.guidance.kind != "none":
            raise ValueError(f"guidance: distance {PATH} makes no reconstruction; set guidance to {{kind: none}}")
        if self.against != "input":
            raise ValueError(f"against: distance {PATH} makes no reconstruction; leave it out")
        if (self.stop.min_level if isinstance(self.stop, AdaptiveStop) else self.stop) < 2:
            raise ValueError(f"stop: distance {PATH} takes differences between steps, so at least 2 of them")
        fitted = len(self.path.components) if isinstance(self.path, PathMixture) else 1
        if self.path is not None and fitted != self.path_components:
            raise ValueError(f"path: it was fitted with path_components {fitted}, not {self.path_components}")
        return self

    @model_validator(mode="after")
    def _single_step_alone(self) -> "Variant":
        name = self.distance
        if self.errors is not None and name not in (LABEL_GAIN, POSTERIOR):
            raise ValueError(f"errors: it belongs to distance {LABEL_GAIN} and {POSTERIOR} alone")
        if self.activations is not None and name != ACTIVATIONS:
            raise ValueError(f"activations: it belongs to distance {ACTIVATIONS} alone")
        if not self.is_single_step:
            return self
        kind = {LABEL_GAIN: "label", POSTERIOR: "all-labels", ACTIVATIONS: "none"}[name]
        if self.guidance.kind != kind or self.guidance not in (LabelGuidance(), AllLabels(), NoGuidance()):
            raise ValueError(f"guidance: distance {name} makes no reconstruction; set guidance to {{kind: {kind}}}")
        if self.against != "input" or self.inversion_scale is not None:
            raise ValueError(f"distance {name} makes no reconstruction; leave against and inversion_scale out")
        if isinstance(self.stop, AdaptiveStop):
            raise ValueError(f"stop: distance {name} inverts nothing; give the noisiest level")
        if name == ACTIVATIONS and self.stop != 1:
            raise ValueError(f"stop: distance {name} evaluates the network once; set stop to 1")
        weights = self.denoising_errors.weights
        if weights is not None and len(weights) != self.stop:
            raise ValueError(f"errors.weights: {len(weights)} for the {self.stop} noise levels up to stop")
        if self.denoising_errors.prune is not None and name != POSTERIOR:
            raise ValueError(f"errors.prune: it belongs to distance {POSTERIOR} alone")
        return self

    @property
    def _is_guided(self) -> bool:
        return not isinstance(self.guidance, NoGuidance) and getattr(self.guidance, "scale", 1.0) != 0

    @property
    def max_level(self) -> int:
        """The noisiest level that an image can reach."""
        return self.stop.max_level if isinstance(self.stop, AdaptiveStop) else self.stop

    @property
    def reconstructs(self) -> bool:
        """Whether its score is of a reconstruction, not of the inversion path or a single step."""
        return self.distance != PATH and not self.is_single_step

    @property
    def is_single_step(self) -> bool:
        """Whether its score is of single evaluations of the network, not of a trajectory."""
        return self.distance in SINGLE_STEP

    @property
    def denoising_errors(self) -> DenoisingErrors:
        """`errors`, or their default."""
        return self.errors or DenoisingErrors()

    @property
    def activation_gaussian(self) -> ActivationGaussian:
        """`activations`, or their default."""
        return self.activations or ActivationGaussian()

    @property
    def needs_unconditional(self) -> bool:
        """Whether its score takes the unconditional reconstruction."""
        return self.against != "input"

    @property
    def needs_calibration(self) -> bool:
        """Whether a threshold of its stop has to come from calibration images first."""
        return isinstance(self.stop, AdaptiveStop) and self.stop.median_at is not None

    @property
    def needs_train(self) -> bool:
        """Whether the density of its path or activations has to come from training images first."""
        if self.distance == ACTIVATIONS:
            return self.activation_gaussian.mean is None
        return self.distance == PATH and self.path is None

    @property
    def needs_fit(self) -> bool:
        """Whether anything has to come from images first."""
        return self.needs_calibration or self.needs_train

    @property
    def distances(self) -> list[str]:
        """The distances between images that it needs, the score's first."""
        stops = self.stop.thresholds if isinstance(self.stop, AdaptiveStop) else {}
        return [name for name in (self.distance, *stops) if name not in ("psnr", PATH, *SINGLE_STEP)]


DEFAULT_VARIANT = Variant(stop=4, guidance=LabelGuidance(scale=1.0), distance="l1")

PRESETS = {
    # guided-diffusion-psnr-dists of the published code: 256x256 pixels, unconditional, classifier guidance.
    "gdm-imagenet": Variant(
        grid="guided-diffusion",
        levels=100,
        stop=AdaptiveStop(max_level=90, thresholds={"psnr": 48.5, "dists": 0.38}),
        forback_skip_diff=3,
        guidance=ClassifierGuidance(scale=3.0, cutouts=8, cutout_size=224, seed=100),
        process_method="resize",
        distance="dists",
        against="unconditional",
        precision="float16",
    ),
    # cin256-v2 of latent diffusion with classifier-free guidance inside the CAM mask.
    "ldm-imagenet": Variant(
        grid="latent-diffusion",
        levels=25,
        stop=25,
        guidance=LabelGuidance(scale=10.0, cam_cut=0.3),
        process_method="resize",
        distance="dists",
        clip=False,
    ),
    # The cheapest of experiments/steps.py that loses nothing on the validation split of `digits`: half of
    # the default's network evaluations.
    "fast": DEFAULT_VARIANT.model_copy(update={"stop": 2}),
}
"""Named settings: the published ones of ImageNet (paper, section 4; METHOD of the published code),
precision included; and `fast`, fewer steps than the default."""
