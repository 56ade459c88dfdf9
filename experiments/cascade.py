"""Cascades: the AUROC that a cheap gate costs, against the share of images that go through diffusion.

    python experiments/cascade.py [--benchmark digits] [--output OUT.json] [--plot OUT.png]

The scores are those of a finished run. The stream is of test images, half InD, half OOD, these half near and half
far; AUROC and FPR@95 are of near, of far and of the stream. What is reported as a result is a band chosen on validation
for a stated loss; what it then loses on test has a 95 % interval over the same draws of images for the cascade and for
the second detector alone.

As a description only, chosen on test: bands about the middle of the stream, which hold the same share of it on both
sides of its median, and of all bands that with the highest AUROC on the stream. No one can have these without the
labels of test images.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffguard.calibration.conformal import Array
from diffguard.calibration.zscores import z_scores
from diffguard.detectors.cascade import Bands, Cascade
from diffguard.detectors.combination import Members
from diffguard.errors import SettingError
from diffguard.metrics import detection_metrics, resample_scores
from diffguard.settings import Combination
from tasks.combine import Tables, evaluations, score_tables, sides
from tasks.common.console import run_stage
from tasks.common.text import known_name
from tasks.config.run import Run, open_run
from tasks.score.plan import plan

GATES = ("msp", "knn", "mahalanobis", "pixel-knn")
LOSSES = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
STATED = (0.002, 0.01)
SHARES = np.linspace(0, 1, 51)
PARTS = ("stream", "near", "far")


def measure(run: Run, tables: Tables, classifier: str, gate: str, second: str) -> dict[str, Any]:
    """What one gate costs, on bands chosen on validation and, as a description, on test."""
    table = {name: tables[classifier, name, run.params.seeds[0]] for name in (gate, second)}
    calibration = {name: each.loc[each["split"] == "calibration", "score"].to_numpy() for name, each in table.items()}
    validation, (ind, ood) = sides(table, "validation"), sides(table, "test")
    for split, (inside, outside) in {"validation": validation, "test": (ind, ood)}.items():
        if not len(inside[gate]) or not outside:
            raise SettingError(f"{run.benchmark.name}: the split {split} lacks InD or OOD images")
    images = {"ind": ind, **ood}
    cost = table[second].assign(score=evaluations(run, second, table[second]["steps"]))
    asked_ind, asked_ood = sides({second: cost}, "test")
    asked = _of({"ind": asked_ind, **asked_ood}, second)
    stream = Stream(images, asked, alone=_metrics(_of(images, second)))

    def cascade(band: tuple[float, float]) -> Cascade:
        return Cascade(Combination(kind="cascade", of=(gate, second), loss=0.0), calibration, band)

    chosen = []
    for loss in LOSSES:
        settings = Combination(kind="cascade", of=(gate, second), loss=loss)
        combined = Cascade.fit(settings, calibration, validation)
        chosen.append({"stated_loss": loss, **_result(combined, stream, run)})
    gates, seconds = (
        {role: z_scores(calibration[name], each) for role, each in _of(images, name).items()} for name in table
    )
    bands = Bands.of(gates["ind"], [gates[role] for role in ood], seconds["ind"], [seconds[role] for role in ood])
    middle = [_point(cascade(_about_the_middle(gates, share)), stream) for share in SHARES]
    return {
        "gate_alone": _metrics(_of(images, gate)),
        "second_alone": stream.alone,
        "chosen_on_validation": chosen,
        "described_on_test": {
            "about_the_middle": middle,
            "best_of_all_bands": [_point(cascade(_best(bands, share)), stream) for share in SHARES],
            "share_needed": {f"{loss:g}": _needed(middle, bands, stream, loss) for loss in STATED},
        },
    }


@dataclass(frozen=True)
class Stream:
    """The test images: half InD, half OOD with an equal part of each role.

    Attributes:
        images: by role, "ind" and those of OOD images, the scores of both detectors.
        asked: by role, network evaluations of each image if it goes on.
        alone: the metrics of the second detector, by OOD role and of the stream.
    """

    images: Mapping[str, Members]
    asked: Mapping[str, Array]
    alone: Mapping[str, Mapping[str, float]]

    def through(self, goes_on: Mapping[str, NDArray[np.bool_]]) -> dict[str, float | None]:
        """What goes on: its share of the stream, and the network evaluations an image of the stream."""
        cost = _mean({role: float((self.asked[role] * each).mean()) for role, each in goes_on.items()})
        return {
            "share": _mean({role: float(each.mean()) for role, each in goes_on.items()}),
            "evaluations": None if np.isnan(cost) else cost,
        }


def _result(combined: Cascade, stream: Stream, run: Run) -> dict[str, Any]:
    """A cascade on the stream, with intervals."""
    goes_on, scores = _asked_of(combined, stream)
    draws = {"draws": run.params.evaluate.draws, "seed": run.params.evaluate.seed}
    cascade, alone = (
        resample_scores(
            [by_role["ind"]],
            {role: [each] for role, each in by_role.items() if role != "ind"},
            {"stream": [role for role in by_role if role != "ind"]},
            **draws,
        )
        for by_role in (scores, _of(stream.images, combined.settings.of[1]))
    )
    lost = alone.difference(cascade)
    return {
        "band": [each if np.isfinite(each) else None for each in combined.band],
        **stream.through(goes_on),
        "share_of": {role: float(each.mean()) for role, each in goes_on.items()},
        **{
            part: {"auroc": each["auroc"], "fpr95": each["fpr95"], "loss": lost[part]["auroc"]}
            for part, each in cascade.summary().items()
        },
    }


def _point(combined: Cascade, stream: Stream) -> dict[str, Any]:
    """A cascade on the stream, without intervals: a point of a curve."""
    goes_on, scores = _asked_of(combined, stream)
    return {
        **stream.through(goes_on),
        **{
            part: {**each, "loss": stream.alone[part]["auroc"] - each["auroc"]}
            for part, each in _metrics(scores).items()
        },
    }


def _asked_of(combined: Cascade, stream: Stream) -> tuple[dict[str, NDArray[np.bool_]], dict[str, Array]]:
    """By role: which images the gate leaves to the second detector, and the cascade's scores."""
    gate = combined.settings.of[0]
    goes_on = {role: combined.undecided(each[gate]) for role, each in stream.images.items()}
    return goes_on, {role: combined.score(each) for role, each in stream.images.items()}


def _metrics(scores: Mapping[str, Array]) -> dict[str, dict[str, float]]:
    """AUROC and FPR@95 against each OOD role, and against the stream's OOD half: their mean."""
    roles = [role for role in scores if role != "ind"]
    found = {role: detection_metrics(scores["ind"], scores[role]) for role in roles}
    by_role = {role: {name: found[role][name] for name in ("auroc", "fpr95")} for role in roles}
    stream = {name: float(np.mean([by_role[role][name] for role in roles])) for name in ("auroc", "fpr95")}
    return {**by_role, "stream": stream}


def _mean(by_role: Mapping[str, float]) -> float:
    """Over the stream."""
    return float(by_role["ind"] + np.mean([each for role, each in by_role.items() if role != "ind"])) / 2


def _of(images: Mapping[str, Members], name: str) -> dict[str, Array]:
    return {role: each[name] for role, each in images.items()}


def _about_the_middle(gate: Mapping[str, Array], share: float) -> tuple[float, float]:
    """The band that holds this share of the stream, half of it on each side of the stream's median."""
    if share >= 1:
        return -np.inf, np.inf
    values = np.concatenate(list(gate.values()))
    # A side is half of the stream, and a role its part of that, however many images it has.
    part = {role: 0.5 if role == "ind" else 0.5 / (len(gate) - 1) for role in gate}
    weights = np.concatenate([np.full(len(each), part[role] / len(each)) for role, each in gate.items()])
    order = np.argsort(values)
    upto = np.cumsum(weights[order])
    low, high = (float(np.interp(0.5 + side * share / 2, upto, values[order])) for side in (-1, 1))
    return low, high


def _best(bands: Bands, share: float) -> tuple[float, float]:
    """The band with the highest AUROC on the stream of those up to this share; of equal ones the least."""
    fine = np.flatnonzero(bands.share <= share + 1e-12)
    best = fine[np.lexsort([bands.share[fine], -bands.auroc[:, fine].mean(axis=0).round(12)])[0]]
    return float(bands.ends[best, 0]), float(bands.ends[best, 1])


def _needed(
    middle: list[dict[str, Any]], bands: Bands, stream: Stream, loss: float
) -> dict[str, dict[str, float | None]]:
    """By OOD role and of the stream: the share of the stream that a loss needs on each curve."""
    auroc = dict(zip((role for role in stream.images if role != "ind"), bands.auroc, strict=True))
    auroc["stream"] = bands.auroc.mean(axis=0)
    return {
        part: {
            "about_the_middle": _share_needed(middle, part, loss),
            "best_of_all_bands": _least(bands.share[each >= stream.alone[part]["auroc"] - loss - 1e-12]),
        }
        for part, each in auroc.items()
    }


def _least(shares: Array) -> float | None:
    return float(shares.min()) if len(shares) else None


def _share_needed(curve: list[dict[str, Any]], part: str, loss: float) -> float | None:
    """The share from which on no wider band loses more."""
    wide = [each[part]["loss"] <= loss + 1e-12 for each in curve]
    at = next((at for at in range(len(curve)) if all(wide[at:])), None)
    return None if at is None else curve[at]["share"]


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
        "Bands chosen on validation, and what they lose on test:",
        "",
        "| gate | stated loss | diffused | evaluations an image | loss | FPR@95 | near loss | far loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gate, found in report["gates"].items():
        for each in found["chosen_on_validation"]:
            fpr = f"{each['stream']['fpr95']['value']:.3f}"
            loss, *by_role = (_interval(each.get(part)) for part in PARTS)
            cells = [f"{each['stated_loss']:g}", *_cost(each), loss, fpr, *by_role]
            lines.append(f"| {gate} | {' | '.join(cells)} |")
    needed = [f"{loss:g}" for loss in STATED]
    lines += [
        "",
        "Description only, bands chosen on test: the share of the stream that a loss needs, about the middle / with",
        "the best of all bands:",
        "",
        f"| gate | OOD | gate alone: AUROC, FPR@95 | {report['second']} alone |"
        + "".join(f" loss {each} |" for each in needed),
        f"|---|---|---|---|{'---|' * len(needed)}",
    ]
    for gate, found in report["gates"].items():
        for part in (part for part in PARTS if part in found["gate_alone"]):
            pairs = [found["described_on_test"]["share_needed"][each][part] for each in needed]
            cells = [f"{_percent(each['about_the_middle'])} / {_percent(each['best_of_all_bands'])}" for each in pairs]
            alone = [found[key][part] for key in ("gate_alone", "second_alone")]
            cells = [*(f"{each['auroc']:.4f}, {each['fpr95']:.3f}" for each in alone), *cells]
            lines.append(f"| {gate} | {part} | {' | '.join(cells)} |")
    lines += [
        "",
        "and the loss on the stream, its FPR@95 and the evaluations an image with bands about the middle:",
        "",
        "| gate | diffused | evaluations an image | loss | FPR@95 |",
        "|---|---|---|---|---|",
    ]
    for gate, found in report["gates"].items():
        for each in found["described_on_test"]["about_the_middle"][::5]:
            cells = [*_cost(each), f"{each['stream']['loss']:+.4f}", f"{each['stream']['fpr95']:.3f}"]
            lines.append(f"| {gate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(each: dict[str, Any]) -> list[str]:
    return [_percent(each["share"]), "–" if each["evaluations"] is None else f"{each['evaluations']:.1f}"]


def _interval(part: dict[str, Any] | None) -> str:
    if part is None:
        return "–"
    value, low, high = (part["loss"][key] for key in ("value", "low", "high"))
    return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def plot(report: dict[str, Any], path: Path) -> None:
    """AUROC loss and FPR@95 over the share diffused: lines about the middle, marks where validation chose."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    panels = zip(figure.subplots(ncols=2), ("loss", "fpr95"), strict=True)
    for axes, metric in panels:
        for number, (gate, found) in enumerate(report["gates"].items()):
            curve, chosen = found["described_on_test"]["about_the_middle"], found["chosen_on_validation"]
            axes.plot(
                [100 * each["share"] for each in curve],
                [each["stream"][metric] for each in curve],
                color=f"C{number}",
                label=f"{gate}: bands about the middle (description)",
            )
            axes.plot(
                [100 * each["share"] for each in chosen],
                [each["stream"][metric]["value"] for each in chosen],
                color=f"C{number}",
                linestyle="none",
                marker="o",
                label=f"{gate}: chosen on validation",
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            xlabel="images that go through diffusion, % of a half-InD, half-OOD stream",
            ylabel="FPR@95" if metric == "fpr95" else f"AUROC lost against {report['second']} alone",
        )
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Cascades on {report['benchmark']}, classifier {report['classifier']}")
    figure.savefig(path)


if __name__ == "__main__":
    run_stage(main)
