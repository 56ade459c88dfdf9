"""Fusion against every single detector and against DiffGuard alone, for each classifier.

    python experiments/fusion.py [--benchmark digits] [--combinations fused-cfg-w1] [--output OUT.json]

The scores are those of a finished run. Each difference, combination minus single detector, has a 95 % interval over
the same bootstrap draws of test images for both. A combination's weights are none, its calibration is of InD images,
and nothing was chosen on test. A single detector is better within the interval where the whole interval is under 0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from diffguard.errors import SettingError
from diffguard.settings import Variant
from tasks.combine import Tables, score_tables, scored_members
from tasks.common.console import run_stage
from tasks.common.text import known_name
from tasks.config.run import Run, open_run
from tasks.evaluate.stage import resampled
from tasks.score.plan import plan


def measure(run: Run, tables: Tables, classifier: str, combinations: list[str]) -> dict[str, Any]:
    """{combination: {"diffguard", "metrics", "difference"}}: its variants, its metrics, these minus the singles'."""
    singles = [name for name in run.params.score.names if not _is_told(run.params.score.variants.get(name))]
    drawn = {name: resampled(run, tables, classifier, name, "test") for name in (*singles, *combinations)}
    found: dict[str, Any] = {}
    for name in combinations:
        metrics = drawn[name]
        if metrics is None:
            raise SettingError(f"{run.benchmark.name}: no InD or no OOD images in the test split")
        found[name] = {
            "diffguard": [each for each in scored_members(run, name) if each in run.params.score.variants],
            "metrics": metrics.summary(),
            "difference": {single: metrics.difference(other) for single in singles if (other := drawn[single])},
        }
    return found


def _is_told(variant: Variant | None) -> bool:
    """Whether a variant is given true labels, which no detector knows."""
    return variant is not None and variant.label != "predicted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", help="params.yaml's if not given")
    parser.add_argument("--classifier", help="all if not given")
    parser.add_argument("--combinations", nargs="+", help="names; all that fuse scores if not given")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = open_run(benchmark=options.benchmark)
    classifiers = [options.classifier] if options.classifier else run.params.classifiers
    known_name("--classifier", classifiers, run.params.classifiers)
    combinations = options.combinations or run.params.fusions
    known_name("--combinations", combinations, run.params.combine)
    if not combinations:
        raise SettingError(f"params.yaml: combine: {run.benchmark.name} has no combination that fuses scores")
    tables = score_tables(run, plan(run))
    report = {
        "benchmark": run.benchmark.name,
        "draws": run.params.evaluate.draws,
        "classifiers": {each: measure(run, tables, each, combinations) for each in classifiers},
    }
    print(table_of(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table_of(report: dict[str, Any]) -> str:
    """The report as Markdown, in points of AUROC and FPR@95."""
    columns = [(group, metric) for group in ("near", "far") for metric in ("auroc", "fpr95")]
    lines = [
        "| classifier | combination | minus | near AUROC | near FPR@95 | far AUROC | far FPR@95 |",
        "|---|---|---|---|---|---|---|",
    ]
    worse = []
    for classifier, combinations in report["classifiers"].items():
        for name, each in combinations.items():
            for single, groups in each["difference"].items():
                cells = [_cell(groups.get(group, {}).get(metric)) for group, metric in columns]
                mark = " (DiffGuard alone)" if single in each["diffguard"] else ""
                lines.append(f"| {classifier} | {name} | {single}{mark} | {' | '.join(cells)} |")
                worse += [
                    f"{classifier}: {name} has less {group} AUROC than {single}"
                    for group in ("near", "far")
                    if groups.get(group, {}).get("auroc", {"high": 0.0})["high"] < 0
                ]
    verdict = worse or ["no single detector has a higher AUROC than a combination, beyond the interval"]
    return "\n".join([*lines, "", *verdict])


def _cell(metric: dict[str, float] | None) -> str:
    if metric is None:
        return "–"
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    run_stage(main)
