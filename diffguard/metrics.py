"""Metrics of how well scores separate InD from OOD, with bootstrap intervals.

InD is the positive class, as in the published tables: FPR@95 is the share of OOD images that are accepted
when 95 % of InD images are. Scores are outlier scores, higher = more OOD.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

METRICS = ("auroc", "fpr95", "aupr_in", "aupr_out")


def detection_metrics(ind: ArrayLike, ood: ArrayLike) -> dict[str, float]:
    """Compute AUROC, FPR@95, AUPR-in and AUPR-out (both by the trapezoidal rule), in [0, 1].

    Args:
        ind, ood: outlier scores, shapes [N] and [M].

    Example:
        >>> detection_metrics([0.0, 1.0], [2.0, 3.0])["auroc"]
        1.0
    """
    ind, ood = np.asarray(ind, float), np.asarray(ood, float)
    metrics = weighted_metrics(ind, ood, np.ones((1, len(ind))), np.ones((1, len(ood))))
    return {name: float(values[0]) for name, values in metrics.items()}


def published_metrics(ind: ArrayLike, ood: ArrayLike) -> dict[str, float]:
    """Compute the metrics of the published runner, for comparison with its tables; ours are `detection_metrics`.

    They differ where scores tie or are few: the ROC drops collinear points (scikit-learn's default), so that FPR@95
    is read at the first *kept* point with TPR >= 0.95, and AUPR-out ranks by 1 - confidence. The published table
    then selects the best of several distances by test labels, which nothing here does.

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


def weighted_metrics(
    ind: Array, ood: Array, ind_weights: Array, ood_weights: Array, metrics: Sequence[str] = METRICS
) -> dict[str, Array]:
    """Compute the metrics under R weightings of the images at once; a bootstrap draw is a weighting.

    Args:
        ind, ood: outlier scores [N], [M].
        ind_weights, ood_weights: [R, N], [R, M], non-negative.
        metrics: of `METRICS`, those that are wanted.

    Returns:
        A float64 [R] for each of these.
    """
    # Every distinct score is a threshold, so that tied scores fall on the same side.
    thresholds = np.unique(np.concatenate([ind, ood]))
    accepted_ind = _accepted(ind, ind_weights, thresholds)
    accepted_ood = _accepted(ood, ood_weights, thresholds)
    tpr, fpr = _from_zero(accepted_ind / accepted_ind[:, -1:]), _from_zero(accepted_ood / accepted_ood[:, -1:])
    compute: dict[str, Callable[[], Array]] = {
        "auroc": lambda: np.asarray(np.trapezoid(tpr, fpr, axis=1)),
        "fpr95": lambda: fpr[np.arange(len(fpr)), (tpr >= 0.95 - 1e-12).argmax(axis=1)],
        "aupr_in": lambda: _aupr(accepted_ind, accepted_ood),
        "aupr_out": lambda: _aupr(
            _rest(accepted_ood, ood_weights.sum(axis=1)), _rest(accepted_ind, ind_weights.sum(axis=1))
        ),
    }
    return {name: compute[name]() for name in metrics}


def bootstrap_weights(rng: np.random.Generator, count: int, draws: int) -> Array:
    """Draw bootstrap samples as counts [draws + 1, count]; row 0 is the sample itself, all ones."""
    # All rows in one bincount: row r counts the numbers from r * count on.
    drawn = rng.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)
    return np.concatenate([np.ones((1, count)), counts])


@dataclass(frozen=True)
class Resampled:
    """Metrics of one detector on a sample of images, and on every bootstrap draw of them.

    Attributes:
        by_seed: {dataset or group: {metric: [S, R + 1]}} for S training seeds; column 0 is the sample itself.
        seed_weights: [R + 1, S], the share of each seed in each draw.
        n_ind: number of InD images.
        n_ood: number of OOD images of each dataset or group.
    """

    by_seed: Mapping[str, Mapping[str, Array]]
    seed_weights: Array
    n_ind: int
    n_ood: Mapping[str, int]

    def summary(self) -> dict[str, dict[str, object]]:
        """Summarize with 95 % intervals.

        Returns:
            {dataset or group: {metric: {"value", "low", "high"[, "per_seed"]}, "n_ind", "n_ood"}}.
        """
        summaries: dict[str, dict[str, object]] = {}
        for name, metrics in self.by_seed.items():
            summary: dict[str, object] = {
                metric: _summary(values, self.seed_weights) for metric, values in metrics.items()
            }
            summaries[name] = summary | {"n_ind": self.n_ind, "n_ood": self.n_ood[name]}
        return summaries

    def draws(self, group: str, metric: str) -> Array:
        """A metric of a dataset or group, its training seeds pooled, on the sample itself and every draw: [R + 1]."""
        return _pooled(self.by_seed[group][metric], self.seed_weights)

    def difference(
        self, other: "Resampled", metrics: Sequence[str] = ("auroc", "fpr95"), confidence: float = 0.95
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Subtract another detector's metrics from this one's.

        The interval is of the difference itself (paired bootstrap): both must have been resampled from the same
        images, with the same number of draws and the same seed.

        Args:
            metrics: of `METRICS`, those that are wanted.
            confidence: of the interval, in (0, 1).

        Returns:
            {dataset or group: {metric: {"value", "low", "high"}}}.
        """
        differences: dict[str, dict[str, dict[str, float]]] = {}
        for name, own in self.by_seed.items():
            others = other.by_seed[name]
            differences[name] = {
                metric: _interval(own[metric] - others[metric], self.seed_weights, confidence) for metric in metrics
            }
        return differences


def resample_scores(
    ind: Sequence[Array],
    ood: Mapping[str, Sequence[Array]],
    groups: Mapping[str, Sequence[str]],
    *,
    draws: int = 1000,
    seed: int = 0,
    metrics: Sequence[str] = METRICS,
) -> Resampled:
    """Compute a detector's metrics against each OOD dataset, and their means by group, on bootstrap draws.

    All datasets share the same draws of InD images, and all training seeds the same draws of images, so that the
    intervals of means account for both. With several training seeds the value is the mean over them, and a draw
    samples seeds with replacement too. The draws depend only on `seed` and on the numbers of images and training
    seeds, so that detectors can be compared draw by draw.

    Args:
        ind: InD test scores, one array [N] for each training seed, with the images in the same order.
        ood: likewise for each OOD dataset, [M].
        groups: the datasets of each group ("near", "far", ...), over which metrics are averaged.
        draws: number of bootstrap draws.
        metrics: of `METRICS`, those that are wanted.
    """
    rng = np.random.default_rng(seed)
    seeds = len(ind)
    ind_weights = bootstrap_weights(rng, len(ind[0]), draws)
    drawn_seeds = np.concatenate([np.ones((1, seeds)), rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)])
    by_seed: dict[str, dict[str, Array]] = {}
    counts: dict[str, int] = {}
    for dataset, scores in ood.items():
        ood_weights = bootstrap_weights(rng, len(scores[0]), draws)
        of_seeds = [weighted_metrics(i, o, ind_weights, ood_weights, metrics) for i, o in zip(ind, scores, strict=True)]
        by_seed[dataset] = {name: np.stack([of_seed[name] for of_seed in of_seeds]) for name in metrics}
        counts[dataset] = len(scores[0])
    for group, members in groups.items():
        if members:
            by_seed[group] = {
                name: np.mean([by_seed[dataset][name] for dataset in members], axis=0) for name in metrics
            }
            counts[group] = sum(counts[dataset] for dataset in members)
    return Resampled(by_seed, drawn_seeds / seeds, len(ind[0]), counts)


def evaluate_scores(
    ind: Sequence[Array],
    ood: Mapping[str, Sequence[Array]],
    groups: Mapping[str, Sequence[str]],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """Compute a detector's metrics with 95 % intervals; see `resample_scores` and `Resampled.summary`."""
    return resample_scores(ind, ood, groups, draws=draws, seed=seed).summary()


def _summary(by_seed: Array, seed_weights: Array) -> dict[str, object]:
    summary: dict[str, object] = {**_interval(by_seed, seed_weights)}
    if len(by_seed) > 1:
        summary["per_seed"] = [float(value) for value in by_seed[:, 0]]
    return summary


def interval(draws: Array, confidence: float = 0.95) -> dict[str, float]:
    """Compute the percentile interval of a bootstrap.

    Args:
        draws: a figure on the sample itself, then on each draw, [R + 1].
        confidence: in (0, 1).

    Returns:
        {"value", "low", "high"}; without draws the three are the same.
    """
    tail = round((1 - confidence) / 2, 12)
    low, high = np.quantile(draws[1:], [tail, 1 - tail]) if draws.size > 1 else (draws[0], draws[0])
    return {"value": float(draws[0]), "low": float(low), "high": float(high)}


def _interval(by_seed: Array, seed_weights: Array, confidence: float = 0.95) -> dict[str, float]:
    return interval(_pooled(by_seed, seed_weights), confidence)


def _pooled(by_seed: Array, seed_weights: Array) -> Array:
    pooled: Array = (by_seed * seed_weights.T).sum(axis=0)
    return pooled


def _accepted(scores: Array, weights: Array, thresholds: Array) -> Array:
    """The total weight of the scores up to each threshold, [R, thresholds]."""
    order = np.argsort(scores)
    cumulative = _from_zero(np.cumsum(weights[:, order], axis=1))
    return cumulative[:, np.searchsorted(scores[order], thresholds, side="right")]


def _from_zero(curve: Array) -> Array:
    return np.concatenate([np.zeros((len(curve), 1)), curve], axis=1)


def _rest(accepted: Array, total: Array) -> Array:
    """The total weight of the scores that are rejected at each threshold, in increasing order."""
    return (total[:, None] - _from_zero(accepted)[:, :-1])[:, ::-1]


def _aupr(hits: Array, misses: Array) -> Array:
    """The trapezoidal area under precision over recall, from the point of precision 1, recall 0."""
    recall = _from_zero(hits / hits[:, -1:])
    # A draw may lack the first images; by convention the precision is 1 while nothing is accepted.
    precision = np.divide(hits, hits + misses, out=np.ones_like(hits), where=hits + misses > 0)
    precision = np.concatenate([np.ones((len(hits), 1)), precision], axis=1)
    return np.trapezoid(precision, recall, axis=1)
