"""Tiny networks of every kind, each with the parts that a user of pytorch-ood would take it apart into by hand."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.vision_transformer import VisionTransformer

from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.classifiers.wrapped import NetworkClassifier

CLASSES = 4
SHAPE = (3, 16, 16)


@dataclass(frozen=True)
class Network:
    """A classifier, taken apart by hand.

    Attributes:
        maps, head: from images to maps before the head, and from these to logits; None: it has no maps.
        parts: of the network up to `maps`, one after another.
        layers: dotted names of the modules that end these parts.
        train, labels, new: images, and their labels: what the classifier predicts, so that SHE finds each class.
    """

    classifier: nn.Module
    linear: nn.Linear
    maps: Callable[[Tensor], Tensor] | None
    head: Callable[[Tensor], Tensor] | None
    parts: list[nn.Module]
    layers: tuple[str, ...]
    train: Tensor
    labels: Tensor
    new: Tensor

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.train.split(50), self.labels.split(50), strict=True))


class Then(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _images(count: int, seed: int) -> Tensor:
    noise = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    # Of different brightness and contrast, so that they are of different classes.
    return (noise * torch.linspace(0.1, 1, count)[:, None, None, None]).mul(255).round() / 255


def _network(classifier, linear, maps=None, head=None, parts=(), layers=()) -> Network:
    """With weights that spread the images over all classes."""
    train, new = _images(150, 1), _images(20, 2)
    with torch.no_grad():
        nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(3))
        features = classifier.features(train)
        linear.weight /= (features @ linear.weight.T).std(dim=0)[:, None] / 2
        linear.bias.copy_(-(features @ linear.weight.T).mean(dim=0))
        labels = classifier(train).argmax(dim=1)
    assert len(labels.unique()) == CLASSES
    return Network(classifier, linear, maps, head, list(parts), tuple(layers), train, labels, new)


def _conv() -> Network:
    classifier = ConvClassifier(CLASSES, width=4, in_channels=3).eval().requires_grad_(False)

    def normal(x):
        return (x - classifier.mean) / classifier.std

    return _network(
        classifier,
        classifier.head,
        maps=lambda x: classifier.stages(normal(x)),
        head=lambda maps: classifier.head(maps.mean(dim=(2, 3))),
        parts=[nn.Sequential(Then(normal), classifier.stages[0]), classifier.stages[1], classifier.stages[2]],
        layers=("stages.0", "stages.1", "stages.2"),
    )


def _densenet() -> Network:
    """Between its maps and their mean is a ReLU."""
    network = DenseNet(growth_rate=4, block_config=(1, 1), num_init_features=8, bn_size=2, num_classes=CLASSES)
    classifier = NetworkClassifier(network, "features", size=16)

    def normal(x):
        return (x - classifier.mean) / classifier.std

    stages = network.features
    return _network(
        classifier,
        network.classifier,
        maps=lambda x: stages(normal(x)),
        head=lambda maps: network.classifier(F.adaptive_avg_pool2d(F.relu(maps), 1).flatten(1)),
        parts=[nn.Sequential(Then(normal), *stages[:6]), nn.Sequential(*stages[6:])],
        layers=("features.transition1", "features.norm5"),
    )


def _vit() -> Network:
    network = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )
    return _network(NetworkClassifier(network, size=16, fixed=True), network.heads.head)


def _timm_vit() -> Network:
    network = TimmViT(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES)
    return _network(NetworkClassifier(network, size=16, fixed=True), network.head)


NETWORKS = {"conv": _conv, "densenet": _densenet, "vit": _vit, "timm-vit": _timm_vit}


def network(name: str) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]()
