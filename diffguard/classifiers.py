"""Classifiers under protection: images in [0, 1] in, logits out, normalization inside."""

import json
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffguard.errors import DataError, SettingError
from diffguard.models.weights import give_weights, read_weights
from diffguard.utils.importing import OWN, check_names, import_object
from diffguard.utils.text import first_line


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
        self.num_classes, self.in_channels = num_classes, in_channels
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


class ResidualClassifier(nn.Module):
    """A residual network for small images (arXiv 1512.03385, section 4.2), with 1x1 convolutions where shapes change.

    Args:
        num_classes: number of labels.
        blocks: of each stage: (3, 3, 3) with width 16 is ResNet-20, (2, 2, 2, 2) with width 64 a ResNet-18.
        width: channels of the first stage; each further one has twice as many at half the side.
        in_channels: 1 for grayscale, 3 for RGB.
        mean, std: normalization of the images in [0, 1].
    """

    def __init__(
        self,
        num_classes: int,
        blocks: Sequence[int] = (3, 3, 3),
        width: int = 16,
        in_channels: int = 3,
        mean: float = 0.5,
        std: float = 0.25,
    ) -> None:
        super().__init__()
        self.config = dict(
            num_classes=num_classes, blocks=list(blocks), width=width, in_channels=in_channels, mean=mean, std=std
        )
        self.num_classes, self.in_channels = num_classes, in_channels
        self.mean, self.std = mean, std
        self.stem = _stage(in_channels, width, stride=1)
        stages, inputs = [], width
        for number, count in enumerate(blocks):
            outputs = width * 2**number
            made = []
            for block in range(count):
                made.append(_Residual(inputs, outputs, stride=2 if number > 0 and block == 0 else 1))
                inputs = outputs
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, num_classes)

    @property
    def cam_layer(self) -> nn.Module:
        return self.stages[-1]

    def features(self, images: Tensor) -> Tensor:
        maps: Tensor = self.stages(self.stem((images - self.mean) / self.std))
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _stage(inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class NetworkClassifier(nn.Module):
    """Any classification network of torchvision, timm or one's own, as DiffGuard takes it.

    Args:
        network: normalized images [B, C, H, W] in, logits [B, num_classes] out; its last Linear layer
            is taken for the head, whose input are the features.
        cam_layer: dotted name of the module where GradCAM looks: the last convolutional stage
            ("layer4" of a ResNet), or, in a vision transformer, the last block's first norm
            ("encoder.layers.encoder_layer_11.ln_1" of torchvision's, "blocks.11.norm1" of timm's).
            None: found by `find_cam_layer`, with images of the side `size`.
        mean, std: normalization of images in [0, 1], one number a channel; by default ImageNet's.
        size: side of the images in pixels.
        fixed: it takes images of that side alone.
        class_names: of its labels, in order, if they are known.

    Raises:
        SettingError: the network has no such module, or no Linear layer, or none where GradCAM could look.

    Example:
        >>> from torchvision.models import resnet18
        >>> classifier = NetworkClassifier(resnet18(num_classes=10), "layer4")
        >>> classifier(torch.rand(2, 3, 64, 64)).shape, classifier.features(torch.rand(2, 3, 64, 64)).shape
        (torch.Size([2, 10]), torch.Size([2, 512]))
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        cam_layer: str | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        *,
        size: int = 224,
        fixed: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
        modules = dict(network.named_modules())
        if not heads:
            raise SettingError(f"network: {type(network).__name__} has no Linear layer for a head")
        if cam_layer is not None and cam_layer not in modules:
            some = ", ".join(name for name in list(modules)[1:] if "." not in name)
            raise SettingError(f"cam_layer: {type(network).__name__} has no module {cam_layer!r}; it has {some}")
        self.network = network.eval().requires_grad_(False)
        self.in_channels = _in_channels(network) or len(mean)
        self.input_size = size if fixed else None
        self.class_names = None if class_names is None else list(class_names)
        for key, values in {"mean": mean, "std": std}.items():
            if len(values) not in (1, self.in_channels):
                raise SettingError(f"{key}: {len(values)} numbers for images of {self.in_channels} channels")
        self._cam_layer = cam_layer or find_cam_layer(network, (self.in_channels, size, size))
        self.num_classes = heads[-1].out_features
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    @property
    def cam_layer(self) -> nn.Module:
        return self.network.get_submodule(self._cam_layer)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits

    def features(self, images: Tensor) -> Tensor:
        head = [module for module in self.network.modules() if isinstance(module, nn.Linear)][-1]
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self(images)
        finally:
            hook.remove()
        return seen[0]


def _in_channels(network: nn.Module) -> int | None:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


@torch.no_grad()
def find_cam_layer(network: nn.Module, shape: tuple[int, int, int]) -> str:
    """The dotted name of the module where GradCAM looks, found by sending one image through.

    Of a convolutional network, or one whose windows keep maps (Swin), the last module that puts out maps
    larger than one pixel. Of a vision transformer the first norm of the last block: after it, only the class
    token reaches the logits.

    Args:
        shape: (channels, height, width) of the images that it takes.

    Raises:
        SettingError: it does not take such images, or has no such module.
    """
    outputs: list[tuple[str, nn.Module, Tensor]] = []
    # The network's own output is none.
    hooks = [
        module.register_forward_hook(lambda module, _, out, name=name: outputs.append((name, module, out)))
        for name, module in network.named_modules()
        if name
    ]
    kind = type(network).__name__
    try:
        network(torch.zeros(1, *shape, device=next(network.parameters()).device))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = first_line(error)
        raise SettingError(f"classifier: {kind} does not take images of {shape} ({reason})") from None
    finally:
        for hook in hooks:
            hook.remove()
    found, norms = "", dict[str, str]()
    for name, module, out in outputs:
        if not isinstance(out, Tensor):
            continue
        if out.ndim == 4 and out.shape[2] > 1 and (out.shape[3] > 1 or out.shape[1] == out.shape[2]):
            found = name
        elif out.ndim == 3 and isinstance(module, nn.LayerNorm):
            block = name.rpartition(".")[0]
            # The second norm of one block: it is a transformer's.
            if block in norms:
                found = norms[block]
            norms.setdefault(block, name)
    if not found:
        raise SettingError(f"cam_layer: none was found in {kind}; give the dotted name of a module that puts out maps")
    return found


def save_classifier(classifier: ConvClassifier | ResidualClassifier, path: Path) -> None:
    """Write weights and what rebuilds the network into one safetensors file."""
    kind = type(classifier)
    metadata = {"class": f"{kind.__module__}:{kind.__qualname__}", "config": json.dumps(classifier.config)}
    save_file({key: value.contiguous() for key, value in classifier.state_dict().items()}, path, metadata)


def load_classifier(path: str | Path, trust: Collection[str] = ()) -> Any:
    """Load what `save_classifier` wrote, in eval mode.

    Args:
        trust: code that the file may name beside this library's classes; see `diffguard.utils.importing`.

    Raises:
        DataError: the file is missing, damaged, does not fit its class, or names code that is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no classifier here; train one (dvc repro train-classifier), or name its file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        name, config = metadata["class"], json.loads(metadata["config"])
        if not isinstance(config, dict):
            raise TypeError("its configuration is none")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path}: not a classifier that DiffGuard saved ({first_line(error)})") from error
    check_names([name], path, trust)
    state, make = read_weights(path), import_object(name)
    most = max(len(state), *(max(value.shape, default=0) for value in state.values()))
    if too_large := [key for key, value in config.items() if _largest(value) > most]:
        raise DataError(f"{path}: {too_large[0]}: {config[too_large[0]]} is more than its weights could fill")
    try:
        # Without memory, of which none is taken for what the file does not hold.
        with torch.device("meta") if name in OWN else nullcontext():
            classifier = make(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not a classifier that DiffGuard saved ({first_line(error)})") from error
    if name in OWN and (text := [key for key, value in config.items() if not _is_numbers(value)]):
        raise DataError(f"{path}: {text[0]}: {config[text[0]]!r} is not a number")
    if not isinstance(classifier, nn.Module):
        raise DataError(f"{path}: not a classifier that DiffGuard saved ({name} makes no network)")
    give_weights(classifier, state, path, name.rpartition(":")[2])
    return classifier.eval().requires_grad_(False)


def _is_numbers(value: Any) -> bool:
    """Whether a value of a configuration is a number, or a list of them."""
    return all(isinstance(number, int | float) for number in (value if isinstance(value, list) else [value]))


def _largest(value: Any) -> float:
    """The largest number in a value of a configuration, or how long a list is."""
    if isinstance(value, list):
        return max([float(len(value)), *map(_largest, value)])
    return float(value) if isinstance(value, int | float) else 0.0


PART = 64
"""Images that a classifier sees at once: enough for its speed, few enough for the memory of large images."""


@torch.no_grad()
def predict_logits(classifier: Classifier, images: Tensor) -> Tensor:
    """Logits of a batch of any size, without gradients."""
    return torch.cat([classifier(part) for part in torch.split(images, PART)])
