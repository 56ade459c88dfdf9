"""The distances between images that settings may name."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator


@dataclass(frozen=True)
class DistanceKind:
    """A distance.

    Attributes:
        function: ``package.module:name`` of a `diffguard.distances.functions.Distance`.
        min_size: side in pixels of the smallest image that it takes.
    """

    function: str
    min_size: int = 1


DISTANCES = {
    "l1": DistanceKind("diffguard.distances.functions:l1"),
    "l2": DistanceKind("diffguard.distances.functions:l2"),
    "logits": DistanceKind("diffguard.distances.functions:logits"),
    "logits-normalized": DistanceKind("diffguard.distances.functions:logits_normalized"),
    "features": DistanceKind("diffguard.distances.functions:features"),
    "features-normalized": DistanceKind("diffguard.distances.functions:features_normalized"),
    "ssim": DistanceKind("diffguard.distances.functions:ssim", min_size=11),
    "fsim": DistanceKind("diffguard.distances.functions:fsim", min_size=2),
    "vif": DistanceKind("diffguard.distances.functions:vif", min_size=41),
    "mdsi": DistanceKind("diffguard.distances.functions:mdsi"),
    "gmsd": DistanceKind("diffguard.distances.functions:gmsd"),
    "lpips": DistanceKind("diffguard.distances.functions:lpips", min_size=32),
    "dists": DistanceKind("diffguard.distances.functions:dists", min_size=16),
}
"""By the name that settings have. A new distance is a function and a line here."""

PATH = "path"
"""In place of a variant's distance: its score is how unlikely the inversion path is."""

LABEL_GAIN = "label-gain"
"""In place of a variant's distance: how much better the image is denoised under the label than under none."""

POSTERIOR = "denoiser-posterior"
"""In place of a variant's distance: the denoiser as a classifier, and its odds against the label."""

ACTIVATIONS = "denoiser-activations"
"""In place of a variant's distance: how unlikely the activations inside the denoiser are."""

SINGLE_STEP = (LABEL_GAIN, POSTERIOR, ACTIVATIONS)
"""Scores of single evaluations of the network: nothing is inverted or reconstructed."""


def check_distance_name(name: str) -> str:
    """A name in `DISTANCES`, or ``package.module:name``; anything else is a ValueError."""
    return _check_name(name, DISTANCES)


def check_similarity_name(name: str) -> str:
    """``psnr``, or the name of a distance."""
    return name if name == "psnr" else check_distance_name(name)


def check_score_name(name: str) -> str:
    """The name of a distance, `PATH`, or one of `SINGLE_STEP`."""
    return _check_name(name, [*DISTANCES, PATH, *SINGLE_STEP])


def _check_name(name: str, known: dict[str, DistanceKind] | list[str]) -> str:
    if name not in known and ":" not in name:
        raise ValueError(f"{name!r} is not one of {', '.join(known)}, or package.module:name")
    return name


DistanceName = Annotated[str, AfterValidator(check_distance_name)]
"""A name in `DISTANCES`, or ``package.module:name`` of a `diffguard.distances.functions.Distance`."""
