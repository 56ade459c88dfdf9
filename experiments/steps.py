"""AUROC against network evaluations: step counts and solvers on a benchmark, chosen on validation.

    python experiments/steps.py [--benchmark glyphs] [--output experiments/results/steps.json]

Every setting is label-conditional reconstruction at w = 1 with pixel L1, as the default variant, on the
trained models of a benchmark (its run made them). The cheapest setting whose AUROC on validation (near and far
together) is not under the default's is named `fast`; what it then does on test is what it costs.
Differences have a paired bootstrap interval. The second-order solver's first step is of first order, so
that with two steps in each direction it is DDIM.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from diffguard.engine import Engine, Request, Sample, tune
from diffguard.settings import DEFAULT_VARIANT, Variant
from tasks.common.files import read_images
from tasks.config.run import open_run
from tasks.models.loaded import load_models

DRAWS = 1000


def settings() -> dict[str, Variant]:
    """Grids of 2 to 20 levels, each stop from an eighth of the way up to half of it, both solvers."""
    variants = {}
    for levels in (2, 4, 5, 8, 10, 20):
        for stop in range(1, levels // 2 + 1):
            if 0.1 < stop / levels <= 0.5:
                for solver in ("ddim", "dpm-solver++"):
                    change = {"levels": levels, "stop": stop, "solver": solver}
                    if solver == "ddim" or stop > 1:  # a single step is of first order
                        variants[f"{levels} levels to {stop}, {solver}"] = DEFAULT_VARIANT.model_copy(update=change)
    return variants


def auroc(ind: NDArray[np.float64], ood: NDArray[np.float64]) -> float:
    """Of outlier scores: the share of pairs in the right order, ties counted half."""
    ind = np.sort(ind)
    below, upto = np.searchsorted(ind, ood, "left"), np.searchsorted(ind, ood, "right")
    return float((below + upto).mean() / 2 / len(ind))


def paired(scores: pd.DataFrame, name: str, default: str, rng: np.random.Generator) -> dict[str, Any]:
    """AUROC of a setting, and its difference to the default's, with 95 % intervals over the same draws."""
    ind, ood = (scores[scores["role"].eq("ind") == side] for side in (True, False))
    values, differences = [], []
    for _ in range(DRAWS):
        i, o = rng.integers(len(ind), size=len(ind)), rng.integers(len(ood), size=len(ood))
        value, default_value = (auroc(ind[each].to_numpy()[i], ood[each].to_numpy()[o]) for each in (name, default))
        values.append(value)
        differences.append(value - default_value)
    value = auroc(ind[name].to_numpy(), ood[name].to_numpy())
    low, high = np.percentile(values, [2.5, 97.5])
    less, more = np.percentile(differences, [2.5, 97.5])
    difference = value - auroc(ind[default].to_numpy(), ood[default].to_numpy())
    return {
        "auroc": {"value": value, "low": low, "high": high},
        "difference": {"value": difference, "low": less, "high": more},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", help="params.yaml's if not given")
    parser.add_argument("--classifier", help="the first one if not given")
    parser.add_argument("--limit", type=int, help="images of each dataset and split")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = open_run(benchmark=options.benchmark, limit=options.limit)
    options.classifier = options.classifier or run.params.classifiers[0]
    models = load_models(run, run.params.seeds[0], "cpu")
    denoiser, classifier = models.denoiser, models.classifiers[options.classifier]
    rows = run.scored[run.scored["split"].isin(["validation", "test"])].reset_index(drop=True)
    images, variants = read_images(run.home, rows), settings()
    default = next(name for name, variant in variants.items() if variant == DEFAULT_VARIANT)
    slots, evaluations = tune(denoiser, "float32").slots, {}
    for name, variant in variants.items():
        engine = Engine(denoiser, [Request(classifier, variant)], slots=slots)
        found = dict(engine.run(Sample(row, image) for row, image in enumerate(images)))
        rows[name] = torch.tensor([found[row][0].score for row in range(len(images))]).double().numpy()
        evaluations[name] = engine.stats.evaluations / len(images)
    report: dict[str, Any] = {"benchmark": run.benchmark.name, "classifier": options.classifier, "default": default}
    report["settings"] = {
        name: {
            "evaluations_per_image": evaluations[name],
            **{
                split: paired(rows[rows["split"] == split], name, default, np.random.default_rng(0))
                for split in ("validation", "test")
            },
        }
        for name in variants
    }
    gain = {name: each["validation"]["difference"]["value"] for name, each in report["settings"].items()}
    fine = [name for name in variants if gain[name] >= 0]
    report["fast"] = min(fine, key=lambda name: (evaluations[name], -gain[name]))
    print(table(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, the cheapest first."""
    lines = [
        "| setting | evaluations | validation AUROC | difference | test AUROC | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in sorted(report["settings"].items(), key=lambda item: item[1]["evaluations_per_image"]):
        cells = []
        for split in ("validation", "test"):
            for kind in ("auroc", "difference"):
                value, low, high = (100 * each[split][kind][key] for key in ("value", "low", "high"))
                cells.append(f"{value:.1f} ({low:.1f} to {high:.1f})")
        mark = " (default)" if name == report["default"] else " (fast)" if name == report["fast"] else ""
        lines.append(f"| {name}{mark} | {each['evaluations_per_image']:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
