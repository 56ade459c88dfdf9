"""Settings as typed objects: variants (one named, complete setting of the method) and training.

Nothing here imports torch, so that checking a configuration is quick.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from diffguard.errors import SettingError

T = TypeVar("T")


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that nobody reads is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AdaptiveStop(Settings):
    """Adaptive early-stop of the inversion (paper, section 3.3): per sample, at the first level
    whose PSNR against the input (METHOD: [-1, 1] values, peak 255) is under a threshold.

    ``threshold`` is a number in dB, or None: then `DiffGuard.fit` sets it to the median PSNR of
    the calibration images at level ``median_at``.
    """

    kind: Literal["psnr"] = "psnr"
    min_level: int = Field(ge=1)
    max_level: int = Field(ge=1)
    threshold: float | None = None
    median_at: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "AdaptiveStop":
        if self.max_level < self.min_level:
            raise ValueError("max_level is under min_level")
        if (self.threshold is None) == (self.median_at is None):
            raise ValueError("exactly one of threshold and median_at is needed")
        return self


class LabelGuidance(Settings):
    """Classifier-free guidance toward the predicted label (arXiv 2207.12598).

    ``scale`` 1 is plain label-conditional prediction. ``cam_cut`` adds distinct semantic guidance:
    inside the mask where GradCAM exceeds it (a negative cut: falls under its magnitude) the noise
    is guided, outside it is unconditional.
    """

    kind: Literal["label"] = "label"
    scale: float = 1.0
    cam_cut: float | None = Field(default=None, ge=-1, le=1)


class ClassifierGuidance(Settings):
    """Classifier guidance with the clean gradient (paper, section 3.2) over random cutouts."""

    kind: Literal["classifier"] = "classifier"
    scale: float = 3.0
    cutouts: int = Field(default=8, ge=1)
    cutout_size: int = Field(ge=1)
    seed: int = 100


class NoGuidance(Settings):
    """Control: reconstruction without a label."""

    kind: Literal["none"] = "none"


class AllLabels(Settings):
    """Control that ignores the classifier: one reconstruction under each label, the nearest counts."""

    kind: Literal["all-labels"] = "all-labels"


Guidance = Annotated[LabelGuidance | ClassifierGuidance | NoGuidance | AllLabels, Field(discriminator="kind")]


class Variant(Settings):
    """Everything that decides a DiffGuard score, but for the models.

    Attributes:
        levels: K, the number of noise levels of the sampling grid.
        stop: the level where every inversion ends, or an adaptive early-stop.
        guidance: what steers the reconstruction.
        distance: a name in `diffguard.distances.DISTANCES`.
        against: what the reconstruction is compared with.
        clip: clamp the estimate of the clean latents to [-1, 1] at each step.
        precision: what the denoiser computes in.
    """

    levels: int = Field(default=10, ge=1)
    stop: int | AdaptiveStop
    guidance: Guidance
    distance: Literal["l1", "logits"]
    against: Literal["input", "unconditional"] = "input"
    clip: bool = True
    precision: Literal["float32"] = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> "Variant":
        if not 1 <= self.max_level <= self.levels:
            raise ValueError(f"stop: level {self.max_level} is not within 1..{self.levels}")
        return self

    @property
    def max_level(self) -> int:
        """The noisiest level that an image can reach."""
        return self.stop.max_level if isinstance(self.stop, AdaptiveStop) else self.stop

    @property
    def needs_fit(self) -> bool:
        """Whether a threshold has to come from calibration images first."""
        return isinstance(self.stop, AdaptiveStop) and self.stop.threshold is None

    @property
    def uses_classifier(self) -> bool:
        """Whether the score depends on the classifier; the controls' does not."""
        return self.guidance.kind in ("label", "classifier") or self.distance == "logits"


DEFAULT_VARIANT = Variant(stop=4, guidance=LabelGuidance(scale=1.0), distance="l1")


class Augmentation(Settings):
    """Random affine maps: rotation in degrees, relative scale, shift in pixels; each a maximum."""

    rotation: float = Field(default=0.0, ge=0)
    scale: float = Field(default=0.0, ge=0, lt=1)
    shift: float = Field(default=0.0, ge=0)


class ClassifierTraining(Settings):
    """AdamW with a one-cycle learning rate on cross-entropy."""

    width: int = Field(default=8, ge=1)
    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    augmentation: Augmentation = Augmentation()


class DenoiserTraining(Settings):
    """A class-conditional Diffusers UNet2DModel on pixels, eps prediction, classifier-free dropout."""

    channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = Field(default=1, ge=1)
    norm_groups: int = Field(default=8, ge=1)
    schedule: str = "squaredcos_cap_v2"
    train_steps: int = Field(default=1000, ge=2)
    iterations: int = Field(default=1500, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_fraction: float = Field(default=0.1, gt=0, lt=1)
    label_drop: float = Field(default=0.15, ge=0, lt=1)
    ema: float = Field(default=0.995, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _warms_up(self) -> "DenoiserTraining":
        if self.iterations * self.warmup_fraction <= 1:
            raise ValueError(
                f"iterations: {self.iterations} leaves no step to warm up in, warmup_fraction is {self.warmup_fraction}"
            )
        return self


def parse_settings(kind: type[T], values: Any, where: str) -> T:
    """Check plain values against a settings class.

    Args:
        where: the file and section, for the message.

    Raises:
        SettingError: one line that names the first wrong key and what is wrong with it.

    Example:
        >>> parse_settings(NoGuidance, {"kind": "none"}, "params.yaml").kind
        'none'
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise SettingError(f"{where}: {_describe(error)}") from None


def _describe(error: ValidationError) -> str:
    details = error.errors(include_url=False)
    first = details[0]
    key = ".".join(str(part) for part in first["loc"]) or "value"
    shown = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
    more = f"; and {len(details) - 1} more" if len(details) > 1 else ""
    return f"{key}: {first['msg']}{shown}{more}"
