"""Names of distances and similarities, checked."""

from typing import Annotated

from pydantic import (
    AfterValidator,
)

DISTANCE_SIZES = {
    "l1": 1,
    "l2": 1,
    "logits": 1,
    "features": 1,
    "ssim": 11,
    "fsim": 2,
    "vif": 41,
    "mdsi": 1,
    "gmsd": 1,
    "lpips": 32,
    "dists": 16,
}
"""The distances of `diffguard.distances.functions`, with the side in pixels of the smallest image that each takes."""


def check_distance_name(name: str) -> str:
    if name not in DISTANCE_SIZES and ":" not in name:
        raise ValueError(f"{name!r} is not one of {', '.join(DISTANCE_SIZES)}, or package.module:name")
    return name


DistanceName = Annotated[str, AfterValidator(check_distance_name)]
"""A name in `DISTANCE_SIZES`, or ``package.module:name`` of a `diffguard.distances.functions.Distance`."""


def check_similarity_name(name: str) -> str:
    return name if name == "psnr" else check_distance_name(name)


PATH = "path"
"""In place of a variant's distance: its score is how unlikely the inversion path is."""


def check_score_name(name: str) -> str:
    if name not in (PATH, *DISTANCE_SIZES) and ":" not in name:
        raise ValueError(f"{name!r} is not one of {', '.join(DISTANCE_SIZES)}, {PATH}, or package.module:name")
    return name
