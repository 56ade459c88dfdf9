"""The coverage guarantee of calibration: realized InD rejection over random calibration/test splits.

    python experiments/calibration.py [--detectors cfg-w1 ...] [--output experiments/results/calibration.json]

The scores are those of a finished run. Its InD calibration and test images are split again at random, in the same
numbers, and a combination is fitted again on the new calibration split. The mean rejection over the splits stands
beside floor(alpha (n + 1)) / (n + 1), with ties broken at random beside alpha itself, and its spread beside theory's:
the number of test images above the k-th largest of n calibration scores is beta-binomial.
A variant whose stop was set on calibration images keeps it, so that only the decision's threshold is put to the test.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffguard.calibration.conformal import Conformal, conformal_p_values, promised_rejection, rejected_rank
from diffguard.errors import SettingError
from tasks.combine import Tables, scored_members, with_combinations
from tasks.common.console import run_stage
from tasks.common.text import known_name
from tasks.config.run import Run, open_run
from tasks.score.plan import plan

ALPHAS = (0.01, 0.05, 0.1)

Deal = Callable[[NDArray[np.str_]], pd.DataFrame]
"""From the new split of each InD image, in the order of the score tables, to a detector's table of those images."""


def measure(deal: Deal, splits: NDArray[np.str_], count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Realized and guaranteed rejection, one entry for each alpha and each way to decide.

    Args:
        splits: "calibration" or "test", of each InD image.
        count: number of random splits.
    """
    decisions: dict[tuple[float, str], list[dict[str, float]]] = {}
    for _ in range(count):
        table = deal(rng.permutation(splits))
        calibration, test = (table[table["split"] == split] for split in ("calibration", "test"))
        for alpha in ALPHAS:
            for way, rates in _decide(calibration, test, alpha, rng).items():
                decisions.setdefault((alpha, way), []).append(rates)
    return [
        {"alpha": alpha, "decision": way, **_over_splits(rates)}
        for (alpha, way), rates in decisions.items()
        if len(rates)
        == count  # a class may have enough calibration images in some splits only, and is pooled in others
    ]


def _decide(
    calibration: pd.DataFrame, test: pd.DataFrame, alpha: float, rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Realized and guaranteed rejection of one split, by the way to decide: all together, ties at random, by class."""
    n, m = len(calibration), len(test)
    p = conformal_p_values(calibration["score"], test["score"], rng)
    decisions = {
        "all together, random ties": {
            "realized": float((p <= alpha).mean()),
            "promised": alpha,
            "variance": _variance(n, m, alpha * (n + 1)) / m**2,
        }
    }
    try:
        pooled, by_class = (
            Conformal.fit(calibration["score"], calibration["predicted"], alpha, conditional=conditional)
            for conditional in (False, True)
        )
    except SettingError:
        return decisions  # too few calibration images for this alpha
    for way, decision in (("all together", pooled), ("by class", by_class)):
        rejected = decision.rejects(test["score"], test["predicted"])
        groups = decision.groups(test["predicted"])
        decisions[way] = {
            "realized": float(rejected.mean()),
            "promised": decision.promised(test["predicted"]),
            "variance": sum(_variance(size, tests, rejected_rank(size, alpha)) for size, tests in groups) / m**2,
        }
    for label in by_class.by_class:
        of_class = (test["predicted"] == label).to_numpy()
        if of_class.any():
            size = len(by_class.by_class[label])
            decisions[f"predicted {label}"] = {
                "realized": float(by_class.rejects(test["score"], test["predicted"])[of_class].mean()),
                "promised": promised_rejection(size, alpha),
                "variance": _variance(size, int(of_class.sum()), rejected_rank(size, alpha)) / int(of_class.sum()) ** 2,
            }
    return decisions


def _variance(n: int, m: int, rank: float) -> float:
    """Of the number of m test images above the k-th largest of n calibration scores, k being the rank.

    Between whole ranks k and k + 1, an image between these two scores is counted with the probability rank - k, as
    ties broken at random do. The mass above the k-th and that between the two have a Dirichlet distribution of the
    parameters k, 1 and n - k; at whole ranks the number is beta-binomial.
    """
    k = int(rank + 1e-9)
    part, mean = rank - k, rank / (n + 1)
    of_mass = (k * (n + 1 - k) + part**2 * n - 2 * part * k) / ((n + 1) ** 2 * (n + 2))
    return m * (mean * (1 - mean) - of_mass) + m**2 * of_mass


def _over_splits(each: list[dict[str, float]]) -> dict[str, float]:
    realized, promised, variance = (
        np.array([one[key] for one in each]) for key in ("realized", "promised", "variance")
    )
    return {
        "realized": float(realized.mean()),
        "standard_error": float(realized.std(ddof=1) / np.sqrt(len(realized))),
        "promised": float(promised.mean()),
        "spread": float(realized.std(ddof=1)),
        # How many images of a class are in a split varies, and with it the guaranteed rate.
        "spread_in_theory": float(np.sqrt(variance.mean() + promised.var())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", help="params.yaml's if not given")
    parser.add_argument("--classifiers", nargs="+", help="all if not given")
    parser.add_argument("--detectors", nargs="+", help="the default one and all that fuse scores if not given")
    parser.add_argument("--splits", type=int, default=200, help="how many random splits")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = open_run(benchmark=options.benchmark)
    classifiers = options.classifiers or run.params.classifiers
    detectors = options.detectors or list(dict.fromkeys([run.default, *run.params.fusions]))
    known_name("--classifiers", classifiers, run.params.classifiers)
    known_name("--detectors", detectors, run.params.names)
    if options.splits < 2:
        raise SettingError(f"--splits: {options.splits} is not at least 2")
    reports = [_report(run, classifier, name, options.splits) for classifier in classifiers for name in detectors]
    print("\n\n".join(map(table_of, reports)))
    if options.output is not None:
        options.output.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


def _report(run: Run, classifier: str, detector: str, count: int) -> dict[str, Any]:
    seed, members = run.params.seeds[0], scored_members(run, detector)
    alone = open_run(benchmark=run.benchmark.name, variants=[detector], classifier=classifier, seeds=[seed])
    tables: Tables = {
        (classifier, item.name, seed): item.read()
        for item in plan(run)
        if (item.classifier, item.seed) == (classifier, seed) and item.name in members
    }
    first = tables[classifier, members[0], seed]
    dealt = ((first["role"] == "ind") & first["split"].isin(["calibration", "test"])).to_numpy()

    def deal(splits: NDArray[np.str_]) -> pd.DataFrame:
        new_split = first["split"].to_numpy(str)
        new_split[dealt] = splits
        changed = {key: table.assign(split=new_split) for key, table in tables.items()}
        return with_combinations(alone, changed)[classifier, detector, seed][dealt]

    splits = first.loc[dealt, "split"].to_numpy(str)
    return {
        "benchmark": run.benchmark.name,
        "classifier": classifier,
        "detector": detector,
        "n_calibration": int((splits == "calibration").sum()),
        "n_test": int((splits == "test").sum()),
        "splits": count,
        "rejection": measure(deal, splits, count, np.random.default_rng(0)),
    }


def table_of(report: dict[str, Any]) -> str:
    """The report as Markdown, in percent; the realized rate with twice its standard error."""
    lines = [
        f"{report['detector']} on {report['benchmark']}, classifier {report['classifier']}: {report['splits']} splits "
        f"into {report['n_calibration']} calibration and {report['n_test']} test images",
        "",
        "| alpha | decision | InD rejected | promised | difference | spread | in theory |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in report["rejection"]:
        realized, error, promised, spread, theory = (
            100 * each[key] for key in ("realized", "standard_error", "promised", "spread", "spread_in_theory")
        )
        lines.append(
            f"| {100 * each['alpha']:g} | {each['decision']} | {realized:.2f} ± {2 * error:.2f} | {promised:.2f} "
            f"| {realized - promised:+.2f} | {spread:.2f} | {theory:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main)
