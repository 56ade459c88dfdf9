"""How far a reconstruction is from an image: higher is farther, one number per image.

DISTS, LPIPS, SSIM, FSIM, VIF, MDSI and GMSD are those of piq, as distances: 1 - similarity where
piq has a similarity. Any other comes by ``package.module:name``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguard.distances import perceptual
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import Classifier
from diffguard.settings import DISTANCE_SIZES
from diffguard.utils.importing import import_object

Distance = Callable[[Tensor, Tensor, Classifier], Tensor]
"""(images [B, C, H, W] in [0, 1], others likewise, classifier) -> distances [B].

One of the user's own may say the smallest side that it takes in an attribute ``min_size``.
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


def features(images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    """1 - cosine similarity of the classifier's penultimate features, in [0, 2]; needs no download."""
    with torch.no_grad():
        return 1 - F.cosine_similarity(classifier.features(images), classifier.features(others), dim=1)


def _piq(name: str, images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    import piq

    found: Tensor
    if name == "fsim":
        found = piq.fsim(images, others, reduction="none", chromatic=images.shape[1] == 3)
    else:
        found = getattr(piq, {"vif": "vif_p"}.get(name, name))(images, others, reduction="none")
    return found if name in ("mdsi", "gmsd") else 1 - found


def _perceptual(name: str, images: Tensor, others: Tensor, classifier: Classifier) -> Tensor:
    network = perceptual.load(name, images.device)
    # Both look at RGB.
    found: Tensor = network(images.expand(-1, 3, -1, -1), others.expand(-1, 3, -1, -1))
    return found


_NAMED: dict[str, Distance] = {
    "l1": l1,
    "l2": l2,
    "logits": logits,
    "features": features,
    **{name: partial(_piq, name) for name in ("ssim", "fsim", "vif", "mdsi", "gmsd")},
    **{name: partial(_perceptual, name) for name in ("lpips", "dists")},
}


def get_distance(name: str) -> Distance:
    """The distance of a name in `diffguard.settings.DISTANCE_SIZES`, or of ``package.module:name``.

    Raises:
        SettingError: no distance has this name.
    """
    if ":" in name:
        distance: Distance = import_object(name)
        return distance
    if name not in _NAMED:
        raise SettingError(f"distance: {name!r} is not one of {', '.join(_NAMED)}, or package.module:name")
    return _NAMED[name]


def check_distances(names: Sequence[str], side: int) -> None:
    """See that images of this side, in pixels, are large enough for these distances.

    Raises:
        SettingError: one of them needs larger images.
    """
    for name in names:
        least = DISTANCE_SIZES[name] if name in DISTANCE_SIZES else getattr(get_distance(name), "min_size", 1)
        if side < least:
            raise SettingError(f"distance: {name} takes images from {least}x{least} pixels up; these are {side}x{side}")
