"""Stage calibrate: thresholds of each detector, from InD calibration scores, and what they then do on test."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from diffguard.calibration.conformal import Conformal, promised_rejection
from diffguard.utils.names import label_name
from tasks.combine import Tables, score_tables
from tasks.common.console import run_stage
from tasks.common.files import write_json
from tasks.config.run import Run, open_run
from tasks.models.label_order import check_order
from tasks.score.plan import Item, plan


def calibrate(run: Run, items: list[Item]) -> dict[str, Any]:
    """Set thresholds and write calibration.json.

    Returns:
        {classifier: {detector: [one entry for each seed]}}. An entry has the false-rejection rate
        ``alpha``, ``thresholds`` by the name of the predicted class where it has enough calibration images,
        and one ``threshold`` of the others, ``pooled_classes``. Decisions are made by these: ``accepted`` is
        the share of images of each test dataset, and ``rejected`` that of InD test images, with its 95 %
        interval (Clopper-Pearson), beside the rate ``promised`` that so many calibration images guarantee,
        floor(alpha (n + 1)) / (n + 1); see `Conformal.promised`. The same of one threshold for all classes are
        ``threshold_together``, ``rejected_together`` and ``promised_together``.
    """
    tables = score_tables(run, items)
    check_orders(run, tables)
    thresholds: dict[str, Any] = {
        classifier: {
            name: [_entry(run, seed, tables[classifier, name, seed]) for seed in run.params.seeds]
            for name in run.params.names
        }
        for classifier in run.params.classifiers
    }
    write_json(run.results / "calibration.json", thresholds)
    return thresholds


def check_orders(run: Run, tables: Tables) -> None:
    """Check that each classifier's labels are in the order of the classes, by InD images outside of the test split.

    Raises:
        DataError: see `tasks.models.label_order.check_order`.
    """
    for classifier in run.params.classifiers:
        for seed in run.params.seeds:
            table = tables[classifier, run.params.names[0], seed]
            rows = table[(table["role"] == "ind") & (table["split"] != "test")]
            name = f"data/benchmarks/{run.benchmark.name}.yaml: classifier {classifier}"
            if warning := check_order(name, run.classes, rows["label"], rows["predicted"]):
                print(f"warning: {warning}")


def conformal(run: Run, table: pd.DataFrame, conditional: bool = True) -> Conformal:
    """The decision of a detector, from the calibration rows of its score table; see `Conformal.fit`."""
    rows = table[table["split"] == "calibration"]
    return Conformal.fit(rows["score"], rows["predicted"], 1 - run.params.calibrate.accept, conditional)


def _entry(run: Run, seed: int, table: pd.DataFrame) -> dict[str, Any]:
    decision, together = conformal(run, table), conformal(run, table, conditional=False)
    test = table[table["split"] == "test"]
    test = test.assign(rejected=decision.rejects(test["score"], test["predicted"]))
    ind = test[test["role"] == "ind"]
    names = _titles(run.classes, decision.thresholds)
    return {
        "seed": seed,
        "accept": run.params.calibrate.accept,
        "alpha": decision.alpha,
        "n_calibration": len(together.pooled),
        "threshold": decision.threshold(),
        "thresholds": {names[label]: limit for label, limit in decision.thresholds.items()},
        "pooled_classes": [names[label] for label in decision.pooled_classes(len(run.classes))],
        "rejected": share(ind["rejected"]),
        "promised": decision.promised(ind["predicted"]),
        "threshold_together": together.threshold(),
        "rejected_together": share(ind["score"] > together.threshold()),
        "promised_together": promised_rejection(len(together.pooled), together.alpha),
        "accepted": {dataset: share(~rows["rejected"]) for dataset, rows in test.groupby("dataset", sort=False)},
    }


def _titles(classes: list[str], labels: Iterable[int]) -> dict[int, str]:
    """The names of all classes and of these labels, told apart by the label where two have the same."""
    names = {label: label_name(classes, label) for label in {*range(len(classes)), *labels}}
    times = Counter(names.values())
    return {label: f"{name} ({label})" if times[name] > 1 else name for label, name in names.items()}


def share(chosen: ArrayLike) -> dict[str, float | int]:
    """A share of images with its 95 % interval (Clopper and Pearson, exact): "value", "low", "high" and "n"."""
    values = np.asarray(chosen, bool)
    interval = binomtest(int(values.sum()), len(values)).proportion_ci()
    return {"value": float(values.mean()), "low": float(interval.low), "high": float(interval.high), "n": len(values)}


def main() -> None:
    run = open_run()
    thresholds = calibrate(run, plan(run))
    name = run.default
    [entry, *_] = thresholds[run.params.classifiers[0]][name]
    rejected, low, high = (100 * entry["rejected"][key] for key in ("value", "low", "high"))
    print(
        f"{name}: own thresholds for {len(entry['thresholds'])} predicted classes, {entry['threshold']:.5g} "
        f"for each other; {rejected:.1f} % ({low:.1f}–{high:.1f}) of InD test images are "
        f"above theirs, {100 * entry['promised']:.1f} % are expected"
    )


if __name__ == "__main__":
    run_stage(main)
