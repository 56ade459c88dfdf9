"""How classifiers and denoisers are trained."""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from diffguard.settings.base import Settings


class Augmentation(Settings):
    """Random changes of training images, each up to a maximum.

    Attributes:
        rotation: in degrees.
        scale: relative.
        shift: in pixels, of any fraction: one affine map.
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
        checkpoint_minutes: between checkpoints; None: half a minute, and more where writing one takes long.
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
    checkpoint_minutes: float | None = Field(default=None, gt=0)

    def identity(self) -> dict[str, Any]:
        """Plain values of what makes it another training: not what becomes of its weights, nor its length, where that
        can change on the way."""
        budget = {"minutes", "checkpoint_minutes", "kind", "stored", "license"}
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
        patch: side in pixels of the patches that a vision transformer (arXiv 2010.11929) sees as tokens of ``width``
            channels; None: a convolutional network.
        depth, heads: of a vision transformer, its blocks, and the heads of attention in each.
        stages: channels of each stage of a `diffguard.models.classifiers.WhitenedClassifier`, which reaches most in
            little training; None: another network.
        label_smoothing: share of the target that goes to all labels evenly (arXiv 1512.00567, section 7).
    """

    unwritten = frozenset({"stages", "label_smoothing"})

    width: int = Field(default=8, ge=1)
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    epochs: int = Field(default=12, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup_fraction: float = Field(default=0.3, gt=0, lt=1)
    patch: int | None = Field(default=None, ge=1)
    depth: int = Field(default=4, ge=1, le=100)
    heads: int = Field(default=4, ge=1)
    stages: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _of_one_network(self) -> "ClassifierTraining":
        if self.stages is not None and (others := self.model_fields_set & {"width", "blocks", "patch"}):
            raise ValueError(f"stages, {min(others)}: they are of different networks; leave one out")
        if self.patch is None:
            if unused := self.model_fields_set & {"depth", "heads"}:
                raise ValueError(f"{min(unused)}: it is of a vision transformer; give patch too")
            return self
        if self.blocks is not None:
            raise ValueError("blocks, patch: a network has residual blocks or is a vision transformer, not both")
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads, {self.heads}")
        return self

    @model_serializer(mode="wrap")
    def _without_unwritten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Models are named by the hash of this: without what is of other networks.
        others = set() if self.patch is not None else {"patch", "depth", "heads"}
        others |= set() if self.stages is None else {"width", "blocks"}
        values = super()._without_unwritten(handler)
        return {key: value for key, value in values.items() if key not in others}


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
        contrastive: weight of the distance to another image's target, which is subtracted (arXiv 2506.05350), 0.05
            there; None: it is not.
        wrong_label: weight of the cross-entropy of each image's own label against one drawn from the others, by the
            errors under both, as a diffusion classifier (arXiv 2303.16203) would tell them apart; such a step takes
            twice the time. 0.001 to 0.01; None: no such term.
        iterations: steps of the optimizer.
        label_drop: share of images trained without their label (arXiv 2207.12598).
    """

    unwritten = frozenset({"contrastive", "wrong_label"})

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
    contrastive: float | None = Field(default=None, gt=0, lt=1)
    wrong_label: float | None = Field(default=None, gt=0)
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
        return {**RECIPES[name].own(), **{key: value for key, value in values.items() if key != "recipe"}}

    @model_validator(mode="after")
    def _consistent(self) -> "DenoiserTraining":
        if wrong := [index for index in self.attention if not 0 <= index < len(self.channels)]:
            raise ValueError(f"attention: {wrong[0]} is not an index of channels, which has {len(self.channels)}")
        if wrong := [channels for channels in self.channels if channels % self.norm_groups]:
            raise ValueError(f"channels: {wrong[0]} is not a multiple of norm_groups, {self.norm_groups}")
        # The deepest resolution always has attention, in the middle.
        attending = [self.channels[index] for index in self.attention] + [self.channels[-1]]
        if wrong := [channels for channels in attending if channels % self.attention_head_dim]:
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
        }
    ),
}
"""Named settings of denoiser training."""
