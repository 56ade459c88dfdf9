"""How far a reconstruction is from an image: higher is farther, one number per image.

DISTS, LPIPS, SSIM, FSIM, VIF, MDSI and GMSD are those of piq, as distances: 1 - similarity where
piq has a similarity. Any other comes by ``package.module:name``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguard.distances import perceptual
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import Classifier
from diffguard.settings import DISTANCES
from diffguard.utils.importing import import_object

Distance = Callable[[Tensor, Tensor, Classifier], Tensor]
"""(images [B, C, H, W] in [0, 1], others likewise, classifier) -> distances [B].

A custom one may give the smallest side that it takes as an attribute ``min_size``.
"""


def l1(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """Mean absolute difference of pixel values, in [0, 1]."""
    return (images - others).abs().flatten(1).mean(dim=1)


def l2(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """Euclidean norm of the difference of pixel values: a norm, not a mean (as published)."""
    norms: Tensor = torch.linalg.vector_norm(images - others, dim=(1, 2, 3))
    return norms


def logits(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """L1 sum of the difference of the classifier's logits (the paper's CIFAR-10 distance)."""
    with torch.no_grad():
        return (classifier(images) - classifier(others)).abs().sum(dim=1)


def logits_normalized(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """L1 sum of the difference of the classifier's logits, brought to L2 norm 1 first (arXiv 2211.11255).

    In [0, 2 sqrt(K)] for K classes. Unlike `logits` it does not depend on how large the logits are.
    """
    with torch.no_grad():
        return _l1_of_normalized(classifier(images), classifier(others))


def features(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """1 - cosine similarity of the classifier's penultimate features, in [0, 2]; needs no download."""
    with torch.no_grad():
        return 1 - F.cosine_similarity(classifier.features(images), classifier.features(others), dim=1)


def features_normalized(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """L1 sum of the difference of the penultimate features, brought to L2 norm 1 first (arXiv 2211.11255).

    In [0, 2 sqrt(D)] for D features; in [0, sqrt(2 D)] where none is negative, as after a ReLU.
    """
    with torch.no_grad():
        return _l1_of_normalized(classifier.features(images), classifier.features(others))


def ssim(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """1 - SSIM."""
    return 1 - _piq("ssim", images, others)


def fsim(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """1 - FSIM, of colour images FSIMc."""
    return 1 - _piq("fsim", images, others, chromatic=images.shape[1] == 3)


def vif(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """1 - VIF in the pixel domain."""
    return 1 - _piq("vif_p", images, others)


def mdsi(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """MDSI."""
    return _piq("mdsi", images, others)


def gmsd(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """GMSD."""
    return _piq("gmsd", images, others)


def lpips(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """LPIPS (arXiv 1801.03924)."""
    return _perceptual("lpips", images, others)


def dists(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """DISTS (arXiv 2004.07728)."""
    return _perceptual("dists", images, others)


def _l1_of_normalized(values: Tensor, others: Tensor) -> Tensor:
    return (F.normalize(values, dim=1) - F.normalize(others, dim=1)).abs().sum(dim=1)


def _piq(metric: str, images: Tensor, others: Tensor, **options: Any) -> Tensor:
    import piq

    values: Tensor = getattr(piq, metric)(images, others, reduction="none", **options)
    return values


def _perceptual(name: str, images: Tensor, others: Tensor) -> Tensor:
    network = perceptual.load(name, images.device)
    # Both take RGB.
    values: Tensor = network(images.expand(-1, 3, -1, -1), others.expand(-1, 3, -1, -1))
    return values


def get_distance(name: str) -> Distance:
    """The distance of a name in `diffguard.settings.DISTANCES`, or of ``package.module:name``.

    Raises:
        SettingError: no distance has this name.
    """
    if ":" not in name and name not in DISTANCES:
        raise SettingError(f"distance: {name!r} is not one of {', '.join(DISTANCES)}, or package.module:name")
    distance: Distance = import_object(DISTANCES[name].function if name in DISTANCES else name)
    return distance


def difference_map(image: Tensor, reconstruction: Tensor, unconditional: Tensor, against: str) -> Tensor:
    """Where a reconstruction differs from what it is compared with, as a picture: 0 nowhere, 1 by 0.5 or more.

    Args:
        image, reconstruction, unconditional: [..., C, H, W] in [0, 1].
        against: see `diffguard.settings.Variant`. Under ``gain`` it is the difference from the image where that is
            larger than the unconditional reconstruction's, by how much.

    Returns:
        [..., C, H, W] in [0, 1].
    """
    difference = (reconstruction - (unconditional if against == "unconditional" else image)).abs()
    if against == "gain":
        difference = difference - (unconditional - image).abs()
    return (2 * difference).clamp(0, 1)


def check_distances(names: Sequence[str], side: int) -> None:
    """Check that images of this side, in pixels, are large enough for these distances.

    Raises:
        SettingError: one of them needs larger images.
    """
    for name in names:
        least = DISTANCES[name].min_size if name in DISTANCES else getattr(get_distance(name), "min_size", 1)
        if side < least:
            raise SettingError(f"distance: {name} takes images from {least}x{least} pixels up; these are {side}x{side}")
