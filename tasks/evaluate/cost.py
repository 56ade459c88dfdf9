"""What a row of the table costs: network evaluations per image."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from tasks.combine import evaluations, scored_members
from tasks.config.run import Run


def evaluations_per_image(
    run: Run, name: str, metrics: dict[str, Any], steps: Mapping[str, pd.Series], test: pd.DataFrame
) -> float | None:
    """Network evaluations per test image of a row; None where it is not known, see `tasks.combine.evaluations`.

    Of a cascade it is per image of a stream that is half InD, the other half near and far alike.

    Args:
        metrics: of the row; see `tasks.evaluate.report.Metrics`.
        steps: by variant, the steps that the inversion of each test image took.
        test: ``dataset`` and ``role`` of the test images.
    """
    if "diffused" in metrics:
        return _of_stream({dataset: each["evaluations"] for dataset, each in metrics["diffused"].items()}, test)
    # Members that are no variants evaluate no network, so that all steps are those of the variants.
    members = metrics["fitted"][0]["members"] if "fitted" in metrics else [name]
    variants = [row for member in members for row in scored_members(run, member) if row in run.params.score.variants]
    cost = float(np.mean(evaluations(run, name, steps[variants[0]], members))) if variants else 0.0
    return None if np.isnan(cost) else cost


def _of_stream(costs: Mapping[str, float | None], test: pd.DataFrame) -> float | None:
    """Per image, half of the images InD, the other half near and far alike (or all of one of them)."""
    if None in costs.values():
        return None
    by_role = test["dataset"].map(costs).groupby(test["role"]).mean()
    ood = [by_role[role] for role in ("near", "far") if role in by_role]
    return float(by_role["ind"] + np.mean(ood)) / 2
