"""A finished run as one small file, from which the tables of README.md and docs/ are written.

    python experiments/record.py [--benchmark digits] [--variants ROWS] [--data data] [--output FILE]

Of every row it has the metrics on near- and far-OOD with their intervals, of a combination the differences to its
members, the network evaluations per test image, of a cascade per image of a stream that is half InD, the other half
near and far alike, and what a combination has chosen on validation. Beside them are the classifiers' accuracy, how many
images each figure is of, the versions and the date. `experiments/tables.py` writes the tables.
"""

import argparse
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from diffguard.version import METHOD_VERSION, __version__
from tasks.common.console import run_stage
from tasks.common.files import read_json, write_json
from tasks.config.run import Run, open_run
from tasks.evaluate.cost import evaluations_per_image
from tasks.score.plan import plan

GROUPS, METRICS = ("near", "far"), ("auroc", "fpr95")
DECIMALS = 6
"""Decimals that are kept: the bootstrap's last ones mean nothing, and would be half of the file."""


def record(run: Run, metrics: dict[str, Any], tables: Mapping[tuple[str, str], pd.DataFrame]) -> dict[str, Any]:
    """What a run measured on its test split.

    Args:
        metrics: of metrics.json, {classifier: {row: {dataset or group: {metric: {"value", "low", "high"}}}}}.
        tables: the scores of every variant, by classifier and name.
    """
    test = {row: table[table["split"] == "test"] for row, table in tables.items()}
    any_table = next(iter(test.values()))
    classifiers = {}
    for classifier, rows in metrics.items():
        steps = {name: table["steps"] for (of, name), table in test.items() if of == classifier}
        ind = next(table for (of, _), table in test.items() if of == classifier).query("role == 'ind'")
        classifiers[classifier] = {
            "accuracy": round(float((ind["label"] == ind["predicted"]).mean()), DECIMALS),
            "rows": {name: _row(run, name, row, steps, any_table) for name, row in rows.items()},
        }
    return {
        "benchmark": run.benchmark.name,
        "recorded": datetime.now(UTC).date().isoformat(),
        "versions": {
            "diffguard": __version__,
            "method": METHOD_VERSION,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "diffusers")},
        },
        "seeds": list(run.params.seeds),
        "draws": run.params.evaluate.draws,
        "images": {str(role): len(rows) for role, rows in any_table.groupby("role", sort=False)},
        "classifiers": classifiers,
    }


def _row(
    run: Run, name: str, metrics: dict[str, Any], steps: Mapping[str, "pd.Series[int]"], test: pd.DataFrame
) -> dict[str, Any]:
    row = groups_of(metrics)
    if differences := metrics.get("difference"):
        row["difference"] = {member: groups_of(values) for member, values in differences.items()}
    if "fitted" in metrics:
        row["fitted"] = rounded(metrics["fitted"][0])
    cost = evaluations_per_image(run, name, metrics, steps, test)
    row["evaluations"] = None if cost is None else round(cost, DECIMALS)
    return row


def rounded(value: Any) -> Any:
    """Plain values, their numbers to `DECIMALS`."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def groups_of(found: dict[str, Any]) -> dict[str, Any]:
    return {group: {metric: rounded(found[group][metric]) for metric in METRICS} for group in GROUPS if group in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", help="params.yaml's if not given")
    parser.add_argument("--variants", nargs="+", help="the rows that the run was told to have; all if not given")
    parser.add_argument("--data", type=Path, help="the data/ of another copy of this project")
    parser.add_argument("--output", type=Path, help="experiments/results/<benchmark>.json if not given")
    options = parser.parse_args()
    data = None if options.data is None else str(options.data.resolve())
    run = open_run(benchmark=options.benchmark, variants=options.variants, data=data)
    results = run.results if options.data is None else run.home
    metrics = read_json(results / "metrics.json", "run: make evaluate")
    output = options.output or Path(__file__).parent / "results" / f"{run.benchmark.name}.json"
    tables = {
        (item.classifier, item.name): item.read()
        for item in plan(run)
        if item.seed == run.params.seeds[0] and item.name in run.params.score.variants
    }
    write_json(output, record(run, metrics, tables))
    print(f"{output}: {sum(map(len, metrics.values()))} rows")


if __name__ == "__main__":
    run_stage(main)
