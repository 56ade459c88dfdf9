"""A detector as it is deployed: images in, decisions out, with the reasons as pictures."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffguard.calibration.conformal import Array, Conformal
from diffguard.deploy.explanation import Reasons, draw_reasons, shortened
from diffguard.deploy.info import DetectorInfo
from diffguard.deploy.scorer import Scorer
from diffguard.errors import DataError, NotFiniteError
from diffguard.images import to_format, to_tensor
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser
from diffguard.models.gradcam import cam_maps
from diffguard.settings import Combination
from diffguard.utils.finite import check_scores
from diffguard.utils.names import label_name


@dataclass(frozen=True)
class Decision:
    """What a detector says of one image.

    Attributes:
        label, class_name: the classifier's prediction.
        confidence: its softmax, in [0, 1].
        score: outlier score, higher = more OOD.
        p_value: conformal p-value, in (0, 1]: the share of InD images that look at least as unusual.
        is_ood: p_value <= alpha.
        diffused: whether it went through the diffusion model; a cascade's gate spares clear cases that.
        reconstruction: [C, H, W] in [0, 1], under the label that decided; None if it was not asked for, or
            there is none.
    """

    label: int
    class_name: str
    confidence: float
    score: float
    p_value: float
    is_ood: bool
    diffused: bool
    reconstruction: Tensor | None = None


class DeployedDetector:
    """A classifier under protection, with the detector that guards it and its calibration.

    One thread at a time is answered; others wait.

    Attributes:
        bundle_hash: SHA-256 of the detector.json that it was loaded from, which holds the hashes of all other
            files; None: it was not.

    Args:
        info: what it is.
        classifier, denoiser: on the device where images are decided; no denoiser, if no row diffuses.
        calibration, validation: `diffguard.deploy.bundle.TABLE_COLUMNS`, ``score`` (the detector's) and
            ``score/<row>`` of each row that it is made of.
        seen: by what baselines see, the values [N, ...] and labels [N] of the train split; see
            `diffguard.detectors.baselines.views_of`.
        example: an InD image, as documentation of what to send.
        specs: of the models that come from elsewhere, by "classifier" and "denoiser".
        slots: images in a network call; None: measured when the first image is diffused.

    Raises:
        SettingError: a row is unknown, or cannot be deployed.
        DataError: a calibration score is missing, or there are too few to guarantee alpha.

    Example:
        >>> detector = load_bundle("data/digits/detector")  # doctest: +SKIP
        >>> [decision] = detector.decide(detector.prepare(picture)[None])  # doctest: +SKIP
        >>> decision.class_name, decision.p_value, decision.is_ood  # doctest: +SKIP
        ('3', 0.41, False)
    """

    def __init__(
        self,
        info: DetectorInfo,
        classifier: Classifier,
        denoiser: Denoiser | None,
        *,
        calibration: pd.DataFrame,
        validation: pd.DataFrame,
        seen: Mapping[str, tuple[Tensor, Tensor]],
        example: Image.Image,
        specs: Mapping[str, Any] | None = None,
        slots: int | None = None,
    ) -> None:
        self.info, self.classifier, self.denoiser = info, classifier, denoiser
        self.calibration, self.validation = calibration, validation
        self.seen, self.example, self.specs = dict(seen), example, dict(specs or {})
        self.bundle_hash: str | None = None
        self.rows = info.rows_of(info.detector)
        scores = {name: calibration[self.column(name)].to_numpy(float) for name in self.rows}
        self.conformal = Conformal.fit(scores[info.detector], calibration["predicted"], info.alpha)
        self._scorer = Scorer(info, classifier, denoiser, scores, seen, slots)
        self._lock = RLock()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.info.classes

    @property
    def alpha(self) -> float:
        """The false-rejection rate: at most this share of InD images is taken for OOD (coverage guarantee)."""
        return self.conformal.alpha

    @property
    def device(self) -> torch.device:
        """Where images are decided."""
        return self._scorer.device

    def expect(self, images: int | None, processes: int | None = None) -> None:
        """Say how many images will be decided on, so that on a processor several processes share them.

        Each is of one thread and has the models' weights in common with the others; they are started where the work
        is worth it. Without this, images are decided on in this process alone.

        Args:
            images: None: an endless stream. Its single images are decided on in this process, in as many threads as
                are fastest.
            processes: at most; None: a core each (`diffguard.engine.core_count`).
        """
        with self._lock:
            self._scorer.expect(sys.maxsize if images is None else images, processes)
            if images is None:
                torch.set_num_threads(self._scorer.start())

    def column(self, name: str) -> str:
        """The column of `calibration` and `validation` that holds a row's scores."""
        return "score" if name == self.info.detector else f"score/{name}"

    def prepare(self, picture: Image.Image, name: str = "the picture") -> Tensor:
        """A picture of any size and mode as the benchmark's images were made: [C, H, W] in [0, 1].

        Args:
            name: what the message calls it.

        Raises:
            DataError: it is of a kind that cannot be brought into that shape.
        """
        image = self.info.image
        return to_tensor(to_format(picture, image.size, image.mode, image.resize, name))

    def decide(self, images: Tensor, *, reconstructions: bool = False) -> list[Decision]:
        """Decide on prepared images [B, C, H, W] in [0, 1].

        Args:
            reconstructions: of diffused images these are wanted too.

        Raises:
            DataError: the images are not of the detector's shape, or not numbers in [0, 1].
            NotFiniteError: a score is not a finite number; see `decide_each`.
        """
        self._check(images)
        if not len(images):
            return []
        with self._lock, torch.no_grad():
            batch = self._scorer.batch(images)
            confidence = batch.logits.double().softmax(dim=1).amax(dim=1).cpu().numpy()
            check_scores(confidence, "classifier")
            scores = batch.scores(self.info.detector, np.arange(len(images)))
        label = batch.logits.argmax(dim=1).cpu().numpy()
        p_values, is_ood = self.conformal.p_values(scores, label), self.conformal.rejects(scores, label)
        return [
            Decision(
                label=int(label[row]),
                class_name=label_name(self.classes, int(label[row])),
                confidence=float(confidence[row]),
                score=float(scores[row]),
                p_value=float(p_values[row]),
                is_ood=bool(is_ood[row]),
                diffused=row in batch.results,
                reconstruction=batch.reconstruction(row) if reconstructions else None,
            )
            for row in range(len(images))
        ]

    def decide_each(self, images: Tensor) -> list[Decision | NotFiniteError]:
        """`decide`, where an image whose score is no number has its error in place of a decision."""
        try:
            return list(self.decide(images))
        except NotFiniteError as error:
            failed = error
        kept = [row for row in range(len(images)) if row not in failed.rows]
        decided: list[Decision | NotFiniteError] = [failed] * len(images)
        if kept:
            for row, decision in zip(kept, self.decide_each(images[kept]), strict=True):
                decided[row] = decision
        return decided

    def member_scores(self, images: Tensor) -> tuple[NDArray[np.int64], dict[str, Array]]:
        """Predicted labels [B] of prepared images, and their scores [B] of each variant and baseline in `rows`.

        All of them, a cascade's second detector too where its gate has decided: what a calibration table is made of.

        Raises:
            DataError: see `decide`.
        """
        self._check(images)
        names = [name for name in self.rows if not isinstance(self.info.settings_of(name), Combination)]
        with self._lock, torch.no_grad():
            batch = self._scorer.batch(images)
            scores = {name: batch.scores(name, np.arange(len(images))) for name in names}
        return batch.logits.argmax(dim=1).cpu().numpy(), scores

    def picture(self, image: Tensor) -> Image.Image:
        """Why: one prepared image [C, H, W] as a row of pictures, with the decision under it.

        The input, its reconstruction without a label, its reconstruction under the predicted label, how far
        that is from what it is compared with, and where the classifier looks (GradCAM, arXiv 1610.02391).
        An image that a cascade has not diffused is diffused for this; a detector that never diffuses shows
        the input and GradCAM.

        Raises:
            DataError: see `decide`.
        """
        with self._lock:
            [decision] = self.decide(image[None])
            result, variant = self._scorer.explain(image)
            heat = cam_maps(self.classifier, image[None].to(self.device), torch.tensor([decision.label]))[0]
        reasons = Reasons(
            image,
            None if result is None else result.unconditional,
            None if result is None else result.reconstruction,
            heat,
            "input" if variant is None else variant.against,
        )
        lines = [
            f"predicted {shortened(decision.class_name)}",
            f"confidence {decision.confidence:.1%}",
            f"score {decision.score:.4g}",
            f"p-value {decision.p_value:.2g} (alpha {self.alpha:g})",
        ]
        return draw_reasons(reasons, lines, decision.is_ood)

    def _check(self, images: Tensor) -> None:
        form = self.info.image
        shape = (form.channels, form.size, form.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise DataError(f"images are {tuple(images.shape)}, the detector takes [B, {', '.join(map(str, shape))}]")
        if len(images) and not bool(((images >= 0) & (images <= 1)).all()):
            raise DataError("images: a value is not a number in [0, 1]")
