"""AUROC in the precision that `auto` means against float32: the same images, models and noise.

    python experiments/precision.py [--benchmark digits] [--precision bfloat16] [--output OUT.json]

Every variant of a benchmark is scored in float32 and in the other precision, by its own models (its run made them).
The differences of AUROC have 95 % intervals over the same bootstrap draws of test images. Beside them is how far the
scores themselves move, in standard deviations of the InD test scores. A benchmark's figures take the place of its
former ones in the output; others stay. Where the device has no units for it, bfloat16 is computed slowly, to the same
end.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffguard.utils.precision import has_bfloat16_units
from tasks.common.console import run_stage
from tasks.common.devices import devices
from tasks.config.precision import PRECISIONS
from tasks.config.run import Run, open_run
from tasks.evaluate.stage import resampled
from tasks.score.plan import Tables, plan, read_items
from tasks.score.stage import score


def in_one_precision(run: Run, precision: str) -> Run:
    """The run's variants alone, all in this precision but for those of a published preset, which have their own."""
    variants = {
        name: variant.model_copy(update={"precision": precision})
        for name, variant in run.params.score.variants.items()
        if variant.precision != "float16"
    }
    only = run.params.only(variants)
    params = only.model_copy(update={"score": only.score.model_copy(update={"variants": variants}), "combine": {}})
    return replace(run, params=params, own=False, whole=False, precision=None)


def measure(run: Run, precision: str) -> dict[str, Any]:
    """{classifier: {variant: {"auroc", "difference", "largest_move"}}}, near and far."""
    of_precision: dict[str, tuple[Run, Tables]] = {}
    for name in ("float32", precision):
        one = in_one_precision(run, name)
        score(one)
        of_precision[name] = one, {key: table for key, table in read_items(plan(one)).items()}
    (run32, tables32), (run16, tables16) = of_precision["float32"], of_precision[precision]
    rows: dict[str, Any] = {}
    for classifier in run.params.classifiers:
        for name in run32.params.score.variants:
            full = resampled(run32, tables32, classifier, name, "test")
            lowered = resampled(run16, tables16, classifier, name, "test")
            assert full is not None
            assert lowered is not None
            metrics, differences = full.summary(), lowered.difference(full, ["auroc"])
            seed = run.params.seeds[0]
            test32, test16 = (
                tables[classifier, name, seed].query("split == 'test'") for tables in (tables32, tables16)
            )
            spread = float(test32.loc[test32["role"] == "ind", "score"].std())
            move = np.abs(test16["score"].to_numpy() - test32["score"].to_numpy()) / spread
            rows.setdefault(classifier, {})[name] = {
                "auroc": {group: metrics[group]["auroc"] for group in ("near", "far") if group in metrics},
                "difference": {group: differences[group]["auroc"] for group in ("near", "far") if group in differences},
                "score_move": {"median": float(np.median(move)), "largest": float(move.max())},
                "other_steps": float((test32["steps"].to_numpy() != test16["steps"].to_numpy()).mean()),
            }
    return rows


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, in points of AUROC."""
    lines = [
        "| benchmark | classifier | variant | near AUROC, float32 | difference | far AUROC, float32 | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for benchmark, measured in report.items():
        for classifier, rows in measured["classifiers"].items():
            for name, row in rows.items():
                cells = []
                for group in ("near", "far"):
                    if group not in row["auroc"]:
                        cells += ["–", "–"]
                        continue
                    value, low, high = (100 * row["difference"][group][key] for key in ("value", "low", "high"))
                    cells += [f"{100 * row['auroc'][group]['value']:.2f}", f"{value:+.2f} ({low:+.2f} to {high:+.2f})"]
                lines.append(f"| {benchmark} | {classifier} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", help="params.yaml's if not given")
    parser.add_argument("--root", help="what {root} stands for in the paths of the benchmark's file")
    parser.add_argument("--limit", type=int, help="the most images of each dataset of validation and test")
    parser.add_argument("--precision", choices=PRECISIONS[1:], default="bfloat16")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = open_run(benchmark=options.benchmark, limit=options.limit, root=options.root)
    measured = {
        "command": f"python experiments/precision.py --benchmark {run.benchmark.name}"
        + (f" --limit {options.limit}" if options.limit else ""),
        "precision": options.precision,
        "units": has_bfloat16_units(devices()[0]),
        "torch": torch.__version__,
        "images": run.scored.query("split == 'test'").groupby("role").size().to_dict(),
        "classifiers": measure(run, options.precision),
    }
    report = {}
    if options.output is not None and options.output.is_file():
        report = json.loads(options.output.read_text(encoding="utf-8"))
    report[run.benchmark.name] = measured
    print(table({run.benchmark.name: measured}))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
