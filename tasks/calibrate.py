"""Stage calibrate: the threshold of each detector, from InD calibration scores, and what it then does on test."""

from typing import Any

import pandas as pd
from scipy.stats import binomtest

from diffguard.calibration import accept_threshold
from tasks.command import run_stage
from tasks.files import write_json
from tasks.run import Run, open_run
from tasks.score import Item, plan


def calibrate(run: Run, items: list[Item]) -> dict[str, Any]:
    """Set thresholds and write calibration.json.

    Returns:
        {classifier: {detector: [one entry for each seed]}} with the threshold, and the share of
        images accepted in each test dataset with its 95 % interval (Clopper-Pearson).
    """
    accept = run.params.calibrate.accept
    found: dict[str, Any] = {name: {} for name in run.params.classifiers}
    for item in items:
        table = item.folder.read()
        calibration = table[table["split"] == "calibration"]
        threshold = accept_threshold(calibration["score"], accept)
        entry = {
            "seed": item.seed,
            "threshold": threshold,
            "accept": accept,
            "n_calibration": len(calibration),
            "accepted": {
                dataset: _accepted(rows["score"] <= threshold)
                for dataset, rows in table[table["split"] == "test"].groupby("dataset", sort=False)
            },
        }
        found[item.classifier].setdefault(item.name, []).append(entry)
    write_json(run.results / "calibration.json", found)
    return found


def _accepted(accepted: pd.Series) -> dict[str, float | int]:
    interval = binomtest(int(accepted.sum()), len(accepted)).proportion_ci()
    return {
        "value": float(accepted.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "n": len(accepted),
    }


def main() -> None:
    run = open_run()
    found = calibrate(run, plan(run))
    [entry, *_] = found[run.params.classifiers[0]][run.params.evaluate.default]
    print(f"{run.params.evaluate.default}: a score above {entry['threshold']:.5g} is OOD")


if __name__ == "__main__":
    run_stage(main)
