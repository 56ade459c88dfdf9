"""Photographs: what diffusion adds to detectors that do without, which classes fool whom, and what gate comes of it.

    make evaluate BENCHMARK=cifar10-jpeg ROOT=~/images
    python experiments/photographs.py --root ~/images [--pictures docs/images] [--output FILE]

Reads the scores of a finished run, and the curves of its denoiser's training in MLflow if they are there. Beside the
rows of params.yaml it makes combinations that answer one question: what does a row of the denoiser add once image
complexity is regressed out and the best detectors without it are fused? Their weights are of calibration and
validation; the row and the fusion that the others are compared with are the best ones without diffusion *on test*, so
that this choice is not in diffusion's favour. Fusions are of rows that were fixed beforehand (`CHEAP`).

The gate is a cascade of KNN and the fusion that has diffusion, its threshold is by predicted class, and its drift is
measured on streams drawn from test images: InD, with a share of near-OOD mixed in.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from processor import machine
from record import METRICS, groups_of, rounded
from tables import percent, points

from diffguard.calibration.conformal import Conformal
from diffguard.calibration.drift import rejection
from diffguard.errors import DiffGuardError, SettingError
from diffguard.metrics import Resampled, detection_metrics
from diffguard.settings import Combination
from tasks.calibrate import conformal, share
from tasks.combine import Tables, diffused, fitted, scored_members, with_combinations
from tasks.common.console import run_stage
from tasks.common.files import read_image_bytes, write_json
from tasks.config.benchmark import DENOISER
from tasks.config.run import Run, open_run
from tasks.evaluate.stage import resampled
from tasks.models.checks import open_model
from tasks.score.plan import plan, read_items
from tasks.studies.groups import class_of
from tasks.train.meter import open_meter

BASE, CONTROL = ("knn", "maxlogit"), "complexity"
CHEAP = (*BASE, "gen", "vim", "mahalanobis", "pixel-knn", CONTROL)
"""Rows without diffusion that fusions choose from and weigh."""

WITH, WITHOUT = "weighted with diffusion", "weighted without"
LOSSES = (0.005, 0.01, 0.02, 0.05)
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3)
WINDOWS = (50, 100, 200, 500, 1000, 2000)
"""Images that the monitor judges at once."""

TARGETS = {"accuracy_as_classifier": 0.75, "near_auroc/label-gain": 0.85}
"""Of the denoiser's curves in training: what it takes is extrapolated to them."""

STREAMS = 100
WRONG, SCALE = 20, 3
"""Images in each direction of the picture, and how many times enlarged they are."""


def own_combinations(run: Run) -> dict[str, Combination]:
    """By name, the combinations that put each row of the denoiser on top of those without it."""
    cheap = tuple(name for name in CHEAP if name in run.params.score.baselines)
    if missing := [name for name in (*BASE, CONTROL) if name not in cheap]:
        raise SettingError(f"{run.benchmark.name}: detectors: {missing[0]} is not among its rows")
    rows = diffusion_rows(run)
    made = {
        "base": Combination(kind="z-sum", of=BASE),
        "base + complexity": Combination(kind="z-sum", of=(*BASE, CONTROL)),
        WITHOUT: Combination(kind="weighted", of=cheap),
        WITH: Combination(kind="weighted", of=(*cheap, *rows)),
        "best without": Combination(kind="best", of=cheap),
        "best with diffusion": Combination(kind="best", of=(*cheap, *rows)),
    }
    for name in rows:
        made[f"{name} without complexity"] = Combination(kind="residual", of=(name, CONTROL))
        made[f"base + {name}"] = Combination(kind="z-sum", of=(*BASE, name))
        made[f"base + {name} without complexity"] = Combination(kind="z-sum", of=(*BASE, f"{name} without complexity"))
        made[f"base + complexity + {name}"] = Combination(kind="z-sum", of=(*BASE, CONTROL, name))
    return {**made, **{f"gate {loss:g}": Combination(kind="cascade", of=("knn", WITH), loss=loss) for loss in LOSSES}}


def diffusion_rows(run: Run) -> list[str]:
    """Variants that are told no true label."""
    return [name for name, variant in run.params.score.variants.items() if variant.label == "predicted"]


def measure(run: Run, tables: Tables, classifier: str) -> dict[str, Any]:
    """Everything that is asked, of one classifier."""
    drawn: dict[str, Resampled] = {}
    for name in run.params.names:
        found = resampled(run, tables, classifier, name, "test", METRICS)
        if found is None:
            raise SettingError(f"{run.benchmark.name}: no InD or no OOD images in the test split")
        drawn[name] = found
    near = {name: float(found.by_seed["near"]["auroc"][:, 0].mean()) for name, found in drawn.items()}
    has_diffusion = {name: bool(set(scored_members(run, name)) & set(run.params.score.variants)) for name in drawn}
    singles = list(run.params.score.baselines)
    best = {
        "single": max(singles, key=near.__getitem__),
        "fusion": max((name for name in run.params.fusions if not has_diffusion[name]), key=near.__getitem__),
    }
    to = {**{kind: drawn[name] for kind, name in best.items()}, WITHOUT: drawn[WITHOUT]}
    accuracies = []
    for seed in run.params.seeds:
        ind = tables[classifier, run.params.names[0], seed].query("split == 'test' and role == 'ind'")
        accuracies.append(share(ind["label"] == ind["predicted"]))
    semantic = max(diffusion_rows(run), key=lambda name: _validation_auroc(run, tables, classifier, name))
    return {
        "accuracy": accuracies[0],
        "accuracy_by_seed": [each["value"] for each in accuracies],
        "best": {**best, "semantic": semantic},
        "rows": {
            name: {
                "kind": _kind(run, name),
                "diffusion": has_diffusion[name],
                "metrics": groups_of(found.summary()),
                "minus": {kind: groups_of(found.difference(other, METRICS)) for kind, other in to.items()}
                if has_diffusion[name]
                else {},
            }
            for name, found in drawn.items()
        },
        "weights": {
            name: [fitted(run, tables, classifier, name, seed).fitted_values() for seed in run.params.seeds]
            for name in (WITHOUT, WITH, "best without", "best with diffusion")
        },
        "near_classes": near_classes(run, tables, classifier, ("knn", semantic, WITH)),
        "gate": {f"{loss:g}": gate(run, tables, classifier, f"gate {loss:g}", drawn) for loss in LOSSES},
        "decision": decision(run, tables[classifier, WITH, run.params.seeds[0]]),
        "drift": drift(run, tables[classifier, WITH, run.params.seeds[0]]),
    }


def _kind(run: Run, name: str) -> str:
    if name in run.params.combine:
        return run.params.combine[name].kind
    return "variant" if name in run.params.score.variants else "baseline"


def _validation_auroc(run: Run, tables: Tables, classifier: str, name: str) -> float:
    """The near AUROC of a row on validation, of the first training seed."""
    table = tables[classifier, name, run.params.seeds[0]].query("split == 'validation'")
    ind, near = (table.loc[table["role"] == role, "score"] for role in ("ind", "near"))
    return detection_metrics(ind, near)["auroc"]


def near_classes(run: Run, tables: Tables, classifier: str, names: tuple[str, ...]) -> dict[str, Any]:
    """{class: {"name", "images", "predicted", "auroc": {row: value}}}: each near-OOD class against all InD."""
    first = tables[classifier, names[0], run.params.seeds[0]]
    test = (first["split"] == "test").to_numpy()
    manifest = run.manifest[run.manifest["split"] == "test"]
    named = first["id"].map(dict(zip(manifest["id"], class_of(manifest), strict=True)))
    found: dict[str, Any] = {}
    for of, rows in first[test & (first["role"] == "near")].groupby(named):
        predicted = rows["predicted"].value_counts(normalize=True)
        found[str(of)] = {
            "name": readable(str(of)),
            "images": len(rows),
            "predicted": {run.classes[int(predicted.index[0])]: float(predicted.iloc[0])},
            "auroc": {},
        }
        for name in names:
            scores = tables[classifier, name, run.params.seeds[0]]["score"]
            ind = scores[test & (first["role"] == "ind")]
            found[str(of)]["auroc"][name] = detection_metrics(ind, scores[rows.index])["auroc"]
    return found


def gate(run: Run, tables: Tables, classifier: str, name: str, drawn: Mapping[str, Resampled]) -> dict[str, Any]:
    """What goes on to the second row, and what is lost by it, of one cascade."""
    second = run.params.combine[name].of[1]
    test = tables[classifier, second, run.params.seeds[0]].query("split == 'test'")
    goes_on = test["dataset"].map(
        {dataset: values["share"] for dataset, values in diffused(run, tables, classifier, name, "test").items()}
    )
    return {
        "share": {str(role): float(shares.mean()) for role, shares in goes_on.groupby(test["role"])},
        "lost": drawn[second].difference(drawn[name], ("auroc",)),
        "fitted": fitted(run, tables, classifier, name, run.params.seeds[0]).fitted_values(),
    }


def decision(run: Run, table: pd.DataFrame) -> dict[str, Any]:
    """Which share of test images the threshold by predicted class rejects, by role, and of InD by class."""
    judge = conformal(run, table)
    test = table[table["split"] == "test"]
    rejected = pd.Series(judge.rejects(test["score"], test["predicted"]), index=test.index)
    ind = test["role"] == "ind"
    return {
        "alpha": judge.alpha,
        "rejected": {str(role): share(rejected[rows.index]) for role, rows in test.groupby("role")},
        "ind_by_predicted_class": {
            run.classes[int(label)]: share(rejected[rows.index]) for label, rows in test[ind].groupby("predicted")
        },
    }


def drift(run: Run, table: pd.DataFrame) -> dict[str, Any]:
    """How often the monitor takes the guarantee for broken, by the share of near-OOD and the images that it judges.

    For each stream the InD images of calibration and test are dealt anew, since one calibration set has a rate of its
    own; the rest and near-OOD test images are the stream, each at most once.

    Returns:
        {share: {images: share of streams with an alarm}}, each stream judged once.
    """
    of_use = table[table["split"].isin(["calibration", "test"])]
    ind, near = (of_use.loc[of_use["role"] == role, ["score", "predicted"]].to_numpy() for role in ("ind", "near"))
    calibration = int((of_use["split"] == "calibration").sum())
    alpha, rng = 1 - run.params.calibrate.accept, np.random.default_rng(0)
    found: dict[str, Any] = {}
    for part in SHARES:
        found[f"{part:g}"] = {}
        for count in WINDOWS:
            if count > len(ind) - calibration or part * count > len(near):
                continue
            alarms = 0
            for _ in range(STREAMS):
                dealt, mixed = rng.permutation(ind), round(part * count)
                judge = Conformal.fit(dealt[:calibration, 0], dealt[:calibration, 1].astype(int), alpha)
                stream = np.concatenate([dealt[calibration:][: count - mixed], rng.permutation(near)[:mixed]])
                alarms += rejection(judge, stream[:, 0], stream[:, 1].astype(int)).is_above
            found[f"{part:g}"][f"{count}"] = alarms / STREAMS
    return found


def draw_wrong(run: Run, table: pd.DataFrame, title: str, path: Path) -> None:
    """The near-OOD images that look most like InD, and the InD images that look most like OOD."""
    test = table[table["split"] == "test"]
    near = test[test["role"] == "near"].nsmallest(WRONG, "score")
    ind = test[test["role"] == "ind"].nlargest(WRONG, "score")
    manifest = run.manifest.set_index("id", drop=False)
    side, columns = run.benchmark.image.size * SCALE, WRONG // 2
    cell, head = side + 34, 22
    font, small = (ImageFont.load_default(size) for size in (14, 11))
    canvas = Image.new("RGB", (columns * (side + 8) + 8, 2 * (head + 2 * cell)), "white")
    pen = ImageDraw.Draw(canvas)
    for half, (rows, says) in enumerate(((near, "near-OOD, taken for InD"), (ind, "InD, taken for OOD"))):
        top = half * (head + 2 * cell)
        pen.text((8, top + 4), f"{says}: the {len(rows)} most wrong by {title}", fill="black", font=font)
        files = manifest.loc[rows["id"]]
        for place, (image, name, predicted) in enumerate(
            zip(read_image_bytes(run.home, files), class_of(files), rows["predicted"], strict=True)
        ):
            left, up = 8 + place % columns * (side + 8), top + head + place // columns * cell
            picture = Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())
            canvas.paste(picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST), (left, up))
            for line, text in enumerate((readable(name), f"as {run.classes[int(predicted)]}")):
                pen.text((left, up + side + 2 + 13 * line), text[:17], fill="black", font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


@cache
def _wordnet() -> Any:
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-21k")


def readable(name: str) -> str:
    """A WordNet id's first name; other names as they are."""
    info = _wordnet()
    if name not in info.label_names():
        return name
    return str(info.label_name_to_description(name, detailed=False)).split(",")[0]


def what_it_knows(run: Run) -> dict[str, float] | None:
    """The denoiser's accuracy as a classifier of validation images; None: the benchmark has none."""
    seed = run.params.seeds[0]
    meter = open_meter(run, seed)
    if meter is None:
        return None
    values = meter.measure(open_model(run, run.model(seed, DENOISER)), with_rows=False)
    return {"accuracy": values["validation/accuracy_as_classifier"], "images": len(meter.labels)}


def curves(run: Run, before: int) -> dict[str, list[list[float]]]:
    """Of the newest training of this benchmark's denoiser in MLflow, each validation curve: images seen, value, and the
    learning rate by its highest.

    Args:
        before: images that the weights had seen which it began with.
    """
    from tasks.services.tracking import open_tracking
    from tasks.services.training_log import TRAINING

    try:
        client = open_tracking()
    except DiffGuardError:
        return {}
    if (experiment := client.get_experiment_by_name(TRAINING)) is None:
        return {}
    of = f"params.model = '{DENOISER}' and params.benchmark = '{run.benchmark.name}'"
    found = client.search_runs([experiment.experiment_id], of, order_by=["start_time DESC"], max_results=1)
    if not found or "images_seen" not in found[0].data.metrics:
        return {}

    def history(name: str) -> dict[int, float]:
        values = {metric.step: metric.value for metric in client.get_metric_history(found[0].info.run_id, name)}
        return dict(sorted(values.items()))

    seen, rate = history("images_seen"), history("learning_rate")

    def at(step: int, curve: dict[int, float]) -> float:
        return float(np.interp(step, list(curve), list(curve.values())))

    return {
        name.removeprefix("validation/"): [
            [before + at(step, seen), value, at(step, rate) / max(rate.values())]
            for step, value in history(name).items()
        ]
        for name in found[0].data.metrics
        if name.startswith("validation/")
    }


def growth(curve: list[list[float]], target: float) -> dict[str, float] | None:
    """What a doubling of the images seen brings at the full learning rate, by the line over their logarithm.

    Args:
        curve: images seen, value, and the learning rate by its highest.

    Returns:
        {"per_doubling", "deviation" of a point from the line, "images_for_target"}; None: fewer than four points, or
        it does not grow.
    """
    points = [(images, value) for images, value, rate in curve if images > 0 and rate > 0.99]
    if len(points) < 4:
        return None
    images, values = np.array(points).T
    slope, level = np.polyfit(np.log2(images), values, 1)
    if slope <= 0:
        return None
    deviation = float(np.std(values - slope * np.log2(images) - level, ddof=2))
    return {
        "per_doubling": float(slope),
        "deviation": deviation,
        "images_for_target": float(2 ** min((target - level) / slope, 1000)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="cifar10-jpeg")
    parser.add_argument("--root", help="what {root} stands for in its paths")
    parser.add_argument("--limit", type=int, help="as the run had it")
    parser.add_argument("--classifier", help="as the run had it")
    parser.add_argument("--seeds", type=int, help="as the run had it; of several, all but metrics is of the first")
    parser.add_argument("--seen", type=int, default=0, help="images, by the weights that the denoiser began with")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures of the most wrong images")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    chosen = {key: value for key, value in vars(options).items() if key not in ("seen", "pictures", "output")}
    chosen["seeds"] = None if options.seeds is None else list(range(options.seeds))
    run = open_run(**chosen)
    tables = read_items(plan(run))
    run = replace(run, params=run.params.model_copy(update={"combine": own_combinations(run)}))
    tables = with_combinations(run, tables)
    training = curves(run, options.seen)
    report = {
        "benchmark": run.benchmark.name,
        "recorded": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "draws": run.params.evaluate.draws,
        "denoiser": what_it_knows(run),
        "training": training,
        "growth": {name: growth(training[name], target) for name, target in TARGETS.items() if name in training},
        "classifiers": {each: measure(run, tables, each) for each in run.params.classifiers},
    }
    print(table_of(report))
    if options.output is not None:
        write_json(options.output, rounded(report))
    if options.pictures is not None:
        for classifier in run.params.classifiers:
            for name in ("knn", WITH):
                path = options.pictures / f"{run.benchmark.name}-{classifier}-wrong-{name.split()[0]}.png"
                draw_wrong(run, tables[classifier, name, run.params.seeds[0]], name, path)
                print(path)


def table_of(report: dict[str, Any]) -> str:
    """The report as Markdown, in percent and points of AUROC."""
    lines = []
    for classifier, found in report["classifiers"].items():
        best = found["best"]
        lines += [
            f"{classifier}, accuracy {percent(found['accuracy'])}",
            "",
            f"| row | near AUROC | far AUROC | near, minus {best['single']} | near, minus {best['fusion']} |",
            "|---|---|---|---|---|",
        ]
        ranked = sorted(found["rows"].items(), key=lambda item: -item[1]["metrics"]["near"]["auroc"]["value"])
        for name, row in ranked:
            metrics, minus = row["metrics"], row["minus"]
            cells = [percent(metrics[group]["auroc"]) if group in metrics else "–" for group in ("near", "far")]
            cells += [points(minus[kind]["near"]["auroc"], "+") if minus else "" for kind in ("single", "fusion")]
            mark = "**" if row["diffusion"] else ""
            lines.append(f"| {mark}{name}{mark} | {' | '.join(cells)} |")
        lines += ["", "alarms by the share of near-OOD and the images that are judged at once:", ""]
        windows = list(next(iter(found["drift"].values())))
        lines += [f"| share | {' | '.join(windows)} |", f"|---|{'---|' * len(windows)}"]
        for part, alarms in found["drift"].items():
            cells = [f"{alarms[window]:.0%}" if window in alarms else "–" for window in windows]
            lines.append(f"| {part} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main)
