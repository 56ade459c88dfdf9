"""A wrapper that makes a classifier of any classification network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.models.modules import find_module
from diffguard.utils.text import first_line


class NetworkClassifier(nn.Module):
    """A classifier made of any classification network: of torchvision, of timm, or custom.

    Args:
        network: maps normalized images [B, C, H, W] to logits [B, num_classes]; its last Linear layer is taken as
            the head, whose inputs are the features.
        cam_layer: dotted name of the module for GradCAM: the last convolutional stage ("layer4" of a ResNet), or,
            in a vision transformer, the last block's first norm ("encoder.layers.encoder_layer_11.ln_1" in
            torchvision, "blocks.11.norm1" in timm). None: selected by `find_cam_layer`.
        mean, std: normalization of images in [0, 1], one number for each channel or for all; default: ImageNet's.
        size: side of the images in pixels.
        fixed: whether the network takes only images of this size.
        class_names: names of the labels, in order, if they are known.

    Raises:
        SettingError: the network has no such module, no Linear layer, or no module that suits GradCAM.

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
        if not heads:
            raise SettingError(f"network: {type(network).__name__} has no Linear layer for a head")
        if cam_layer is not None:
            find_module(network, cam_layer, "cam_layer", type(network).__name__)
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
        captured: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
        try:
            self(images)
        finally:
            hook.remove()
        return captured[0]


def _in_channels(network: nn.Module) -> int | None:
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


@torch.no_grad()
def find_cam_layer(network: nn.Module, shape: tuple[int, int, int]) -> str:
    """Select the module for GradCAM by one evaluation of the network; returns its dotted name.

    In a convolutional network, or one whose windows keep maps (Swin), it is the last module that outputs maps larger
    than one pixel. In a vision transformer it is the first norm of the last block: after it, only the class token
    reaches the logits.

    Args:
        shape: (channels, height, width) of the network's images.

    Raises:
        SettingError: the network does not take such images, or has no such module.
    """
    outputs: list[tuple[str, nn.Module, Tensor]] = []
    # The network itself (name "") is not a candidate.
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
    selected, norms = "", dict[str, str]()
    for name, module, out in outputs:
        if not isinstance(out, Tensor):
            continue
        if out.ndim == 4 and out.shape[2] > 1 and (out.shape[3] > 1 or out.shape[1] == out.shape[2]):
            selected = name
        elif out.ndim == 3 and isinstance(module, nn.LayerNorm):
            block = name.rpartition(".")[0]
            # Two norms in one block are a transformer's.
            if block in norms:
                selected = norms[block]
            norms.setdefault(block, name)
    if not selected:
        raise SettingError(f"cam_layer: none was found in {kind}; give the dotted name of a module that outputs maps")
    return selected
