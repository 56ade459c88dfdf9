"""What a denoiser in training knows of its classes: whether to go on, and whether it can guard."""

import time
from dataclasses import dataclass, field

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from diffguard.engine import Engine, Request, Sample
from diffguard.models.classifiers.base import Classifier
from diffguard.models.denoisers.base import Denoiser
from diffguard.settings import ACTIVATIONS, Variant
from diffguard.training.loop import as_floats
from diffguard.training.previews import accuracy_as_classifier
from tasks.common.files import read_image_bytes
from tasks.config.run import Run
from tasks.models.checks import check_fits, open_model

MOST_IND, MOST_NEAR = 500, 250
"""Validation images that are looked at, at most."""

LONG_SECONDS = 600
"""From so long a training on its rows are measured too; those of a shorter one are in the evaluation that follows."""

CHANCE, ENOUGH = 1.5, 0.75
"""Up to this many times chance a denoiser knows nothing of its classes; from this accuracy on enough to guard with."""


@dataclass
class Meter:
    """Validation images, and the rows of single denoising steps that a denoiser is measured by.

    Attributes:
        images, labels: InD, uint8 [N, C, H, W] and int64 [N].
        near: near-OOD, uint8 [M, C, H, W]; without rows if there are none.
        classifier: whose predictions the rows guide to; None: it is not trained yet, and no row is measured.
        rows: variants of single denoising steps, by name.
        accuracy: as a classifier, the last that was measured; None: none yet.
    """

    images: Tensor
    labels: Tensor
    near: Tensor
    classifier: Classifier | None
    rows: dict[str, Variant]
    accuracy: float | None = None
    _began: float = field(default_factory=time.monotonic)

    def measure(self, denoiser: Denoiser, *, with_rows: bool | None = None) -> dict[str, float]:
        """By the names of curves: the accuracy as a classifier, and the near AUROC of each row.

        Args:
            with_rows: whether rows are measured; None: once the training is a long one.
        """
        self.accuracy = accuracy_as_classifier(denoiser, as_floats(self.images), self.labels)
        values = {"validation/accuracy_as_classifier": self.accuracy}
        if with_rows is None:
            with_rows = time.monotonic() - self._began >= LONG_SECONDS
        if self.classifier is not None and self.rows and len(self.near) and with_rows:
            values |= {f"validation/near_auroc/{name}": auroc for name, auroc in self.near_aurocs(denoiser).items()}
        return values

    def near_aurocs(self, denoiser: Denoiser) -> dict[str, float]:
        """The near AUROC of each row, by its name; there are a classifier and near-OOD images."""
        assert self.classifier is not None
        classifier = self.classifier.to(denoiser.device)  # type: ignore[attr-defined]
        engine = Engine(denoiser, [Request(classifier, variant) for variant in self.rows.values()], slots=128)
        images = as_floats(torch.cat([self.images, self.near]))
        results = dict(engine.run(Sample(row, image) for row, image in enumerate(images)))
        is_ood = [row >= len(self.images) for row in range(len(images))]
        return {
            name: float(roc_auc_score(is_ood, [results[row][index].score for row in range(len(images))]))
            for index, name in enumerate(self.rows)
        }

    def __str__(self) -> str:
        """What its accuracy means, as a sentence."""
        if self.accuracy is None:
            return "the denoiser's accuracy as a classifier was not measured"
        chance = 1 / max(len(self.labels.unique()), 1)
        if self.accuracy <= CHANCE * chance:
            meaning = "it knows nothing of its classes yet: no row that uses the label can work"
        elif self.accuracy < ENOUGH:
            meaning = "it knows its classes a little: train it longer before it guards"
        else:
            meaning = "it knows its classes well enough to guard with"
        return (
            f"as a classifier the denoiser gives {100 * self.accuracy:.0f} % of {len(self.labels)} validation images "
            f"their label (chance: {100 * chance:.0f} %); {meaning}"
        )


def open_meter(run: Run, seed: int) -> Meter | None:
    """The meter of a run's denoiser at one training seed; None: the benchmark has no InD validation images."""
    manifest = run.manifest[run.manifest["split"] == "validation"].sort_values("content_hash")
    ind, near = manifest[manifest["role"] == "ind"][:MOST_IND], manifest[manifest["role"] == "near"][:MOST_NEAR]
    if ind.empty:
        return None
    rows = {
        name: variant
        for name, variant in run.params.score.variants.items()
        if variant.is_single_step and variant.distance != ACTIVATIONS and variant.label == "predicted"
    }
    return Meter(
        read_image_bytes(run.home, ind),
        torch.tensor(ind["label"].to_numpy()),
        read_image_bytes(run.home, near),
        _classifier(run, seed),
        rows,
    )


def _classifier(run: Run, seed: int) -> Classifier | None:
    """The first classifier that is there already."""
    for name in run.params.classifiers:
        folder = run.model(seed, name)
        if folder.is_dir() and any(folder.iterdir()):
            classifier: Classifier = open_model(run, folder)
            check_fits(run, name, classifier)
            return classifier
    return None
