"""Monitoring: a deployed detector's decisions on production images, and whether its guarantee holds there."""

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import pandas as pd
from PIL import Image
from pydantic import Field

from diffguard.calibration.conformal import Conformal
from diffguard.calibration.drift import Rejection, Uniformity, rejection, uniformity
from diffguard.deploy.detector import Decision, DeployedDetector
from diffguard.deploy.info import DetectorInfo
from diffguard.errors import DataError
from diffguard.images import to_picture
from diffguard.loading import open_detector
from diffguard.settings import Settings
from diffguard.utils.names import label_name
from tasks.config.params import project_code
from tasks.production.detector import default_detector
from tasks.production.images import Incoming, Production

BATCH, SHOWN = 64, 24
"""Images that are decided at a time, and most OOD ones that are shown."""

Verdict = Literal["kept", "broken", "too few", "unreadable"]


class Monitoring(Settings):
    """What is monitored, and what counts as a broken guarantee.

    Attributes:
        images, column, limit: see `tasks.production.images.Production`.
        detector: a bundle's folder or an MLflow URI; None: the benchmark's, see `default_detector`.
        expected_rate: share of images that may be rejected, as observed before; None: the detector's
            false-rejection rate alpha, and what its calibration set allows by chance.
        at_least: fewest images that a verdict takes.
        most_unreadable: the largest share of images that may be unreadable.
        on_broken: whether a broken guarantee fails the run ("fail") or is only reported ("warn").
        trust_code: what the detector may name beside the code that the project's own files name; see
            `diffguard.deploy.bundle.load_bundle`.
    """

    images: str = Field(min_length=1)
    detector: str | None = None
    expected_rate: float | None = Field(default=None, gt=0, lt=1)
    limit: int | None = Field(default=None, ge=1)
    at_least: int = Field(default=50, ge=1)
    column: str | None = None
    most_unreadable: float = Field(default=0.05, ge=0, lt=1)
    on_broken: Literal["fail", "warn"] = "fail"
    trust_code: list[str] | None = None


@dataclass(frozen=True)
class Observed:
    """A detector's decisions on production images.

    Attributes:
        detector: its URI.
        bundle_hash: of its detector.json.
        calibration: how many images it was calibrated on.
        table: image (its name), and of `Decision` all but the reconstruction.
        most_ood: pictures of the `SHOWN` images with the smallest p-values (of equals, the highest scores),
            with their rows of the table.
        unreadable: the error of each image that could not be read.
    """

    settings: Monitoring
    detector: str
    info: DetectorInfo
    bundle_hash: str | None
    calibration: int
    table: pd.DataFrame
    most_ood: list[tuple[Image.Image, Any]]
    unreadable: list[str]
    rejection: Rejection
    uniformity: Uniformity
    seconds: float

    @property
    def share_unreadable(self) -> float:
        """Of all images."""
        return len(self.unreadable) / (len(self.unreadable) + len(self.table))

    @property
    def verdict(self) -> Verdict:
        """Whether the guarantee is kept or broken; "unreadable" and "too few" are no judgement."""
        if self.share_unreadable > self.settings.most_unreadable:
            return "unreadable"
        if len(self.table) < self.settings.at_least:
            return "too few"
        return "broken" if self.rejection.is_above else "kept"

    @property
    def fails(self) -> bool:
        """Whether the flow run is to end as failed."""
        return self.verdict == "unreadable" or (self.verdict == "broken" and self.settings.on_broken == "fail")

    @property
    def by_class(self) -> pd.DataFrame:
        """For each class, and each label beyond them that was predicted: class_name, predicted, rejected, rate."""
        groups = self.table.groupby("label")["is_ood"]
        counts = pd.DataFrame({"predicted": groups.size(), "rejected": groups.sum()})
        labels = counts.index.union(range(len(self.info.classes)))
        counts = counts.reindex(labels, fill_value=0).astype(int)
        names = [label_name(self.info.classes, label) for label in labels]
        return pd.DataFrame({"class_name": names, **counts, "rate": counts["rejected"] / counts["predicted"]}, labels)


def observe(settings: Monitoring, progress: Callable[[int, int], object] = lambda done, total: None) -> Observed:
    """Score production images with a deployed detector.

    Args:
        progress: called with the number of images done and in total.

    Raises:
        DataError, SettingError: see `Production`; or no image can be read.
        DataError, SettingError, ServiceError: see `diffguard.loading.open_detector`.
    """
    images = Production(settings.images, settings.column, settings.limit)
    uri = settings.detector or default_detector()
    detector = open_detector(uri, trust=[*project_code(), *(settings.trust_code or ())])
    detector.expect(len(images))
    start = time.perf_counter()
    decided, incoming = _Decided(), iter(images)
    while batch := list(islice(incoming, BATCH)):
        decided.take(batch, detector)
        progress(len(decided.rows) + len(decided.unreadable), len(images))
    if not decided.rows:
        raise DataError(
            f"{settings.images}: none of {len(images)} images can be read; the first: {decided.unreadable[0]}"
        )
    table = pd.DataFrame(decided.rows)
    judged: tuple[Conformal, Any, Any] = (detector.conformal, table["score"], table["label"])
    return Observed(
        settings,
        uri,
        detector.info,
        detector.bundle_hash,
        len(detector.calibration),
        table,
        [(picture, table.iloc[row]) for *_, row, picture in sorted(decided.most_ood, reverse=True)],
        decided.unreadable,
        rejection(*judged, expected=settings.expected_rate),
        uniformity(*judged),
        time.perf_counter() - start,
    )


@dataclass
class _Decided:
    """Decisions so far, and the pictures of the most OOD images among them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    most_ood: list[tuple[float, float, int, Image.Image]] = field(default_factory=list)

    def take(self, batch: list[Incoming], detector: DeployedDetector) -> None:
        """Decide on a batch."""
        import torch

        read = list(self._readable(batch, detector))
        decisions = detector.decide_each(torch.stack([image for _, image in read])) if read else []
        for (name, image), decision in zip(read, decisions, strict=True):
            if isinstance(decision, DataError):
                self.unreadable.append(f"{name}: {decision}")
                continue
            # The heap's first entry is the least OOD, which is replaced first; row numbers make ranks unique.
            rank = (-decision.p_value, decision.score, len(self.rows))
            self.rows.append({"image": name, **_columns(decision)})
            if len(self.most_ood) < SHOWN or rank > self.most_ood[0][:3]:
                push = heapq.heappush if len(self.most_ood) < SHOWN else heapq.heappushpop
                push(self.most_ood, (*rank, to_picture(image)))

    def _readable(self, batch: list[Incoming], detector: DeployedDetector) -> Iterator[tuple[str, Any]]:
        for image in batch:
            try:
                yield image.name, detector.prepare(image.open(), image.name)
            except DataError as error:
                self.unreadable.append(str(error))


def _columns(decision: Decision) -> dict[str, Any]:
    return {name: value for name, value in vars(decision).items() if name != "reconstruction"}
