"""Whether a classifier's labels are in the order of the benchmark's classes, by its accuracy on InD images.

A classifier that was trained with its classes in another order is wrong on nearly every InD image, and what is said
of its label, class name and OOD score is then of another class. A permutation of the labels makes it right again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffguard.errors import DataError
from diffguard.utils.names import label_name

SURE, GUESSING = 1e-4, 0.01
"""p-values: of a permutation that is taken for the real order, and of an accuracy that guessing would not have."""

FAR_BETTER = 3.0
"""How many times as often right as the given order a permutation has to be, on the classes that it moves."""

MOST_CLASSES = 5000
"""More are not assigned to each other: a table of all pairs would take gigabytes."""

MOST_IMAGES = 512
"""That a classifier is asked about before a run."""

_SHOWN = 6


@dataclass(frozen=True)
class LabelOrder:
    """What a classifier's predictions of InD images say of the order of its labels.

    Attributes:
        images: how many.
        accuracy: in the given order, in [0, 1].
        moved: by label of the benchmark, the classifier's label of that class, where both differ and that is sure.
        best: accuracy in that order, found on one half of the images and measured on the other.
        is_guessing: whether the accuracy is no better than guessing would have.
    """

    images: int
    accuracy: float
    moved: dict[int, int]
    best: float
    is_guessing: bool


def label_order(labels: ArrayLike, predicted: ArrayLike, classes: int) -> LabelOrder:
    """Compare the accuracy with that under the best assignment of labels.

    The assignment is found on every second image and judged on the others, and the other way round: on few images
    of many classes one that fits is always found.

    Args:
        labels: int [n], in 0..classes-1.
        predicted: int [n]; a classifier may know more labels.
    """
    from scipy.stats import binomtest  # half a second with the other, and every stage that opens models imports this

    true, guess = np.asarray(labels, int), np.asarray(predicted, int)
    right = true == guess
    better, moved = right, dict[int, int]()
    if classes <= MOST_CLASSES:
        better, halves = np.zeros(len(true), bool), _halves(true)
        for half, other in (halves, halves[::-1]):
            order = _assignment(true[half], guess[half], classes)
            better[other] = order[true[other]] == guess[other]
        order = _assignment(true, guess, classes)
        moved = {label: int(other) for label, other in enumerate(order) if other not in (label, -1)}
    among = np.isin(true, list(moved))
    gained, lost = int((better & ~right & among).sum()), int((right & ~better & among).sum())
    is_sure = (
        gained > 0
        and binomtest(gained, gained + lost, 0.5, alternative="greater").pvalue < SURE
        and better[among].sum() >= FAR_BETTER * max(1, right[among].sum())
    )
    count, hits = len(true), int(right.sum())
    guessing = count > 0 and binomtest(hits, count, 1 / classes, alternative="greater").pvalue > GUESSING
    return LabelOrder(
        count,
        hits / max(1, count),
        moved if is_sure else {},
        float(better.mean()) if count else 0.0,
        bool(guessing) and classes > 1,
    )


def _halves(labels: NDArray[np.int_]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Every second image of each class, and the others."""
    order = np.argsort(labels, kind="stable")
    return order[::2], order[1::2]


def _assignment(labels: NDArray[np.int_], predicted: NDArray[np.int_], classes: int) -> NDArray[np.int_]:
    """By class the label that is predicted of it, each label once; -1 of a class without images."""
    from scipy.optimize import linear_sum_assignment

    known = max(classes, int(predicted.max(initial=0)) + 1)
    counts = np.zeros((classes, known))
    np.add.at(counts, (labels, predicted), 1)
    # Of equally good assignments the one that moves fewest.
    counts[np.arange(classes), np.arange(classes)] += 1e-6
    rows, columns = linear_sum_assignment(-counts)
    assigned = np.full(classes, -1)
    assigned[rows] = columns
    assigned[np.bincount(labels, minlength=classes) == 0] = -1
    return assigned


def check_order(name: str, classes: list[str], labels: ArrayLike, predicted: ArrayLike) -> str:
    """Check that a classifier's labels are in the order of the classes.

    Args:
        name: of the classifier, with its file, for messages.
        labels, predicted: of InD images; see `label_order`.

    Returns:
        A warning in one line; "" if there is none.

    Raises:
        DataError: they are not; the message names the likely order.
    """
    order = label_order(labels, predicted, len(classes))
    shares = f"of {order.images} InD images {order.accuracy:.1%} are classified rightly"
    if order.moved:
        likely = [order.moved.get(label, label) for label in range(len(classes))]
        raise DataError(
            f"{name}: {shares}, and {order.best:.1%} if its labels are in another order: "
            f"{_described(order.moved, classes)}; {_remedy(likely, classes)}"
        )
    if order.is_guessing:
        return (
            f"{name}: {shares}, which is no more than guessing among {len(classes)} classes; check that it was trained "
            "on these classes, and on images prepared as these are"
        )
    return ""


def _described(moved: dict[int, int], classes: list[str]) -> str:
    pairs = [f"{classes[label]!r} is its label {other}, not {label}" for label, other in moved.items()]
    return ", ".join(pairs[:_SHOWN]) + (", …" if len(pairs) > _SHOWN else "")


def _remedy(order: list[int], classes: list[str]) -> str:
    if sorted(order) != list(range(len(classes))):
        return "give classes in the classifier's order, all that it knows"
    names = [label_name(classes, order.index(label)) for label in range(len(classes))]
    shown = ", ".join(names) if len(names) <= 20 else ", ".join(names[:_SHOWN]) + ", …"
    return f"give classes in the classifier's order: [{shown}]"
