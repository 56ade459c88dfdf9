"""From InD calibration scores to the threshold of a decision."""

import numpy as np
from numpy.typing import ArrayLike

from diffguard.errors import SettingError


def accept_threshold(calibration: ArrayLike, accept: float) -> float:
    """The smallest threshold that accepts at least a share of InD images; a score above it is OOD.

    It is the ceil(accept * (n + 1))-th smallest of n calibration scores, so that a new InD image is
    accepted with probability at least `accept` (split conformal prediction, arXiv 2107.07511).

    Args:
        calibration: InD outlier scores [n], from images that trained nothing.
        accept: share of InD to accept, in (0, 1).

    Raises:
        SettingError: n is too small to promise that share.

    Example:
        >>> accept_threshold(range(1, 100), accept=0.95)
        95.0
    """
    scores = np.sort(np.asarray(calibration, float))
    if not 0 < accept < 1:
        raise SettingError(f"calibrate.accept: {accept} is not between 0 and 1")
    rank = int(np.ceil(accept * (len(scores) + 1) - 1e-9))
    if rank > len(scores):
        needed = int(np.ceil(accept / (1 - accept) - 1e-9))
        raise SettingError(
            f"calibrate.accept: {accept:g} needs at least {needed} calibration images, there are {len(scores)}"
        )
    return float(scores[rank - 1])
