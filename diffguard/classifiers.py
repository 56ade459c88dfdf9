"""Classifiers under protection: images in [0, 1] in, logits out, normalization inside."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffguard.errors import DataError, SettingError


class Classifier(Protocol):
    """What the method and the baselines ask of a classifier. Implementations are nn.Modules."""

    num_classes: int
    cam_layer: nn.Module
    """The last convolutional stage, where GradCAM looks."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] to logits [B, num_classes]."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] to penultimate features [B, D]."""
        ...


class ConvClassifier(nn.Module):
    """Three 3x3 convolutions with batch norm, global average pooling and a linear layer.

    Args:
        num_classes: number of labels.
        width: channels of the first convolution; the others have two and four times as many.
        in_channels: 1 for grayscale, 3 for RGB.
        mean, std: normalization of the images in [0, 1].
    """

    def __init__(
        self, num_classes: int, width: int = 8, in_channels: int = 1, mean: float = 0.3, std: float = 0.35
    ) -> None:
        super().__init__()
        self.config = dict(num_classes=num_classes, width=width, in_channels=in_channels, mean=mean, std=std)
        self.num_classes = num_classes
        self.mean, self.std = mean, std
        self.stages = nn.Sequential(
            _stage(in_channels, width, stride=1),
            _stage(width, 2 * width, stride=2),
            _stage(2 * width, 4 * width, stride=1),
        )
        self.head = nn.Linear(4 * width, num_classes)

    @property
    def cam_layer(self) -> nn.Module:
        return self.stages[-1]

    def features(self, images: Tensor) -> Tensor:
        maps: Tensor = self.stages((images - self.mean) / self.std)
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def save_classifier(classifier: ConvClassifier, path: Path) -> None:
    """Write weights and what rebuilds the network into one safetensors file."""
    kind = type(classifier)
    metadata = {"class": f"{kind.__module__}:{kind.__qualname__}", "config": json.dumps(classifier.config)}
    save_file({key: value.contiguous() for key, value in classifier.state_dict().items()}, path, metadata)


def load_classifier(path: str | Path) -> Any:
    """Load what `save_classifier` wrote, in eval mode.

    Raises:
        DataError: the file is missing, damaged, or does not fit its class.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no classifier here; train one (dvc repro train-classifier), or name its file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        factory = import_object(metadata["class"])
        classifier = factory(**json.loads(metadata["config"]))
        classifier.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise DataError(f"{path}: not a classifier that DiffGuard saved ({error})") from error
    return classifier.eval().requires_grad_(False)


def import_object(name: str) -> Any:
    """The object that ``package.module:name`` names.

    Raises:
        SettingError: there is no such module or name.

    Example:
        >>> import_object("diffguard.classifiers:ConvClassifier").__name__
        'ConvClassifier'
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{name}: cannot be imported as package.module:name ({error})") from error


@torch.no_grad()
def predict_logits(classifier: Classifier, images: Tensor) -> Tensor:
    """Logits of a batch, without gradients."""
    return classifier(images)
