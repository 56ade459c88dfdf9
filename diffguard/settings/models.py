"""Where models come from: trained by this project, from a file, a library, a hub, or the user's own code.

`diffguard.models.classifiers.loading.open_classifier` and `diffguard.models.denoisers.loading.open_denoiser` turn these
settings into models.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from diffguard.settings.base import Settings
from diffguard.settings.training import ClassifierTraining, DenoiserTraining


def _check_object(name: str) -> str:
    if ":" not in name:
        raise ValueError(f"{name!r} is not package.module:name")
    return name


ObjectName = Annotated[str, AfterValidator(_check_object)]
"""``package.module:name`` of what makes a model when it is called."""


class ClassifierFile(Settings):
    """A classifier that DiffGuard saved (safetensors)."""

    kind: Literal["file"]
    path: str


class LibraryClassifier(Settings):
    """A network of timm or torchvision by its name there; normalization and class names come along.

    Attributes:
        weights: a local checkpoint (safetensors, or a state dict of torch.save) of that network; None:
            the library's own pre-trained weights, from its cache or by a download.
        num_classes: of the checkpoint; None: read off its last layer.
        arguments: others of timm.create_model, or of torchvision's builder, as img_size of a transformer.
        cam_layer: dotted name of the module where GradCAM looks; None: found.
        mean, std: normalization of images in [0, 1], one number a channel; None: the library's.
    """

    kind: Literal["timm", "torchvision"]
    name: str
    weights: str | None = None
    num_classes: int | None = Field(default=None, ge=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    cam_layer: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class ObjectClassifier(Settings):
    """A custom network: what ``package.module:name`` returns when called with the arguments.

    It may be a `diffguard.models.classifiers.base.Classifier` as it is, or any network that takes normalized
    images, which is then wrapped (`NetworkClassifier`).

    Attributes:
        weights: a state dict to load into it (safetensors or torch.save); None: it has its weights.
        cam_layer, mean, std: see `LibraryClassifier`; None: found, 0 and 1.
    """

    kind: Literal["object"]
    object: ObjectName
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    cam_layer: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class TrainedClassifier(ClassifierTraining):
    """A classifier that this project trains on the train split."""

    kind: Literal["trained"]


ClassifierSpec = Annotated[
    TrainedClassifier | ClassifierFile | LibraryClassifier | ObjectClassifier, Field(discriminator="kind")
]


class PretrainedDenoiser(Settings):
    """A diffusion model in Diffusers' layout: a folder, or an id of the Hugging Face hub.

    Unconditional or class-conditional on pixels, class-conditional latent (latent diffusion, DiT), or
    text-conditioned (Stable Diffusion), told by its parts.

    Attributes:
        path: a folder, or a hub id as in ``facebook/DiT-XL-2-256``.
        labels: the denoiser's label of each class of the benchmark, in order; None: they are the same.
        prompt: of a text-conditioned model, what it is told of a class; {} stands for its name.
        null_prompt: what unconditional prediction is told.
        size: side in pixels of the images that a latent model is given; None: that of its training.
        patch: side in pixels of the patches that a UNet on pixels sees as channels; None: by its channels.
    """

    kind: Literal["pretrained"]
    path: str
    labels: tuple[int, ...] | None = None
    prompt: str = "a photo of a {}"
    null_prompt: str = ""
    size: int | None = Field(default=None, ge=8)
    patch: int | None = Field(default=None, ge=1)


class ObjectDenoiser(Settings):
    """A custom `diffguard.models.denoisers.base.Denoiser`: what ``package.module:name`` returns when called."""

    kind: Literal["object"]
    object: ObjectName
    arguments: dict[str, Any] = Field(default_factory=dict)
    labels: tuple[int, ...] | None = None


class TrainedDenoiser(DenoiserTraining):
    """A denoiser that this project trains on the train split.

    Attributes:
        stored: type of the weights that are kept, to which they are rounded; float16 takes half the space.
        license: of the weights, for their card, by its name on the Hugging Face hub (``cc-by-4.0``) or in words.
    """

    unwritten = DenoiserTraining.unwritten | {"stored", "license"}

    kind: Literal["trained"]
    stored: Literal["float32", "float16"] = "float32"
    license: str | None = Field(default=None, min_length=1)


DenoiserSpec = Annotated[TrainedDenoiser | PretrainedDenoiser | ObjectDenoiser, Field(discriminator="kind")]
