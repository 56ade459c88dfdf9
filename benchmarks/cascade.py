"""Cascades: the AUROC that a cheap gate costs, against the share of images that go through diffusion.

    python benchmarks/cascade.py [--benchmark digits] [--output benchmarks/cascade.json] [--plot benchmarks/cascade.png]

The scores are those of a finished run. The stream is half InD, half OOD test images, near and far together. What is
reported as a result is a band chosen on validation for a stated loss; what it then loses on test has a 95 % interval
over the same draws of images for the cascade and for the second detector alone.

As a description only, chosen on test: bands about the middle of the stream, which hold the same share of it on both
sides of its median, and the best of all bands. No one can have these without the labels of test images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffguard.calibration import Array
from diffguard.cascade import Bands
from diffguard.combination import Combined, Members, fit_combination, z_scores
from diffguard.errors import SettingError
from diffguard.metrics import detection_metrics, resample_scores
from diffguard.settings import Combination
from tasks.combine import Tables, evaluations, score_tables
from tasks.command import run_stage
from tasks.run import Run, open_run
from tasks.score import plan
from tasks.settings import known_name

GATES = ("msp", "knn", "mahalanobis", "pixel-knn")
LOSSES = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
STATED = (0.002, 0.01)
SHARES = np.linspace(0, 1, 51)


def measure(run: Run, tables: Tables, classifier: str, gate: str, second: str) -> dict[str, Any]:
    """What one gate costs, on bands chosen on validation and, as a description, on test."""
    table = {name: tables[classifier, name, run.params.seeds[0]] for name in (gate, second)}
    first = table[gate]
    calibration = _members(table, (first["split"] == "calibration").to_numpy())
    sides = {
        split: [
            _members(table, ((first["split"] == split) & ((first["role"] == "ind") == is_ind)).to_numpy())
            for is_ind in (True, False)
        ]
        for split in ("validation", "test")
    }
    for split, (ind, ood) in sides.items():
        if not len(ind[gate]) or not len(ood[gate]):
            raise SettingError(f"{run.benchmark.name}: the split {split} lacks InD or OOD images")
    steps = [table[second].loc[_rows(first, "test", is_ind), "steps"] for is_ind in (True, False)]
    asked = [evaluations(run, second, each) for each in steps]
    chosen = []
    for loss in LOSSES:
        settings = Combination(kind="cascade", of=(gate, second), loss=loss)
        combined = fit_combination(settings, calibration, (sides["validation"][0], sides["validation"][1]))
        chosen.append({"stated_loss": loss, **_on(combined, sides["test"], asked, run)})
    gates = [z_scores(calibration[gate], side[gate]) for side in sides["test"]]
    seconds = [z_scores(calibration[second], side[second]) for side in sides["test"]]
    bands = Bands.of(*gates, *seconds)
    alone = _auroc([side[second] for side in sides["test"]])
    settings = Combination(kind="cascade", of=(gate, second), loss=0.0)
    symmetric = []
    for share in SHARES:
        combined = Combined(settings, calibration, band=_about_the_middle(gates, share))
        goes_on = [combined.undecided(side[gate]) for side in sides["test"]]
        loss = alone - _auroc([combined.score(side) for side in sides["test"]])
        symmetric.append({"share": float(np.mean([each.mean() for each in goes_on])), "loss": loss})
    return {
        "gate_alone": _auroc([side[gate] for side in sides["test"]]),
        "second_alone": alone,
        "chosen_on_validation": chosen,
        "described_on_test": {
            "about_the_middle": symmetric,
            "best_of_all_bands": _envelope(bands, alone),
            "share_needed": {
                f"{loss:g}": {
                    "about_the_middle": _share_needed(symmetric, loss),
                    "best_of_all_bands": _least(bands, alone - loss),
                }
                for loss in STATED
            },
        },
    }


def _on(combined: Combined, test: list[Members], asked: list[Array], run: Run) -> dict[str, Any]:
    """A cascade on the test stream."""
    gate, second = combined.settings.of
    goes_on = [combined.undecided(side[gate]) for side in test]
    scores = [combined.score(side) for side in test]
    draws = {"draws": run.params.evaluate.draws, "seed": run.params.evaluate.seed}
    mine, alone = (
        resample_scores([ind], {"stream": [ood]}, {}, **draws) for ind, ood in (scores, [side[second] for side in test])
    )
    cost = float(np.mean([(each * through).mean() for each, through in zip(asked, goes_on, strict=True)]))
    band = [each if np.isfinite(each) else None for each in combined.band or ()]
    return {
        "band": band,
        "share": float(np.mean([each.mean() for each in goes_on])),
        "share_ind": float(goes_on[0].mean()),
        "share_ood": float(goes_on[1].mean()),
        "evaluations": None if np.isnan(cost) else cost,
        "auroc": mine.summary()["stream"]["auroc"],
        "loss": alone.difference(mine)["stream"]["auroc"],
    }


def _about_the_middle(gates: list[Array], share: float) -> tuple[float, float]:
    """The band that holds this share of the stream, half of it on each side of the stream's median."""
    if share >= 1:
        return -np.inf, np.inf
    values = np.concatenate(gates)
    # Each side is half of the stream, however many images it has.
    weights = np.concatenate([np.full(len(each), 0.5 / len(each)) for each in gates])
    order = np.argsort(values)
    upto = np.cumsum(weights[order])
    low, high = (float(np.interp(0.5 + side * share / 2, upto, values[order])) for side in (-1, 1))
    return low, high


def _envelope(bands: Bands, alone: float) -> list[dict[str, float]]:
    """The least loss of any band up to each share."""
    found = []
    for share in SHARES:
        best = bands.auroc[bands.share <= share + 1e-12].max()
        found.append({"share": float(share), "loss": float(alone - best)})
    return found


def _least(bands: Bands, auroc: float) -> float | None:
    fine = bands.share[bands.auroc >= auroc - 1e-12]
    return float(fine.min()) if len(fine) else None


def _share_needed(curve: list[dict[str, float]], loss: float) -> float | None:
    """The share from which on no wider band loses more."""
    wide = [each["loss"] <= loss + 1e-12 for each in curve]
    at = next((at for at in range(len(curve)) if all(wide[at:])), None)
    return None if at is None else curve[at]["share"]


def _auroc(sides: list[Array]) -> float:
    return detection_metrics(*sides)["auroc"]


def _rows(table: pd.DataFrame, split: str, is_ind: bool) -> pd.Series:
    return (table["split"] == split) & ((table["role"] == "ind") == is_ind)


def _members(tables: dict[str, pd.DataFrame], rows: np.ndarray[Any, Any]) -> Members:
    return {name: table["score"].to_numpy()[rows] for name, table in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", help="params.yaml's if not given")
    parser.add_argument("--classifier", help="the first one if not given")
    parser.add_argument(
        "--second", help="the detector that decides what a gate leaves open; the default one if not given"
    )
    parser.add_argument(
        "--gates", nargs="+", help=f"cheap detectors; of {', '.join(GATES)}, those there are, if not given"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="a PNG file of the curves")
    options = parser.parse_args()
    run = open_run(benchmark=options.benchmark)
    classifier, second = options.classifier or run.params.classifiers[0], options.second or run.default
    known_name("--classifier", [classifier], run.params.classifiers)
    known_name("--second", [second], run.params.names)
    gates = options.gates or [name for name in GATES if name in run.params.score.baselines]
    known_name("--gates", gates, [name for name in run.params.names if name != second])
    tables = score_tables(run, plan(run))
    report = {
        "benchmark": run.benchmark.name,
        "classifier": classifier,
        "second": second,
        "gates": {gate: measure(run, tables, classifier, gate, second) for gate in gates},
    }
    print(table_of(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(report, options.plot)


def table_of(report: dict[str, Any]) -> str:
    """The report as Markdown, shares in percent and AUROC as it is."""
    lines = [
        f"{report['second']} behind a gate on {report['benchmark']}, classifier {report['classifier']}, "
        "a stream of half InD, half OOD test images",
        "",
        "Bands chosen on validation:",
        "",
        "| gate | stated loss | diffused | of InD | of OOD | evaluations an image | test loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for gate, found in report["gates"].items():
        for each in found["chosen_on_validation"]:
            loss, low, high = (each["loss"][key] for key in ("value", "low", "high"))
            asked = "–" if each["evaluations"] is None else f"{each['evaluations']:.1f}"
            shares = " | ".join(f"{100 * each[key]:.0f}" for key in ("share", "share_ind", "share_ood"))
            lines.append(
                f"| {gate} | {each['stated_loss']:g} | {shares} | {asked} | {loss:+.4f} ({low:+.4f} to {high:+.4f}) |"
            )
    needed = [f"{loss:g}" for loss in STATED]
    lines += [
        "",
        "Description only, bands chosen on test: the loss at 40 % about the middle, and the share that a loss needs",
        "about the middle / with the best of all bands:",
        "",
        f"| gate | gate alone | {report['second']} alone | loss at 40 % |"
        + "".join(f" loss {each} |" for each in needed),
        f"|---|---|---|---|{'---|' * len(needed)}",
    ]
    for gate, found in report["gates"].items():
        described = found["described_on_test"]
        at = min(described["about_the_middle"], key=lambda each: abs(each["share"] - 0.4))
        pairs = [described["share_needed"][each] for each in needed]
        cells = [f"{_percent(each['about_the_middle'])} / {_percent(each['best_of_all_bands'])}" for each in pairs]
        alone = f"{found['gate_alone']:.4f} | {found['second_alone']:.4f} | {at['loss']:+.4f}"
        lines.append(f"| {gate} | {alone} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def plot(report: dict[str, Any], path: Path) -> None:
    """AUROC loss over the share diffused: lines about the middle, marks where validation chose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for number, (gate, found) in enumerate(report["gates"].items()):
        curve = found["described_on_test"]["about_the_middle"]
        axes.plot(
            [100 * each["share"] for each in curve],
            [each["loss"] for each in curve],
            color=f"C{number}",
            label=f"{gate}: bands about the middle (description)",
        )
        chosen = found["chosen_on_validation"]
        axes.plot(
            [100 * each["share"] for each in chosen],
            [each["loss"]["value"] for each in chosen],
            color=f"C{number}",
            linestyle="none",
            marker="o",
            label=f"{gate}: chosen on validation",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="images that go through diffusion, % of a half-InD, half-OOD stream",
        ylabel=f"AUROC lost against {report['second']} alone",
        title=f"Cascades on {report['benchmark']}, classifier {report['classifier']}",
    )
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    run_stage(main)
