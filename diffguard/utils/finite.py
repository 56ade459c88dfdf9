"""Checks that scores are finite: a NaN exceeds no threshold, and would count as in-distribution."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from diffguard.errors import NotFiniteError


def check_scores(scores: ArrayLike, of: str, names: Sequence[str] | None = None) -> None:
    """Check that all scores of a batch are finite.

    Args:
        scores: [B].
        of: what computed them, for the message.
        names: of the images [B], for the message; None: their indices.

    Raises:
        NotFiniteError: a score is NaN or infinite.

    Example:
        >>> check_scores([0.5, float("nan")], "detector cfg-w1", ["a.png", "b.png"])
        Traceback (most recent call last):
            ...
        diffguard.errors.NotFiniteError: detector cfg-w1: the score of b.png is nan, which is no decision; a model or \
its precision fails on this image
    """
    values = np.asarray(scores, dtype=np.float64)
    rows = np.flatnonzero(~np.isfinite(values)).tolist()
    if rows:
        image = f"image {rows[0]}" if names is None else names[rows[0]]
        more = f", and of {len(rows) - 1} more" if len(rows) > 1 else ""
        raise NotFiniteError(
            f"{of}: the score of {image} is {values[rows[0]]}{more}, which is no decision; a model or its precision "
            f"fails on {'these images' if more else 'this image'}",
            rows,
        )
