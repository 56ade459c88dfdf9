"""A detector recalibrated: other InD calibration images, or another alpha, with the same models and settings."""

import hashlib
import io
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from diffguard.calibration.conformal import Array
from diffguard.deploy.detector import DeployedDetector
from diffguard.detectors.combination import Combined
from diffguard.errors import DataError, NotFiniteError
from diffguard.images import to_picture
from diffguard.settings import Combination
from diffguard.utils.names import readable
from diffguard.version import __version__

BATCH = 64


class CalibrationScores:
    """Scores of InD images that a detector is to be calibrated on, gathered image by image.

    Example:
        >>> gathered = CalibrationScores(detector)  # doctest: +SKIP
        >>> gathered.add("a.png", detector.prepare(picture))  # doctest: +SKIP
        >>> recalibrated(detector, gathered.table(), alpha=0.01)  # doctest: +SKIP
    """

    def __init__(self, detector: DeployedDetector) -> None:
        self._detector = detector
        self._waiting: list[Tensor] = []
        self._names: list[dict[str, Any]] = []
        self._parts: list[pd.DataFrame] = []

    def add(self, name: str, image: Tensor) -> None:
        """Take one prepared image [C, H, W] in."""
        stream = io.BytesIO()
        to_picture(image).save(stream, "PNG")
        self._names.append({"id": readable(name), "content_hash": hashlib.sha256(stream.getvalue()).hexdigest()})
        self._waiting.append(image)
        if len(self._waiting) == BATCH:
            self._score()

    def table(self) -> pd.DataFrame:
        """`diffguard.deploy.bundle.TABLE_COLUMNS`, and ``score/<row>`` of every variant and baseline."""
        if self._waiting:
            self._score()
        named = pd.DataFrame(self._names, columns=["id", "content_hash"])
        fixed = {"role": "ind", "dataset": "recalibration", "split": "calibration"}
        return pd.concat([named.assign(**fixed), pd.concat(self._parts, ignore_index=True)], axis=1)

    def _score(self) -> None:
        try:
            predicted, scores = self._detector.member_scores(torch.stack(self._waiting))
        except NotFiniteError as error:
            raise DataError(f"{self._names[-len(self._waiting) + error.rows[0]]['id']}: {error}") from None
        columns = {self._detector.column(name): each for name, each in scores.items()}
        self._parts.append(pd.DataFrame({"predicted": predicted, **columns}))
        self._waiting.clear()


def recalibrated(detector: DeployedDetector, table: pd.DataFrame, alpha: float | None = None) -> DeployedDetector:
    """The same detector with another calibration table.

    What was fitted of a combination (a cascade's band, a residual's line) stays; its z-scores are among the new
    images.

    Args:
        table: see `CalibrationScores.table`; InD images that trained nothing.
        alpha: the guaranteed false-rejection rate; None: as before.

    Raises:
        SettingError: too few images to guarantee that.
    """
    info = detector.info.model_copy(
        update={"diffguard": __version__, "alpha": detector.alpha if alpha is None else alpha}
    )
    calibration, validation = table.copy(), detector.validation.copy()
    members: dict[str, Array] = {}
    for name in detector.rows:
        column = detector.column(name)
        if isinstance(info.settings_of(name), Combination):
            combined = Combined.from_json(info.combined[name], members)
            calibration[column] = combined.score_calibration()
            scores = {member: validation[detector.column(member)].to_numpy(float) for member in combined.members}
            validation[column] = combined.score(scores)
        members[name] = calibration[column].to_numpy(np.float64)
    return DeployedDetector(
        info,
        detector.classifier,
        detector.denoiser,
        calibration=calibration,
        validation=validation,
        seen=detector.seen,
        example=detector.example,
        specs=detector.specs,
    )
