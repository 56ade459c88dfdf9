"""Small classifiers that this library trains."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffguard.errors import SettingError
from diffguard.utils.processor import channels_last_corrupts


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
        blocks: number in each stage: (3, 3, 3) with width 16 is ResNet-20, (2, 2, 2, 2) with width 64 ResNet-18.
        width: channels of the first stage; each further stage has twice as many at half the resolution.
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
            layers = []
            for block in range(count):
                layers.append(_Residual(inputs, outputs, stride=2 if number > 0 and block == 0 else 1))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
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


class WhitenedClassifier(nn.Module):
    """A network that reaches much with little training (arXiv 2404.00498, section 3), for images of 32x32 pixels.

    2x2 patches are whitened by a convolution that is computed of the images, not trained; then in each stage two 3x3
    convolutions with batch norm and GELU, halved in side by a maximum after the first, which begin as the identity; the
    maximum over what is left, and a linear layer.

    Args:
        num_classes: number of labels.
        stages: channels of each.
        in_channels: 1 for grayscale, 3 for RGB.
        mean, std: normalization of the images in [0, 1].
    """

    whitening: Tensor

    def __init__(
        self,
        num_classes: int,
        stages: Sequence[int] = (64, 256, 256),
        in_channels: int = 3,
        mean: float = 0.5,
        std: float = 0.25,
    ) -> None:
        super().__init__()
        self.config = dict(num_classes=num_classes, stages=list(stages), in_channels=in_channels, mean=mean, std=std)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.mean, self.std = mean, std
        values = 4 * in_channels
        # Drawn, so that an untrained network tells images apart; `whiten` replaces it.
        self.register_buffer("whitening", torch.randn(2 * values, in_channels, 2, 2))
        self.bias = nn.Parameter(torch.zeros(2 * values))
        layers, inputs = [], 2 * values
        for outputs in stages:
            layers.append(_halving_stage(inputs, outputs))
            inputs = outputs
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= 3  # the largest of nine values is large
        # With AVX2 channels-last is 1.2 times as fast in training, 1.6 in prediction.
        suits = not channels_last_corrupts(self.parameters())
        self._memory_format = torch.channels_last if suits else torch.contiguous_format

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Compute the first convolution: the eigenvectors of 2x2 patches, scaled to unit variance, and their negatives.

        Args:
            images: [B, C, H, W] in [0, 1], some of those that it is to be trained on.
        """
        patches = F.unfold((images - self.mean) / self.std, 2).transpose(1, 2).flatten(0, 1)
        variances, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        kernel = (vectors / (variances + SMALLEST_VARIANCE).sqrt()).T.reshape(-1, *self.whitening.shape[1:])
        self.whitening.copy_(torch.cat([kernel, -kernel]))

    @property
    def cam_layer(self) -> nn.Module:
        return self.stages[-1]

    def features(self, images: Tensor) -> Tensor:
        whitened = F.gelu(F.conv2d((images - self.mean) / self.std, self.whitening, self.bias))
        maps: Tensor = self.stages(whitened.contiguous(memory_format=self._memory_format))
        return maps.amax(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


SMALLEST_VARIANCE = 5e-4
"""Added to those of patches, so that what hardly varies is not blown up."""


def _halving_stage(inputs: int, outputs: int) -> nn.Sequential:
    convolutions = [nn.Conv2d(channels, outputs, 3, padding=1, bias=False) for channels in (inputs, outputs)]
    for convolution in convolutions:
        nn.init.dirac_(convolution.weight[: convolution.in_channels])
    norms = [nn.BatchNorm2d(outputs) for _ in convolutions]
    first, second = convolutions
    return nn.Sequential(first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU())


class TransformerClassifier(nn.Module):
    """A vision transformer (arXiv 2010.11929) for small images: timm's, with a class token.

    Args:
        num_classes: number of labels.
        grid: patches along a side of the image.
        patch: side of a patch in pixels.
        width: channels of a token.
        depth: number of blocks.
        heads: of attention in a block.
        in_channels: 1 for grayscale, 3 for RGB.
        mean, std: normalization of the images in [0, 1].

    Raises:
        SettingError: timm is not installed.
    """

    def __init__(
        self,
        num_classes: int,
        grid: int,
        patch: int = 2,
        width: int = 32,
        depth: int = 4,
        heads: int = 4,
        in_channels: int = 1,
        mean: float = 0.5,
        std: float = 0.25,
    ) -> None:
        super().__init__()
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError:
            raise SettingError(
                "classifier: a vision transformer needs timm; pip install 'diffguard-ood[models]'"
            ) from None
        self.config = dict(
            num_classes=num_classes,
            grid=grid,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            in_channels=in_channels,
            mean=mean,
            std=std,
        )
        self.num_classes, self.in_channels, self.input_size = num_classes, in_channels, grid * patch
        self.mean, self.std = mean, std
        self.encoder = VisionTransformer(
            img_size=grid * patch,
            patch_size=patch,
            in_chans=in_channels,
            num_classes=0,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
        )
        self.head = nn.Linear(width, num_classes)

    @property
    def cam_layer(self) -> nn.Module:
        # After it only the class token reaches the logits.
        return self.encoder.get_submodule(f"blocks.{self.config['depth'] - 1}.norm1")

    def features(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder((images - self.mean) / self.std)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


SmallClassifier = ConvClassifier | ResidualClassifier | WhitenedClassifier | TransformerClassifier
"""A classifier that this library trains."""
