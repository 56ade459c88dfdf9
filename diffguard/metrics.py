"""How well scores tell InD from OOD, with bootstrap intervals.

InD is the positive class, as in the published tables: FPR@95 is the share of OOD images taken for
InD when 95 % of InD images are accepted. Scores are outlier scores, higher = more OOD.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

METRICS = ("auroc", "fpr95", "aupr_in", "aupr_out")


def detection_metrics(ind: ArrayLike, ood: ArrayLike) -> dict[str, float]:
    """AUROC, FPR@95, AUPR-in and AUPR-out (both by the trapezoidal rule), in [0, 1].

    Args:
        ind, ood: outlier scores, shapes [N] and [M].

    Example:
        >>> detection_metrics([0.0, 1.0], [2.0, 3.0])["auroc"]
        1.0
    """
    ind, ood = np.asarray(ind, float), np.asarray(ood, float)
    found = weighted_metrics(ind, ood, np.ones((1, len(ind))), np.ones((1, len(ood))))
    return {name: float(values[0]) for name, values in found.items()}


def published_metrics(ind: ArrayLike, ood: ArrayLike) -> dict[str, float]:
    """The metrics of the published runner, for comparison with its tables; ours are `detection_metrics`.

    They differ where scores tie or few are there: the ROC drops collinear points (scikit-learn's
    default), so FPR@95 is read at the first *kept* point with TPR >= 0.95, and AUPR-out ranks by
    1 - confidence. The published table then takes the best of several distances by test labels, which
    nothing here does.

    Args:
        ind, ood: outlier scores, shapes [N] and [M].

    Returns:
        FPR@95, AUROC, AUPR_IN and AUPR_OUT, in [0, 1].

    Example:
        >>> published_metrics([0.0, 1.0], [2.0, 3.0])["FPR@95"]
        0.0
    """
    from sklearn.metrics import auc, precision_recall_curve, roc_curve

    confidence = -np.concatenate([np.asarray(ind, float), np.asarray(ood, float)])
    is_ind = np.repeat([1, 0], [len(np.asarray(ind)), len(np.asarray(ood))])
    fpr, tpr, _ = roc_curve(is_ind, confidence)
    precision_in, recall_in, _ = precision_recall_curve(is_ind, confidence)
    precision_out, recall_out, _ = precision_recall_curve(1 - is_ind, 1 - confidence)
    return {
        "FPR@95": float(fpr[np.argmax(tpr >= 0.95)]),
        "AUROC": float(auc(fpr, tpr)),
        "AUPR_IN": float(auc(recall_in, precision_in)),
        "AUPR_OUT": float(auc(recall_out, precision_out)),
    }


def weighted_metrics(ind: Array, ood: Array, ind_weights: Array, ood_weights: Array) -> dict[str, Array]:
    """The metrics under R weightings of the images at once; a bootstrap draw is a weighting.

    Args:
        ind, ood: outlier scores [N], [M].
        ind_weights, ood_weights: [R, N], [R, M], not negative.

    Returns:
        For each of METRICS, float64 [R].
    """
    # Tied scores fall on the same side of every threshold: each different score is one.
    thresholds = np.unique(np.concatenate([ind, ood]))
    accepted_ind = _accepted(ind, ind_weights, thresholds)
    accepted_ood = _accepted(ood, ood_weights, thresholds)
    tpr, fpr = _from_zero(accepted_ind / accepted_ind[:, -1:]), _from_zero(accepted_ood / accepted_ood[:, -1:])
    reached = (tpr >= 0.95 - 1e-12).argmax(axis=1)
    return {
        "auroc": np.trapezoid(tpr, fpr, axis=1),
        "fpr95": fpr[np.arange(len(fpr)), reached],
        "aupr_in": _aupr(accepted_ind, accepted_ood),
        "aupr_out": _aupr(_rest(accepted_ood, ood_weights.sum(axis=1)), _rest(accepted_ind, ind_weights.sum(axis=1))),
    }


def bootstrap_weights(rng: np.random.Generator, count: int, draws: int) -> Array:
    """Row 0 is the sample itself; each further row one draw with replacement, as counts. [draws + 1, count]."""
    # Draws of all rows at once: row r takes its images from the numbers r * count and up.
    drawn = rng.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)
    return np.concatenate([np.ones((1, count)), counts])


@dataclass(frozen=True)
class Resampled:
    """Metrics of one detector on a sample of images, and on every bootstrap draw of them.

    Attributes:
        by_seed: {dataset or group: {metric: [S, R + 1]}} of S training seeds; column 0 is the sample itself.
        seed_weights: [R + 1, S], how often each draw takes each seed, as a share.
        n_ind: InD images. n_ood: OOD images of each dataset or group.
    """

    by_seed: Mapping[str, Mapping[str, Array]]
    seed_weights: Array
    n_ind: int
    n_ood: Mapping[str, int]

    def summary(self) -> dict[str, dict[str, object]]:
        """{dataset or group: {metric: {"value", "low", "high"[, "per_seed"]}, "n_ind", "n_ood"}}, 95 % intervals."""
        return {
            name: {
                **{metric: _summary(values, self.seed_weights) for metric, values in found.items()},
                "n_ind": self.n_ind,
                "n_ood": self.n_ood[name],
            }
            for name, found in self.by_seed.items()
        }

    def difference(
        self, other: "Resampled", metrics: Sequence[str] = ("auroc", "fpr95")
    ) -> dict[str, dict[str, object]]:
        """This detector's metrics minus another's, {dataset or group: {metric: {"value", "low", "high"}}}.

        The 95 % interval is of the difference itself: both must have been resampled from the same images, with the
        same number of draws and seed, so that each draw is of the same images (paired bootstrap).
        """
        return {
            name: {
                metric: _summary(found[metric] - other.by_seed[name][metric], self.seed_weights, per_seed=False)
                for metric in metrics
            }
            for name, found in self.by_seed.items()
        }


def resample_scores(
    ind: Sequence[Array],
    ood: Mapping[str, Sequence[Array]],
    groups: Mapping[str, Sequence[str]],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Resampled:
    """Metrics of one detector against each OOD dataset and their group means, on bootstrap draws of the images.

    All datasets share the same draws of InD images, and all training seeds the same draws of images, so that
    means have honest intervals. With several seeds the value is the mean over them, and a draw takes
    seeds with replacement too. What is drawn depends on `seed` and on the numbers of images and training seeds
    alone, so that detectors can be compared draw by draw.

    Args:
        ind: InD test scores, one array [N] for each training seed, images in the same order.
        ood: the same for each OOD dataset.
        groups: which datasets' mean makes "near", "far", ...
    """
    rng = np.random.default_rng(seed)
    seeds = len(ind)
    ind_weights = bootstrap_weights(rng, len(ind[0]), draws)
    drawn_seeds = np.concatenate([np.ones((1, seeds)), rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)])
    by_seed: dict[str, dict[str, Array]] = {}
    counts: dict[str, int] = {}
    for dataset, scores in ood.items():
        ood_weights = bootstrap_weights(rng, len(scores[0]), draws)
        each = [weighted_metrics(i, o, ind_weights, ood_weights) for i, o in zip(ind, scores, strict=True)]
        by_seed[dataset] = {metric: np.stack([found[metric] for found in each]) for metric in METRICS}
        counts[dataset] = len(scores[0])
    for group, members in groups.items():
        if members:
            by_seed[group] = {m: np.mean([by_seed[each][m] for each in members], axis=0) for m in METRICS}
            counts[group] = sum(counts[each] for each in members)
    return Resampled(by_seed, drawn_seeds / seeds, len(ind[0]), counts)


def evaluate_scores(
    ind: Sequence[Array],
    ood: Mapping[str, Sequence[Array]],
    groups: Mapping[str, Sequence[str]],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """Metrics of one detector with 95 % intervals: `resample_scores`, as `Resampled.summary` has it."""
    return resample_scores(ind, ood, groups, draws=draws, seed=seed).summary()


def _summary(by_seed: Array, seed_weights: Array, per_seed: bool = True) -> dict[str, object]:
    pooled = (by_seed * seed_weights.T).sum(axis=0)
    low, high = np.quantile(pooled[1:], [0.025, 0.975]) if pooled.size > 1 else (pooled[0], pooled[0])
    summary: dict[str, object] = {"value": float(pooled[0]), "low": float(low), "high": float(high)}
    if per_seed and len(by_seed) > 1:
        summary["per_seed"] = [float(value) for value in by_seed[:, 0]]
    return summary


def _accepted(scores: Array, weights: Array, thresholds: Array) -> Array:
    """The weight of the scores up to each threshold, [R, thresholds]."""
    order = np.argsort(scores)
    total = _from_zero(np.cumsum(weights[:, order], axis=1))
    return total[:, np.searchsorted(scores[order], thresholds, side="right")]


def _from_zero(curve: Array) -> Array:
    return np.concatenate([np.zeros((len(curve), 1)), curve], axis=1)


def _rest(accepted: Array, total: Array) -> Array:
    """What is rejected at each threshold, from the fewest on."""
    return (total[:, None] - _from_zero(accepted)[:, :-1])[:, ::-1]


def _aupr(hits: Array, misses: Array) -> Array:
    """Trapezoidal area under precision over recall, which starts at precision 1, recall 0."""
    recall = _from_zero(hits / hits[:, -1:])
    # A draw can leave out the first images: nothing accepted yet has precision 1 by convention.
    precision = np.divide(hits, hits + misses, out=np.ones_like(hits), where=hits + misses > 0)
    precision = np.concatenate([np.ones((len(hits), 1)), precision], axis=1)
    return np.trapezoid(precision, recall, axis=1)
