"""Cascades: whether they lose at most what they state, and which share of the images they spare the second detector.

    python experiments/cascade.py [--benchmark glyphs] [--draws 100] [--output OUT.json]

The scores are those of a finished run. In each of many random draws a band is chosen on validation images, for a stated
loss, and what the cascade then loses to its second detector alone is counted on other images, near and far each. The
share is of a stream that is half InD, half OOD, with an equal part of near and far.

- `same kinds`: the images of the splits validation and test together are dealt anew, InD, near and far each, so many to
  validation, the rest to test. Both are of the same kinds of images, as the confidence bound takes for granted.
- `other kinds`: validation is drawn out of the split validation, as many images with replacement as there are, and test
  is the split test, whose OOD images are of other kinds. No bound holds there; this says how far it is off.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffguard.calibration.conformal import Array
from diffguard.detectors.auroc_loss import AurocLoss, Placements
from diffguard.detectors.cascade import Cascade
from diffguard.detectors.combination import Members
from diffguard.errors import SettingError
from diffguard.settings import Combination
from tasks.combine import Tables, score_tables, sides
from tasks.common.console import run_stage
from tasks.common.text import known_name
from tasks.config.run import Run, open_run
from tasks.score.plan import plan

GATES = ("msp", "knn", "mahalanobis", "pixel-knn")
LOSSES = (0.002, 0.01, 0.02, 0.05)
PARTS = (0.25, 0.5)
"""Of all images of a kind, the part that is dealt to validation."""

Images = Mapping[str, Members]
"""By "ind", "near" and "far", the scores of both detectors."""


def measure(run: Run, tables: Tables, classifier: str, gate: str, second: str, draws: int) -> dict[str, Any]:
    """What cascades of a gate and a second detector lose, by how validation was drawn, and the stated loss."""
    table = {name: tables[classifier, name, run.params.seeds[0]] for name in (gate, second)}
    calibration = {name: each.loc[each["split"] == "calibration", "score"].to_numpy() for name, each in table.items()}
    splits = {}
    for split in ("validation", "test"):
        ind, ood = sides(table, split)
        if not len(ind[gate]) or not ood:
            raise SettingError(f"{run.benchmark.name}: the split {split} lacks InD or OOD images")
        splits[split] = {"ind": ind, **ood}
    pool = {role: _joined(splits["validation"][role], splits["test"][role]) for role in _common(splits)}

    def dealt(part: float, rng: np.random.Generator) -> tuple[Images, Images]:
        first, rest = {}, {}
        for role, images in pool.items():
            order = rng.permutation(len(images[gate]))
            size = round(part * len(order))
            first[role], rest[role] = _take(images, order[:size]), _take(images, order[size:])
        return first, rest

    def redrawn(rng: np.random.Generator) -> tuple[Images, Images]:
        validation = splits["validation"]
        counts = {role: len(images[gate]) for role, images in validation.items()}
        return {role: _take(validation[role], rng.integers(n, size=n)) for role, n in counts.items()}, splits["test"]

    ways = [(f"same kinds, {part:.0%} to validation", lambda rng, part=part: dealt(part, rng)) for part in PARTS]
    results = []
    for way, draw in [*ways, ("other kinds", redrawn)]:
        rng = np.random.default_rng(0)
        pairs = [draw(rng) for _ in range(draws)]
        for loss in LOSSES:
            settings = Combination(kind="cascade", of=(gate, second), loss=loss)
            found = [_result(settings, calibration, validation, test) for validation, test in pairs]
            counts = {role: len(images[gate]) for role, images in pairs[0][0].items()}
            results.append({"drawn": way, "validation_images": counts, "stated_loss": loss, **_summary(found, loss)})
    alone = {
        name: {
            role: Placements.of(splits["test"]["ind"][name], images[name]).auroc
            for role, images in splits["test"].items()
            if role != "ind"
        }
        for name in (gate, second)
    }
    return {"auroc": alone, "results": results}


def _result(settings: Combination, calibration: Members, validation: Images, test: Images) -> dict[str, Any]:
    """A cascade that was fitted on validation: its share of a test stream, and its loss near and far."""
    gate, second = settings.of
    ood = {role: images for role, images in validation.items() if role != "ind"}
    cascade = Cascade.fit(settings, calibration, (validation["ind"], ood))
    share = {role: float(cascade.undecided(images[gate]).mean()) for role, images in test.items()}
    scores = {role: cascade.score(images) for role, images in test.items()}
    loss = {
        role: AurocLoss.of(
            Placements.of(test["ind"][second], test[role][second]), Placements.of(scores["ind"], scores[role])
        ).value
        for role in test
        if role != "ind"
    }
    return {"share": (share["ind"] + float(np.mean([share[role] for role in loss]))) / 2, "loss": loss}


def _summary(found: list[dict[str, Any]], stated: float) -> dict[str, Any]:
    losses = {role: np.array([each["loss"][role] for each in found]) for role in found[0]["loss"]}
    shares = np.array([each["share"] for each in found])
    return {
        "share": {"mean": float(shares.mean()), "least": float(shares.min())},
        "everything": float((shares == 1).mean()),
        "exceeded": {role: float((each > stated + 1e-9).mean()) for role, each in losses.items()},
        "loss": {
            role: {"mean": float(each.mean()), "highest_of_10_percent": float(np.quantile(each, 0.9))}
            for role, each in losses.items()
        },
    }


def _common(splits: Mapping[str, Images]) -> list[str]:
    return [role for role in splits["test"] if role in splits["validation"]]


def _joined(first: Members, second: Members) -> Members:
    return {name: np.concatenate([first[name], second[name]]) for name in first}


def _take(images: Members, rows: Any) -> dict[str, Array]:
    return {name: scores[rows] for name, scores in images.items()}


def table_of(report: dict[str, Any]) -> str:
    """The report as Markdown, shares and AUROC in percent."""
    lines = [
        f"{report['second']} behind a gate on {report['benchmark']}, classifier {report['classifier']}, "
        f"{report['draws']} draws",
        "",
        "| gate | drawn | stated loss | goes on | all goes on | near exceeded | far exceeded | near loss | far loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gate, measured in report["gates"].items():
        for each in measured["results"]:
            by_role = (each["exceeded"], {role: loss["mean"] for role, loss in each["loss"].items()})
            cells = [each["drawn"], f"{100 * each['stated_loss']:g}"]
            cells += [f"{100 * share:.0f} %" for share in (each["share"]["mean"], each["everything"])]
            cells += [
                f"{100 * each['exceeded'][role]:.0f} %" if role in by_role[0] else "–" for role in ("near", "far")
            ]
            cells += [f"{100 * by_role[1][role]:.2f}" if role in by_role[1] else "–" for role in ("near", "far")]
            lines.append(f"| {gate} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    parser.add_argument("--draws", type=int, default=100, help="how often validation is drawn (default 100)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.draws < 1:
        raise SettingError(f"--draws: {options.draws} is not at least 1")
    run = open_run(benchmark=options.benchmark)
    classifier, second = options.classifier or run.params.classifiers[0], options.second or run.default
    known_name("--classifier", [classifier], run.params.classifiers)
    known_name("--second", [second], run.params.names)
    gates = options.gates or [name for name in GATES if name in run.params.score.baselines]
    known_name("--gates", gates, [name for name in run.params.names if name != second])
    # Only these rows need to have been scored.
    run = open_run(benchmark=options.benchmark, variants=[second, *gates])
    tables = score_tables(run, plan(run))
    report = {
        "benchmark": run.benchmark.name,
        "classifier": classifier,
        "second": second,
        "draws": options.draws,
        "gates": {gate: measure(run, tables, classifier, gate, second, options.draws) for gate in gates},
    }
    print(table_of(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage(main)
