"""Settings as typed objects: variants (one named, complete setting of the method), combinations, training.

Nothing here imports torch, so that checking a configuration is quick.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)

from diffguard.errors import SettingError

T = TypeVar("T")


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that nobody reads is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def own(self) -> dict[str, Any]:
        """As plain values, without what was left at its default."""
        return self.model_dump(include=self.model_fields_set)


DISTANCE_SIZES = {
    "l1": 1,
    "l2": 1,
    "logits": 1,
    "features": 1,
    "ssim": 11,
    "fsim": 2,
    "vif": 41,
    "mdsi": 1,
    "gmsd": 1,
    "lpips": 32,
    "dists": 16,
}
"""The distances of `diffguard.distances`, with the side in pixels of the smallest image that each takes."""


def _check_distance(name: str) -> str:
    if name not in DISTANCE_SIZES and ":" not in name:
        raise ValueError(f"{name!r} is not one of {', '.join(DISTANCE_SIZES)}, or package.module:name")
    return name


DistanceName = Annotated[str, AfterValidator(_check_distance)]
"""A name in `DISTANCE_SIZES`, or ``package.module:name`` of a `diffguard.distances.Distance`."""


def _check_similarity(name: str) -> str:
    return name if name == "psnr" else _check_distance(name)


PATH = "path"
"""In place of a variant's distance: its score is how unlikely the inversion path is; see `diffguard.path`."""


def _check_score(name: str) -> str:
    if name not in (PATH, *DISTANCE_SIZES) and ":" not in name:
        raise ValueError(f"{name!r} is not one of {', '.join(DISTANCE_SIZES)}, {PATH}, or package.module:name")
    return name


Six = Annotated[tuple[float, ...], Field(min_length=6, max_length=6)]


class PathGaussian(Settings):
    """The Gaussian of the path statistics of InD images; see `diffguard.path.fit_path`.

    Attributes:
        mean: of the six. covariance: of the six, its rows.
    """

    mean: Six
    covariance: Annotated[tuple[Six, ...], Field(min_length=6, max_length=6)]


STANDARD_PATH = PathGaussian(
    mean=(0.0,) * 6, covariance=tuple(tuple(float(i == j) for j in range(6)) for i in range(6))
)
"""What stands in for one that is not fitted yet, where no score counts."""


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
    thresholds: dict[Annotated[str, AfterValidator(_check_similarity)], float | None] = Field(min_length=1)
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


class Variant(Settings):
    """Everything that decides a DiffGuard score, but for the models.

    In a settings file it is its attributes, or a name in `PRESETS`, or ``preset`` with such a name
    beside the attributes that differ.

    Attributes:
        grid: which timesteps and noise levels sampling visits, and where the network is asked, a
            name in `diffguard.ddim.GRIDS`.
        levels: K, the number of sampling steps (some grids make more; see there).
        stop: the level where every inversion ends, or an adaptive early-stop. A level is a number of
            inversion steps; level 0 is the image.
        inversion_scale: invert under the label with this classifier-free guidance; None, published
            and the default: without a label.
        forback_skip_diff: where denoising starts after an inversion that ended at a level: at step
            index level + forback_skip_diff - 2, K - 1 at most. 1 denoises each step that inversion
            made. guided-diffusion's levels lie one index higher: 2 is exact there, and 3 the
            published off-by-one. 0: at K - 1 - skip_first_steps, whatever the level.
        skip_first_steps: see forback_skip_diff.
        guidance: what steers the reconstruction.
        label: whose label it is guided to: the classifier's prediction, or, to measure how good the
            method could be, the truth: ``oracle`` takes the true label of InD images and a random one
            for OOD images, ``oracle-ind`` the true label of InD images alone.
        process_method: how images come to the denoiser's size and back: ``resize`` (bilinear,
            not antialiased), ``pad`` (black), or ``none`` (they must have it).
        distance: what the score is. ``path``: no reconstruction is made (guidance none), and the score
            is that of DiffPath: how unlikely the inversion path's statistics are.
        path: what the statistics of a path are compared with; None: `DiffGuard.fit` sets it.
        against: what the reconstruction is compared with.
        clip: clamp the estimate of the clean latents to [-1, 1] at each step.
        solver: the rule of a move, up and down: ``ddim`` (first order, published), or
            ``dpm-solver++``, its second-order multistep rule (2M, arXiv 2211.01095), which asks the
            network no more often.
        precision: what the denoiser's network computes in (autocast).
    """

    grid: Literal["trailing", "guided-diffusion", "latent-diffusion"] = "trailing"
    levels: int = Field(default=10, ge=1)
    stop: int | AdaptiveStop
    inversion_scale: float | None = None
    forback_skip_diff: int = Field(default=1, ge=0)
    skip_first_steps: int = Field(default=0, ge=0)
    guidance: Guidance
    label: Literal["predicted", "oracle", "oracle-ind"] = "predicted"
    process_method: Literal["none", "resize", "pad"] = "none"
    distance: Annotated[str, AfterValidator(_check_score)]
    path: PathGaussian | None = None
    against: Literal["input", "unconditional"] = "input"
    clip: bool = True
    solver: Literal["ddim", "dpm-solver++"] = "ddim"
    precision: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        changes = {"preset": values} if isinstance(values, str) else values
        if not isinstance(changes, dict) or "preset" not in changes:
            return values
        name = changes["preset"]
        if name not in PRESETS:
            raise ValueError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
        return {**PRESETS[name].own(), **{key: each for key, each in changes.items() if key != "preset"}}

    @model_validator(mode="after")
    def _consistent(self) -> "Variant":
        moves = self.levels
        if self.grid == "latent-diffusion" and moves <= 1000:
            # Published: more where K does not divide 1000 training steps; `check_request` knows the denoiser's own.
            moves = len(range(1, 1000, 1000 // moves))
        if not 1 <= self.max_level <= moves:
            raise ValueError(f"stop: level {self.max_level} is not within 1..{moves}")
        if isinstance(self.stop, AdaptiveStop) and (self.stop.median_at or 0) > moves:
            raise ValueError(f"stop.median_at: level {self.stop.median_at} is not within 1..{moves}")
        if self.skip_first_steps >= self.levels or (self.skip_first_steps and self.forback_skip_diff):
            raise ValueError("skip_first_steps: needs forback_skip_diff 0, and is less than levels")
        if self.path is not None and self.reconstructs:
            raise ValueError(f"path: it belongs to distance {PATH} alone")
        return self

    @model_validator(mode="after")
    def _path_alone(self) -> "Variant":
        if self.reconstructs:
            return self
        if self.guidance.kind != "none":
            raise ValueError(f"guidance: distance {PATH} makes no reconstruction; set guidance to {{kind: none}}")
        if self.against != "input":
            raise ValueError(f"against: distance {PATH} makes no reconstruction; leave it out")
        if (self.stop.min_level if isinstance(self.stop, AdaptiveStop) else self.stop) < 2:
            raise ValueError(f"stop: distance {PATH} takes differences between steps, so at least 2 of them")
        return self

    @model_serializer(mode="wrap")
    def _without_unset_path(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Scores are named by the hash of this, and most variants have no path.
        values: dict[str, Any] = handler(self)
        if values.get("path", ...) is None:
            del values["path"]
        return values

    @property
    def max_level(self) -> int:
        """The noisiest level that an image can reach."""
        return self.stop.max_level if isinstance(self.stop, AdaptiveStop) else self.stop

    @property
    def reconstructs(self) -> bool:
        """Whether its score is of a reconstruction, not of the inversion path."""
        return self.distance != PATH

    @property
    def needs_calibration(self) -> bool:
        """Whether a threshold of its stop has to come from calibration images first."""
        return isinstance(self.stop, AdaptiveStop) and self.stop.median_at is not None

    @property
    def needs_train(self) -> bool:
        """Whether the Gaussian of its path has to come from training images first."""
        return not self.reconstructs and self.path is None

    @property
    def needs_fit(self) -> bool:
        """Whether anything has to come from images first."""
        return self.needs_calibration or self.needs_train

    @property
    def distances(self) -> list[str]:
        """The distances between images that it needs, the score's first."""
        stops = self.stop.thresholds if isinstance(self.stop, AdaptiveStop) else {}
        return [name for name in (self.distance, *stops) if name not in ("psnr", PATH)]


class Baseline(Settings):
    """A pytorch-ood detector as ``package.module:name`` and what it is given.

    Attributes:
        sees: what stands in the place of its model: the classifier (logits), its penultimate layer
            (features), the image's values in a row (pixels), or the image as it is (images).
        arguments: of its constructor.
    """

    detector: str
    sees: Literal["logits", "features", "pixels", "images"]
    arguments: dict[str, Any] = Field(default_factory=dict)


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
    # The cheapest of benchmarks/steps.py that loses nothing on the validation split of `digits`: half of
    # the default's network evaluations.
    "fast": DEFAULT_VARIANT.model_copy(update={"stop": 2}),
}
"""Named settings: the published ones of ImageNet (paper, section 4; METHOD of the published code),
precision included; and `fast`, fewer steps than the default."""


class Combination(Settings):
    """Several detectors as one; see `diffguard.combination`.

    In params.yaml it is a row of the result table, beside the rows that it is made of.

    Attributes:
        kind: ``z-sum``, the sum of the z-scores of calibrated p-values; ``fisher``, Fisher's sum of -2 log p;
            ``maximum``, the largest z-score; ``residual``, what is left of the first when the second is
            regressed out on InD calibration images; ``cascade``, the first decides clear cases, and the second
            those between.
        of: names of rows. A residual and a cascade are of two.
        loss: of a cascade: how much less AUROC than the second's alone it may have against validation's near-OOD
            images, and as much against its far-OOD images.
    """

    kind: Literal["z-sum", "fisher", "maximum", "residual", "cascade"]
    of: tuple[str, ...] = Field(min_length=2)
    loss: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Combination":
        if self.kind in ("residual", "cascade") and len(self.of) != 2:
            raise ValueError(f"of: a {self.kind} is of two rows, not {len(self.of)}")
        if twice := [name for name in self.of if self.of.count(name) > 1]:
            raise ValueError(f"of: {twice[0]} is there twice")
        if (self.loss is None) == (self.kind == "cascade"):
            raise ValueError("loss is needed by a cascade, and only there")
        return self


class Augmentation(Settings):
    """Random changes of training images, each up to a maximum.

    Attributes:
        rotation: in degrees. scale: relative. shift: in pixels, of any fraction: one affine map.
        crop: moves by whole pixels, as padding and cropping does.
        flip: mirror half of the images left to right.
    """

    rotation: float = Field(default=0.0, ge=0)
    scale: float = Field(default=0.0, ge=0, lt=1)
    shift: float = Field(default=0.0, ge=0)
    crop: int = Field(default=0, ge=0)
    flip: bool = False


class Training(Settings):
    """What the trainings of classifiers and denoisers have in common.

    Attributes:
        optimizer: AdamW; or muon for matrices and convolutions with AdamW for the rest, of timm.
        rate_schedule: of the learning rate: one-cycle (arXiv 1708.07120); or warmup-stable-decay (arXiv 2404.06395),
            constant until its end, so that a training can be extended.
        warmup_fraction: of one-cycle, the share of the training in which the rate rises.
        warmup_steps, decay_fraction: of warmup-stable-decay, the steps in which it rises, and the share of the
            training, its last, in which it comes down.
        gradient_clip: norm to which gradients are cut; None: they are not.
        ema: decay of the averaged weights, less at the start; 0: no average.
        precision: bfloat16 computes in it, with weights in float32; auto: where the device has units for it.
        minutes: a time budget: the learning rate comes to its end then, if the steps are not done before.
        checkpoint_minutes: between checkpoints.
    """

    batch_size: int = Field(default=64, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    rate_schedule: Literal["one-cycle", "warmup-stable-decay"] = "one-cycle"
    warmup_fraction: float = Field(default=0.1, gt=0, lt=1)
    warmup_steps: int = Field(default=200, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    gradient_clip: float | None = Field(default=None, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    augmentation: Augmentation = Augmentation()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    minutes: float | None = Field(default=None, gt=0)
    checkpoint_minutes: float = Field(default=5.0, gt=0)

    def identity(self) -> dict[str, Any]:
        """Plain values of what makes it another training: all but its length, where that can change on the way."""
        budget = {"minutes", "checkpoint_minutes", "kind"}
        if self.rate_schedule == "warmup-stable-decay":
            budget |= {"iterations", "epochs", "decay_fraction"}
        return self.model_dump(mode="json", exclude=budget)


class ClassifierTraining(Training):
    """A classifier, trained on cross-entropy.

    Attributes:
        width: channels of the first convolution.
        blocks: residual blocks of each stage: (3, 3, 3) with width 16 is ResNet-20 for 32x32 images,
            (2, 2, 2, 2) with width 64 ResNet-18; None: three plain convolutions. A first stage of 0
            leaves its side to one convolution, which saves most of the time.
    """

    width: int = Field(default=8, ge=1)
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup_fraction: float = Field(default=0.3, gt=0, lt=1)


class DenoiserTraining(Training):
    """A class-conditional Diffusers UNet2DModel on pixels or patches, with classifier-free dropout.

    In a settings file it is its attributes, or ``recipe`` with a name in `RECIPES` beside the
    attributes that differ.

    Attributes:
        patch: side in pixels of the patches that the network sees as channels; 1: it sees pixels.
        channels: of each resolution; each is half of the one before.
        attention: the resolutions, as indices of `channels`, that have self-attention.
        attention_head_dim: channels of a head of attention.
        scale_shift: whether timestep and label scale and shift (FiLM), in place of only shifting.
        prediction_type: what it predicts, by Diffusers' names: noise, or v (arXiv 2202.00512).
        timesteps: how they are drawn in training: uniform; or logit-normal (arXiv 2403.03206), the sigmoid of a normal
            number of timestep_mean and timestep_std, as a share of train_steps: 0 and 1 are around the middle.
        min_snr: gamma of the loss's min-SNR weighting (arXiv 2303.09556), 5 there; None: all timesteps weigh the same.
        iterations: steps of the optimizer.
        label_drop: share of images trained without their label (arXiv 2207.12598).
    """

    patch: int = Field(default=1, ge=1)
    channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = Field(default=1, ge=1)
    attention: tuple[int, ...] = ()
    attention_head_dim: int = Field(default=8, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    norm_groups: int = Field(default=8, ge=1)
    scale_shift: bool = False
    schedule: str = "squaredcos_cap_v2"
    train_steps: int = Field(default=1000, ge=2)
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timesteps: Literal["uniform", "logit-normal"] = "uniform"
    timestep_mean: float = 0.0
    timestep_std: float = Field(default=1.0, gt=0)
    min_snr: float | None = Field(default=None, gt=0)
    iterations: int = Field(default=1500, ge=1)
    label_drop: float = Field(default=0.15, ge=0, lt=1)
    ema: float = Field(default=0.995, ge=0, lt=1)
    gradient_clip: float | None = Field(default=1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _from_recipe(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "recipe" not in values:
            return values
        name = values["recipe"]
        if name not in RECIPES:
            raise ValueError(f"recipe: {name!r} is not one of {', '.join(RECIPES)}")
        return {**RECIPES[name].own(), **{key: each for key, each in values.items() if key != "recipe"}}

    @model_validator(mode="after")
    def _consistent(self) -> "DenoiserTraining":
        if wrong := [each for each in self.attention if not 0 <= each < len(self.channels)]:
            raise ValueError(f"attention: {wrong[0]} is not an index of channels, which has {len(self.channels)}")
        if wrong := [each for each in self.channels if each % self.norm_groups]:
            raise ValueError(f"channels: {wrong[0]} is not a multiple of norm_groups, {self.norm_groups}")
        # The deepest resolution always has attention, in the middle.
        attending = [self.channels[each] for each in self.attention] + [self.channels[-1]]
        if wrong := [each for each in attending if each % self.attention_head_dim]:
            raise ValueError(f"channels: {wrong[0]} is not a multiple of attention_head_dim, {self.attention_head_dim}")
        return self


# CIFAR-10 in patches of 4x4, quick where bfloat16 is, a processor with units for it included: 50 epochs. 15 M
# parameters.
_PATCH = DenoiserTraining(
    patch=4,
    channels=(192, 256),
    attention_head_dim=64,
    norm_groups=32,
    scale_shift=True,
    prediction_type="v_prediction",
    timesteps="logit-normal",
    iterations=18_700,
    batch_size=128,
    optimizer="muon",
    learning_rate=2e-3,
    rate_schedule="warmup-stable-decay",
    label_drop=0.12,
    ema=0.999,
    augmentation=Augmentation(flip=True),
)

RECIPES = {
    # Class-conditional CIFAR-10 and alike, 32x32: 20 minutes of one H200. 23 M parameters.
    "cifar10-cfg": DenoiserTraining(
        channels=(128, 192, 256),
        layers_per_block=2,
        attention=(1,),
        dropout=0.1,
        norm_groups=32,
        iterations=40_000,
        batch_size=256,
        learning_rate=4e-4,
        warmup_fraction=0.05,
        ema=0.9995,
        augmentation=Augmentation(flip=True),
        precision="bfloat16",
        minutes=20,
    ),
    # The same images on two processor cores: about an hour, five epochs. 1.4 M parameters.
    "cifar10-cpu": DenoiserTraining(
        channels=(24, 48, 96),
        iterations=3600,
        learning_rate=2e-3,
        warmup_fraction=0.05,
        ema=0.999,
        augmentation=Augmentation(flip=True),
    ),
    "cifar10-patch": _PATCH,
    # The same, sized for ten minutes of one H100. 44 M parameters, which in float16 fit beside a classifier into what
    # experiments/gpu brings back.
    "cifar10-patch-gpu": _PATCH.model_copy(
        update={
            "channels": (320, 448),
            "iterations": 20_000,
            "batch_size": 1024,
            "minutes": 10,
            "checkpoint_minutes": 1,
        }
    ),
}
"""Named settings of denoiser training."""


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
    key = "".join(each if each.isprintable() else "?" for each in ".".join(map(str, first["loc"]))) or "value"
    shown = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
    more = f"; and {len(details) - 1} more" if len(details) > 1 else ""
    return f"{key}: {first['msg']}{shown}{more}"
