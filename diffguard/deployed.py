"""A detector as it is deployed: images in, decisions out, with the reasons as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffguard.baselines import fit_baseline, needs_fit
from diffguard.calibration import Conformal
from diffguard.cam import cam_maps
from diffguard.classifiers import Classifier, predict_logits
from diffguard.combination import Combined
from diffguard.denoisers import Denoiser
from diffguard.engine import Engine, Found, Request, Sample, pick_slots
from diffguard.errors import DataError, SettingError
from diffguard.explanation import Reasons, draw_reasons, shortened
from diffguard.images import ImageFormat, to_format, to_tensor
from diffguard.settings import Baseline, Combination, Settings, Variant

Array = NDArray[np.float64]


class DetectorInfo(Settings):
    """What a deployed detector is, but for models and calibration scores.

    Attributes:
        diffguard: the version of the library that wrote it. method_version: that of the scores' arithmetic.
        benchmark: where it comes from. seed: of its models' training.
        classes: names of the labels.
        image: what every image is brought to first.
        alpha: the promised rate at which InD images are taken for OOD.
        detector: its row in the result table, in one of the next three.
        variants: thresholds set. baselines, combine: the rows that it is made of, as in params.yaml.
        combined: by combination, what was fitted; see `diffguard.combination.Combined.to_json`.
        classifier: name of the classifier in the benchmark.
    """

    diffguard: str
    method_version: int
    benchmark: str
    classifier: str
    seed: int
    classes: tuple[str, ...]
    image: ImageFormat
    alpha: float
    detector: str
    variants: dict[str, Variant]
    baselines: dict[str, Baseline]
    combine: dict[str, Combination]
    combined: dict[str, dict[str, Any]]

    def settings_of(self, name: str) -> Variant | Baseline | Combination:
        """The settings of a row.

        Raises:
            SettingError: it has none here.
        """
        for rows in (self.variants, self.baselines, self.combine):
            if name in rows:
                return rows[name]
        raise SettingError(f"detector {name}: neither a variant, nor a baseline, nor a combination of this bundle")

    def rows_of(self, name: str) -> list[str]:
        """The rows that a row is made of, members before what combines them; itself last, each once."""
        settings, found = self.settings_of(name), dict[str, None]()
        if isinstance(settings, Combination):
            for member in settings.of:
                found |= dict.fromkeys(self.rows_of(member))
        return [*found, name]


@dataclass(frozen=True)
class Decision:
    """What a detector says of one image.

    Attributes:
        label, class_name: the classifier's prediction. confidence: its softmax, in [0, 1].
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

    One at a time may ask it; other threads wait.

    Attributes:
        bundle_hash: SHA-256 of the detector.json that it was loaded from, which holds the hashes of all other
            files; None: it was not.

    Args:
        info: what it is.
        classifier, denoiser: on the device where images are decided; no denoiser, if no row diffuses.
        calibration, validation: `diffguard.bundle.TABLE_COLUMNS`, ``score`` (the detector's) and
            ``score/<row>`` of each row that it is made of.
        seen: by what baselines see, the values [N, ...] and labels [N] of the train split; see
            `diffguard.baselines.views_of`.
        example: an InD image, as documentation of what to send.
        specs: of the models that come from elsewhere, by "classifier" and "denoiser".
        slots: images in a network call; None: measured when the first image is diffused.

    Raises:
        SettingError: a row is unknown, or cannot be deployed.
        DataError: a calibration score is missing, or there are too few to promise alpha.

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
        network: Any = classifier
        self._device = next(network.parameters()).device if denoiser is None else denoiser.device
        for name in self.rows:
            _check_deployable(name, info.settings_of(name), denoiser)
        scores = {name: calibration[self.column(name)].to_numpy(float) for name in self.rows}
        self.conformal = Conformal.fit(scores[info.detector], calibration["predicted"], info.alpha)
        self._combined = {name: Combined.from_json(info.combined[name], scores) for name in self._of(Combination)}
        self._baselines = {
            name: fit_baseline(name, baseline, classifier, self._train(baseline), self._device, seen=True)
            for name, baseline in info.baselines.items()
            if name in self.rows
        }
        self._variants = self._of(Variant)
        self._slots = slots
        self._engine: Engine | None = None
        self._lock = RLock()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.info.classes

    @property
    def alpha(self) -> float:
        """The promised rate at which InD images are taken for OOD."""
        return self.conformal.alpha

    @property
    def device(self) -> torch.device:
        """Where images are decided."""
        return self._device

    def column(self, name: str) -> str:
        """The column of `calibration` and `validation` that holds a row's scores."""
        return "score" if name == self.info.detector else f"score/{name}"

    def prepare(self, picture: Image.Image) -> Tensor:
        """A picture of any size and mode as the benchmark's images were made: [C, H, W] in [0, 1]."""
        image = self.info.image
        return to_tensor(to_format(picture, image.size, image.mode, image.resize))

    def decide(self, images: Tensor, *, reconstructions: bool = False) -> list[Decision]:
        """Decide on prepared images [B, C, H, W] in [0, 1].

        Args:
            reconstructions: of diffused images these are wanted too.

        Raises:
            DataError: the images are not of the detector's shape, or not numbers in [0, 1].
        """
        self._check(images)
        if not len(images):
            return []
        with self._lock, torch.no_grad():
            look = _Look(self, images.to(self._device))
            scores = look.scores(self.info.detector, np.arange(len(images)))
        label = look.logits.argmax(dim=1).cpu().numpy()
        confidence = look.logits.double().softmax(dim=1).amax(dim=1).tolist()
        p_values, is_ood = self.conformal.p_values(scores, label), self.conformal.rejects(scores, label)
        return [
            Decision(
                label=int(label[row]),
                class_name=self.classes[label[row]],
                confidence=confidence[row],
                score=float(scores[row]),
                p_value=float(p_values[row]),
                is_ood=bool(is_ood[row]),
                diffused=row in look.found,
                reconstruction=look.reconstruction(row) if reconstructions else None,
            )
            for row in range(len(images))
        ]

    def member_scores(self, images: Tensor) -> tuple[NDArray[np.int64], dict[str, Array]]:
        """Predicted labels [B] of prepared images, and their scores [B] of each variant and baseline in `rows`.

        All of them, a cascade's second detector too where its gate has decided: what a calibration table is made of.

        Raises:
            DataError: see `decide`.
        """
        self._check(images)
        names = [name for name in self.rows if not isinstance(self.info.settings_of(name), Combination)]
        with self._lock, torch.no_grad():
            look = _Look(self, images.to(self._device))
            scores = {name: look.scores(name, np.arange(len(images))) for name in names}
        return look.logits.argmax(dim=1).cpu().numpy(), scores

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
            found, variant = self._explained(image)
            heat = cam_maps(self.classifier, image[None].to(self._device), torch.tensor([decision.label]))[0]
        reasons = Reasons(
            image,
            None if found is None else found.unconditional,
            None if found is None else found.reconstruction,
            heat,
            against_input=variant is None or variant.against == "input",
        )
        lines = [
            f"predicted {shortened(decision.class_name)}",
            f"confidence {decision.confidence:.1%}",
            f"score {decision.score:.4g}",
            f"p-value {decision.p_value:.2g} (alpha {self.alpha:g})",
        ]
        return draw_reasons(reasons, lines, decision.is_ood)

    def _explained(self, image: Tensor) -> tuple[Found | None, Variant | None]:
        """What the first variant that reconstructs makes of an image; None if there is none."""
        names = list(self._variants)
        index = next((i for i, name in enumerate(names) if self._variants[name].reconstructs), None)
        if index is None:
            return None, None
        [(_, found)] = self.diffuse([Sample(0, image, [index], unconditional=True)])
        return found[index], self._variants[names[index]]

    def diffuse(self, samples: Sequence[Sample]) -> Iterator[tuple[Any, dict[int, Found]]]:
        """Samples through the one engine, whose requests are the variants in the order of `rows`."""
        assert self.denoiser is not None
        if self._engine is None:
            slots = self._slots or pick_slots(self.denoiser, largest=64, seconds=1.0)
            requests = [Request(self.classifier, variant) for variant in self._variants.values()]
            # Requests of few images must not wait for a full batch's time.
            self._engine = Engine(self.denoiser, requests, slots=slots, fixed=False)
        try:
            yield from self._engine.run(samples)
        except BaseException:
            # Images at work would come out of the next run.
            self._engine = None
            raise

    def _of(self, kind: Any) -> dict[str, Any]:
        chosen = {name: self.info.settings_of(name) for name in self.rows}
        return {name: settings for name, settings in chosen.items() if isinstance(settings, kind)}

    def _train(self, baseline: Baseline) -> "_Batches":
        if not needs_fit(baseline):
            return _Batches(None, self._device)
        if baseline.sees not in self.seen:
            raise DataError(f"detector {self.info.detector}: what a baseline sees of the train split is missing")
        return _Batches(self.seen[baseline.sees], self._device)

    def _check(self, images: Tensor) -> None:
        form = self.info.image
        shape = (form.channels, form.size, form.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise DataError(f"images are {tuple(images.shape)}, the detector takes [B, {', '.join(map(str, shape))}]")
        if len(images) and not bool(((images >= 0) & (images <= 1)).all()):
            raise DataError("images: a value is not a number in [0, 1]")


@dataclass(frozen=True)
class _Batches:
    """Stored views of a train split, batch by batch on a device; read anew each time."""

    seen: tuple[Tensor, Tensor] | None
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.seen is None:
            return
        for values, labels in zip(*(torch.split(part, 256) for part in self.seen), strict=True):
            floats = values.float() / 255 if values.dtype == torch.uint8 else values
            yield floats.to(self.device), labels.to(self.device)


class _Look:
    """A detector's look at one batch: every row's score of every image, found when it is needed."""

    def __init__(self, detector: DeployedDetector, images: Tensor) -> None:
        self.detector, self.images = detector, images
        self.logits = predict_logits(detector.classifier, images)
        self.found: dict[int, dict[int, Found]] = {}
        self._names = list(detector._variants)

    def scores(self, name: str, rows: NDArray[np.intp]) -> Array:
        """The scores of a row of the result table for these images, [len(rows)]."""
        if not len(rows):
            return np.empty(0)
        self._diffuse(self._certain(name), rows)
        settings = self.detector.info.settings_of(name)
        if isinstance(settings, Variant):
            index = self._names.index(name)
            return np.array([self.found[row][index].score for row in rows.tolist()])
        if isinstance(settings, Baseline):
            found = self.detector._baselines[name].predict(self.images[torch.from_numpy(rows).to(self.images.device)])
            return np.asarray(found.double().cpu().numpy())
        combined = self.detector._combined[name]
        if settings.kind != "cascade":
            return combined.score({member: self.scores(member, rows) for member in settings.of})
        gate, second = settings.of
        by_gate = self.scores(gate, rows)
        by_second = np.full(len(rows), np.nan)
        open_ = combined.undecided(by_gate)
        by_second[open_] = self.scores(second, rows[open_])
        return combined.score({gate: by_gate, second: by_second})

    def reconstruction(self, row: int) -> Tensor | None:
        """Of the first variant that reconstructed this image."""
        for index in range(len(self._names)):
            found = self.found.get(row, {}).get(index)
            if found is not None and found.reconstruction is not None:
                return found.reconstruction.cpu()
        return None

    def _certain(self, name: str) -> list[int]:
        """The variants that a row needs of every image: all but those behind a cascade's gate."""
        settings = self.detector.info.settings_of(name)
        if isinstance(settings, Variant):
            return [self._names.index(name)]
        if isinstance(settings, Baseline):
            return []
        sure = settings.of[:1] if settings.kind == "cascade" else settings.of
        return [index for member in sure for index in self._certain(member)]

    def _diffuse(self, variants: list[int], rows: NDArray[np.intp]) -> None:
        """Bring what is missing through the diffusion model, in one pass, so that variants share their work."""
        samples = []
        for row in rows.tolist():
            lacking = [index for index in dict.fromkeys(variants) if index not in self.found.get(row, {})]
            if lacking:
                samples.append(Sample(row, self.images[row], lacking))
        for row, found in self.detector.diffuse(samples) if samples else ():
            self.found.setdefault(row, {}).update(found)


def _check_deployable(name: str, settings: Any, denoiser: Denoiser | None) -> None:
    if not isinstance(settings, Variant):
        return
    if denoiser is None:
        raise SettingError(f"detector {name}: a variant needs a denoiser")
    if settings.needs_fit:
        raise SettingError(f"detector {name}: it is not fitted; fit it first (`diffguard.scoring.fit_variant`)")
    if settings.label != "predicted":
        raise SettingError(
            f"detector {name}: label {settings.label} is told the truth, which nobody knows of new images"
        )
