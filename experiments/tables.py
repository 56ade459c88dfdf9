"""The tables of README.md and docs/, written out of experiments/results/*.json.

    python experiments/tables.py [--check]

A table stands between the marks `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is one of `TABLES`.
With `--check` nothing is written, and a table that is not what the results say ends the command with an error.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffguard.errors import DataError
from tasks.common.console import run_stage
from tasks.config.project import ROOT

RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->)\n.*?(<!-- end of table -->)", re.DOTALL)
OPENED = re.compile(r"<!-- table: [^>]*-->")
GROUPS = ("near", "far")
README_ROWS = ("cfg-w1", "label-gain", "min-over-labels", "unconditional", "path", "msp", "knn", "pixel-knn")

RESULT_ROWS = (
    "cfg-w1",
    "label-gain",
    "denoiser-posterior",
    "unconditional",
    "path",
    "msp",
    "knn",
    "mahalanobis",
    "pixel-knn",
    "fused-best",
)
"""Those that docs/results.md shows; docs/rows.md has all of them."""

Table = list[list[str]]
"""Rows of cells, the first of them the head."""


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def percent(metric: dict[str, float]) -> str:
    """A share and its interval, as in `tasks.evaluate.report`."""
    return "{value:.1f} ({low:.1f}–{high:.1f})".format(**_hundredfold(metric))


def points(metric: dict[str, float], sign: str = "") -> str:
    """A difference of shares and its interval."""
    return f"{{value:{sign}.1f}} ({{low:{sign}.1f}} to {{high:{sign}.1f}})".format(**_hundredfold(metric))


def _hundredfold(metric: dict[str, float]) -> dict[str, float]:
    # Rounded first, so that no -0.0 is shown.
    return {key: round(100 * metric[key], 1) + 0.0 for key in ("value", "low", "high")}


def number(value: float | None) -> str:
    """At most one decimal, and none that is 0; None: not known."""
    return "–" if value is None else f"{value:.1f}".removesuffix(".0")


def _groups_of(rows: dict[str, Any]) -> list[str]:
    return [group for group in GROUPS if any(group in row for row in rows.values())]


def _metric_heads(groups: Iterable[str]) -> list[str]:
    return [f"{group} {metric}" for group in groups for metric in ("AUROC", "FPR@95")]


def rows(name: str, chosen: Iterable[str] | None = None, only: str | None = None) -> Table:
    """Rows of a recorded run, with what they cost."""
    classifiers = result(name)["classifiers"]
    head = ["detector", *_metric_heads(GROUPS), "evaluations per image"]
    table = [head if only else ["classifier", *head]]
    for classifier, recorded in classifiers.items():
        for row_name, row in recorded["rows"].items():
            if only in (None, classifier) and (chosen is None or row_name in chosen):
                cells = [percent(row[group][metric]) for group in GROUPS for metric in ("auroc", "fpr95")]
                table.append([*([] if only else [classifier]), f"`{row_name}`", *cells, number(row["evaluations"])])
    return table


def differences(name: str) -> Table:
    """How far each combination of a recorded run is from its members."""
    classifiers = result(name)["classifiers"]
    table = [["classifier", "combination − member", *_metric_heads(GROUPS)]]
    for classifier, recorded in classifiers.items():
        for row_name, row in recorded["rows"].items():
            for member, difference in row.get("difference", {}).items():
                cells = [points(difference[group][metric], "+") for group in GROUPS for metric in ("auroc", "fpr95")]
                table.append([classifier, f"`{row_name}` − `{member}`", *cells])
    return table


def run_of(name: str) -> Table:
    """What a recorded run was."""
    run = result(name)
    images, versions = run["images"], run["versions"]
    accuracy = ", ".join(f"{name} {100 * each['accuracy']:.1f} %" for name, each in run["classifiers"].items())
    return [
        ["the recorded run", ""],
        ["recorded", run["recorded"]],
        ["test images", f"{images['ind']} InD, {images['near']} near-OOD, {images['far']} far-OOD"],
        ["accuracy on InD test images", accuracy],
        ["training seeds, bootstrap draws", f"{len(run['seeds'])}, {run['draws']:,}"],
        ["versions", ", ".join(f"{name} {value}" for name, value in versions.items())],
    ]


def cifar10(differences: bool = False) -> Table:
    """CIFAR-10 as JPEG files against classes of TinyImageNet."""
    [rows] = result("cifar10-jpeg").values()
    groups = _groups_of(rows)
    table = [["combination − member" if differences else "detector", *_metric_heads(groups)]]
    for name, row in rows.items():
        if not differences:
            cells = [percent(row[group][metric]) for group in groups for metric in ("auroc", "fpr95")]
            table.append([f"`{name}`", *cells])
            continue
        for member, difference in row.get("difference", {}).items():
            cells = [points(difference[group][metric], "+") for group in groups for metric in ("auroc", "fpr95")]
            table.append([f"`{name}` − `{member}`", *cells])
    return table


def cost() -> Table:
    """Network evaluations of each variant on digits."""
    rows = result("digits")["classifiers"]["ordinary"]["rows"]
    table = [["variant", "network evaluations per image"]]
    for name, row in rows.items():
        if "difference" not in row and row["evaluations"]:
            table.append([f"`{name}`", number(row["evaluations"])])
    together = result("engine")["digits"]
    share = f"{100 * together['share_of_separate_seconds']:.0f} %"
    of = number(together["separately"]["evaluations_per_image"])
    total = number(together["together"]["evaluations_per_image"])
    return [*table, ["all of them at once", f"{total} in place of {of}, in {share} of the time"]]


def engine() -> Table:
    """The engine beside the published schedule and plain batching."""
    heads = ["schedule", "network calls", "evaluations per image", "occupancy", "images/s", "memory", "speed"]
    table = [[*heads, "evaluations"]]
    for name, row in result("engine")["schedules"]["rows"].items():
        table.append(
            [
                f"{name} (batch {row['batch']})",
                str(row["network_calls"]),
                f"{row['evaluations_per_image']:.1f}",
                f"{100 * row['mean_occupancy']:.1f} %",
                f"{row['images_per_second']:.3f}",
                f"{row['peak_memory_mib']:.0f} MiB",
                f"{row['speed_ratio']:.2f}×",
                f"{row['evaluation_ratio']:.2f}× fewer",
            ]
        )
    return table


def steps(name: str) -> Table:
    """Every setting of levels, stop and solver, cheapest first."""
    heads = ["setting", "evaluations", "validation AUROC", "difference", "test AUROC", "difference"]
    table, report = [heads], result(name)
    for setting, row in report["settings"].items():
        cells = [each for split in ("validation", "test") for each in _interval_and_difference(row[split])]
        mark = " (default)" if setting == report["default"] else ""
        table.append([setting + mark, number(row["evaluations_per_image"]), *cells])
    return table


def _interval_and_difference(split: dict[str, Any]) -> tuple[str, str]:
    return points(split["auroc"]), points(split["difference"])


def calibration() -> Table:
    """Rejection of InD images under the default detector, beside what is guaranteed."""
    heads = ["alpha", "decision", "InD rejected", "guaranteed", "difference", "spread", "in theory"]
    table = [heads]
    [report] = [each for each in result("calibration") if (each["classifier"], each["detector"]) == DEFAULT]
    for row in report["rejection"]:
        if row["decision"].startswith("predicted"):
            continue
        margin = 1.96 * row["standard_error"]
        table.append(
            [
                f"{100 * row['alpha']:.0f} %",
                row["decision"],
                f"{100 * row['realized']:.2f} ± {100 * margin:.2f}",
                f"{100 * row['promised']:.2f}",
                f"{100 * (row['realized'] - row['promised']):+.2f}",
                f"{100 * row['spread']:.2f}",
                f"{100 * row['spread_in_theory']:.2f}",
            ]
        )
    return table


DEFAULT = ("ordinary", "cfg-w1")


def cascade() -> Table:
    """What cascades lose over random draws of validation, where not everything goes on in all."""
    heads = ["gate", "validation: InD, near, far", "stated loss", "goes on", "exceeded near", "far"]
    table = [[*heads, "mean loss near", "far"]]
    for gate, report in result("cascade")["gates"].items():
        for row in report["results"]:
            if row["everything"] == 1:
                continue
            images = ", ".join(f"{count:,}" for count in row["validation_images"].values())
            other = ", test of other kinds" if row["drawn"] == "other kinds" else ""
            cells = [
                f"`{gate}`",
                images + other,
                number(100 * row["stated_loss"]),
                f"{100 * row['share']['mean']:.0f} %",
            ]
            cells += [f"{100 * row['exceeded'][group]:.0f} %" for group in GROUPS]
            table.append([*cells, *(f"{round(100 * row['loss'][group]['mean'], 1) + 0.0:.1f}" for group in GROUPS)])
    return table


def fusion() -> Table:
    """A fusion of the default detector against every single detector, on the models of that measurement."""
    table = [["`fused-cfg-w1` −", *(f"{of}, {group} AUROC" for of in ("ordinary", "strong") for group in GROUPS)]]
    reports = {of: each["fused-cfg-w1"]["difference"] for of, each in result("fusion")["classifiers"].items()}
    for single in reports["ordinary"]:
        cells = [points(reports[of][single][group]["auroc"], "+") for of in ("ordinary", "strong") for group in GROUPS]
        table.append([f"`{single}`", *cells])
    return table


def serving() -> Table:
    """The endpoint under one good and many bad requests."""
    report = result("serving")
    warm, bad = report["warm_seconds"], report["bad_requests"]
    before, after = bad["memory_mib"]
    return [
        ["", "measured"],
        ["from start until ready", f"{report['start_seconds']:.1f} s"],
        [f"{report['images']} images in one request, first", f"{report['first_seconds']:.2f} s"],
        ["the same, warm", "{median:.2f} s ({min:.2f} to {max:.2f})".format(**warm)],
        *(
            [f"the same, beside {number} busy program{'s' * (number != '1')}", f"{seconds:.2f} s"]
            for number, seconds in report["warm_seconds_beside"].items()
        ),
        [f"{bad['count']} bad requests", f"{bad['seconds']:.1f} s, {len(bad['problems'])} answered wrongly"],
        ["memory before and after them", f"{before:,.0f} and {after:,.0f} MiB"],
    ]


def clients() -> Table:
    """The endpoint under clients that ask without pause."""
    report = result("clients")
    memory, share = report["memory_mib"], report["images_per_second"] / report["own_images_per_second"]
    rates = "{images_per_second:.0f} of {own_images_per_second:.0f}".format(**report)
    return [
        ["", "measured"],
        ["requests, images", f"{report['requests']:,}, {report['images']:,}"],
        ["refused, wrong decisions", f"{report['refused']}, {len(report['wrong_decisions'])}"],
        ["images/s, of the model's own rate", f"{rates}, {100 * share:.0f} %"],
        *(
            [f"latency, {state}: p50, p95, p99", "{p50:.2f}, {p95:.2f}, {p99:.2f} s".format(**found)]
            for state, found in report["latency_seconds"].items()
        ),
        ["`/metrics` and `/health`: p50, p99", "{p50:.2f}, {p99:.2f} s".format(**report["scrape_seconds"])],
        ["memory after a minute, at the end", "{after_a_tenth:,.0f}, {at_the_end:,.0f} MiB".format(**memory)],
    ]


def training() -> Table:
    report = result("training")
    heads = ["network", "precision", "training, images/s", "`eps`, images/s", "training", "`eps`"]
    table, ratios = [heads], next(each for key, each in report.items() if "ratio" in key)
    for name, speed in report["images_per_second"].items():
        network, precision = name.rsplit(" ", 1)
        eps, ratio = speed["eps"], ratios[name]
        times = [f"{ratio[key]:.1f}×" for key in ("training", "eps")]
        table.append([f"`{network}`", precision, f"{speed['training']:.1f}", f"{eps:.0f}", *times])
    return table


def precision() -> Table:
    """Every variant in bfloat16 against float32, in points of AUROC."""
    heads = ["benchmark", "classifier", "variant"]
    table = [heads + [head for group in GROUPS for head in (f"{group} AUROC, float32", "difference")]]
    for benchmark, report in result("precision").items():
        for classifier, rows in report["classifiers"].items():
            for name, row in rows.items():
                cells = [benchmark, classifier, f"`{name}`"]
                for group in GROUPS:
                    there = group in row["auroc"]
                    cells.append(f"{100 * row['auroc'][group]['value']:.2f}" if there else "–")
                    cells.append(_fine_points(row["difference"][group]) if there else "–")
                table.append(cells)
    return table


def _fine_points(metric: dict[str, float]) -> str:
    """A difference of shares and its interval, of which the second decimal counts."""
    value, low, high = (round(100 * metric[key], 2) + 0.0 for key in ("value", "low", "high"))
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def networks() -> Table:
    """Images a second at 32x32 pixels."""
    rows = result("networks")["rows"]
    before = next(iter(rows.values()))["images_per_second"]
    table = [["what", "parameters", "evaluations a call", "images/s", "times the first"]]
    for name, row in rows.items():
        rate = row["images_per_second"]
        cells = [f"{row['parameters'] / 1e6:.1f} M", str(row["slots"]), f"{rate:.3g}", f"{rate / before:.2f}×"]
        table.append([name, *cells])
    return table


def startup() -> Table:
    """How long commands take from their start, on one thread."""
    names = {"help": "`diffguard --help`", "score": "`diffguard score`, one image"}
    table = [["command", "before", "now", "ratio"]]
    for name, measured in result("startup")["commands"].items():
        before, now = (measured[checkout]["median"]["elapsed"] for checkout in ("against", "this"))
        table.append([names[name], f"{before:.2f} s", f"{now:.2f} s", f"{before / now:.1f}×"])
    return table


def python_share() -> Table:
    """The engine's own Python beside its networks."""
    report = result("python_share")
    table = [["CPU seconds", "before", "now"]]

    def add(what: str, value: Callable[[dict[str, Any]], float]) -> None:
        table.append([what, *(f"{value(report[when]):.2f}" for when in ("before", "after"))])

    add("in all", lambda row: row["cpu_seconds"])
    add("networks, distances, gradients", lambda row: sum(row["network_seconds"].values()))
    add("the engine's own", lambda row: row["own_seconds"])
    for part in report["before"]["profiled_seconds"]:
        add(f"of it, under a profiler: {part}", lambda row, part=part: row["profiled_seconds"][part])  # type: ignore[misc]
    return table


def pipeline(name: str = "pipeline") -> Table:
    """A whole run of digits on a fresh clone."""
    seconds = result(name)["seconds"]
    table = [["", *seconds]]
    for part, name in {"whole": "start to table", "training": "training", "scoring": "scoring", "rest": "rest"}.items():
        table.append([name, *(f"{taken[part]:.0f} s" for taken in seconds.values())])
    return table


def load() -> Table:
    """Scoring on a processor beside other programs: milliseconds an image, before and now."""
    rows = [["other programs", "images", "before, ms an image", "now, ms an image", "times as fast"]]
    for programs, counts in result("load")["seconds"].items():
        for count, ways in counts.items():
            before, now = (1000 * seconds / int(count) for seconds in ways.values())
            rows.append([programs, count, f"{before:.3g}", f"{now:.3g}", f"{before / now:.2f}×"])
    return rows


def _times_as_fast(programs: int, images: int) -> float:
    before, now = result("load")["seconds"][str(programs)][str(images)].values()
    return float(before / now)


def _photographs(name: str = "photographs") -> dict[str, Any]:
    """What was found of the first classifier."""
    found: dict[str, Any] = next(iter(result(name)["classifiers"].values()))
    return found


def _near(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The near AUROC of a row."""
    auroc: dict[str, Any] = found["rows"][name]["metrics"]["near"]["auroc"]
    return auroc


def _named(found: dict[str, Any], name: str) -> str:
    """A row's name, bold if it has diffusion."""
    return f"**`{name}`**" if found["rows"][name]["diffusion"] else f"`{name}`"


def photographs() -> Table:
    """Rows without combinations, and the fusions that count, best first."""
    found = _photographs()
    single, fusion = found["best"]["single"], found["best"]["fusion"]
    heads = [f"near, minus `{single}`", f"near, minus `{fusion}`"]
    table = [["detector", "near AUROC", "near FPR@95", "far AUROC", *heads]]
    ranked = sorted(found["rows"].items(), key=lambda item: -item[1]["metrics"]["near"]["auroc"]["value"])
    for name, row in ranked:
        if row["kind"] in ("variant", "baseline") or name in {fusion, *FUSIONS}:
            metrics, minus = row["metrics"], row["minus"]
            cells = [percent(metrics[group][metric]) for group, metric in (*NEAR, ("far", "auroc"))]
            cells += [points(minus[kind]["near"]["auroc"], "+") if minus else "" for kind in ("single", "fusion")]
            table.append([_named(found, name), *cells])
    return table


NEAR = (("near", "auroc"), ("near", "fpr95"))
FUSIONS = ("base", "base + complexity", "weighted without", "weighted with diffusion", "best without")
FUSIONS += ("best with diffusion",)


def photographs_adds() -> Table:
    """What each row of the denoiser has alone, without complexity, and on top of KNN and MaxLogit."""
    found = _photographs()
    rows = found["rows"]

    def near(name: str) -> str:
        return percent(_near(found, name))

    heads = ["row", "alone", "complexity regressed out", "KNN + MaxLogit + row", "the same, complexity regressed out"]
    table = [[*heads, "KNN + MaxLogit + complexity + row"]]
    table.append(["none", "", "", near("base"), "", near("base + complexity")])
    for name in rows:
        if f"base + {name}" in rows and f"{name} without complexity" in rows:
            without = f"{name} without complexity"
            of = (name, without, f"base + {name}", f"base + {without}", f"base + complexity + {name}")
            table.append([f"`{name}`", *map(near, of)])
    return table


def photographs_classifiers() -> Table:
    """Near AUROC under the classifier, and under each training of a weaker one, and what diffusion adds to them."""
    strong, weak = _photographs(), _photographs("photographs-resnet")
    without, with_diffusion = "weighted without", "weighted with diffusion"
    accuracies = weak["accuracy_by_seed"]
    table = [["near AUROC", "`strong`", *(f"`resnet`, seed {seed}" for seed in range(len(accuracies))), "all seeds"]]
    table.append(["accuracy", percent(strong["accuracy"]), *(f"{100 * value:.1f}" for value in accuracies), ""])

    for name in ("msp", "maxlogit", "knn", "vim", "fdbd", "unconditional", "path", "label-gain", *FUSIONS):
        each = [f"{100 * value:.1f}" for value in _near(weak, name)["per_seed"]]
        table.append([_named(strong, name), percent(_near(strong, name)), *each, percent(_near(weak, name))])
    each = [
        f"{100 * (one - other):+.1f}"
        for one, other in zip(_near(weak, with_diffusion)["per_seed"], _near(weak, without)["per_seed"], strict=True)
    ]
    adds = [points(of["rows"][with_diffusion]["minus"][without]["near"]["auroc"], "+") for of in (strong, weak)]
    return [*table, [f"`{with_diffusion}` minus `{without}`", adds[0], *each, adds[1]]]


def photographs_training() -> Table:
    """Curves of the denoiser's training: what it knows, over the images seen."""
    curves = result("photographs")["training"]
    rows = sorted(name for name in curves if name.startswith("near_auroc/"))
    heads = [f"near AUROC of `{name.removeprefix('near_auroc/')}`" for name in rows]
    table = [["images seen", "learning rate", "accuracy as a classifier", *heads]]
    found = {name: {images: value for images, value, _ in curves[name]} for name in rows}
    for images, accuracy, rate in curves["accuracy_as_classifier"]:
        cells = [f"{100 * found[name][images]:.1f}" if images in found[name] else "" for name in rows]
        table.append(
            [f"{images:,.0f}", "full" if rate > 0.99 else f"{rate:.2f} of it", f"{100 * accuracy:.1f}", *cells]
        )
    return table


def photographs_denoisers() -> Table:
    """Near AUROC by a denoiser before it was trained on, and by the same one after."""
    reports = [result("photographs-before"), result("photographs")]
    of = [_photographs("photographs-before"), _photographs()]
    heads = [f"right on {100 * each['denoiser']['accuracy']:.1f} % of validation" for each in reports]
    table = [["near AUROC", *heads]]
    rows = [name for name, row in of[1]["rows"].items() if row["kind"] == "variant"]
    added = ("weighted with diffusion", "best with diffusion")
    for name in (*rows, *(f"{name} without complexity" for name in rows), *added):
        table.append([f"`{name}`", *(percent(_near(each, name)) for each in of)])
    for kind, says in (("weighted without", "`weighted without`"), ("fusion", "the best fusion without")):
        adds = [each["rows"][added[0]]["minus"][kind]["near"]["auroc"] for each in of]
        table.append([f"`{added[0]}` minus {says}", *(points(each, "+") for each in adds)])
    return table


def photographs_classes(count: int = 6) -> Table:
    """The near-OOD classes that are hardest for the fusion with diffusion, and those that are easiest."""
    found = _photographs()
    classes = found["near_classes"]
    names = list(next(iter(classes.values()))["auroc"])
    ranked = sorted(classes, key=lambda each: classes[each]["auroc"][names[-1]])
    table = [["class", "images", "mostly taken for", *(f"`{name}`" for name in names)]]
    for each in (*ranked[:count], *ranked[-count:]):
        [(predicted, part)] = classes[each]["predicted"].items()
        aurocs = [f"{100 * classes[each]['auroc'][name]:.1f}" for name in names]
        table.append([classes[each]["name"], str(classes[each]["images"]), f"{predicted}, {part:.0%}", *aurocs])
    return table


def photographs_gate() -> Table:
    """KNN in front of the fusion with diffusion, for several stated losses."""
    table = [["stated loss", "InD goes on", "near goes on", "far goes on", "lost near", "lost far"]]
    for loss, each in _photographs()["gate"].items():
        shares = [f"{100 * each['share'][group]:.0f} %" for group in ("ind", "near", "far")]
        lost = [points(each["lost"][group]["auroc"]) for group in GROUPS]
        table.append([number(100 * float(loss)), *shares, *lost])
    return table


def photographs_drift() -> Table:
    """How often the monitor sounds its alarm, by what is in the stream and how many images it judges at once."""
    found = _photographs()["drift"]
    windows = list(next(iter(found.values())))
    table = [["near-OOD in the stream", *(f"of {int(window):,} images" for window in windows)]]
    for part, alarms in found.items():
        table.append([f"{100 * float(part):.0f} %", *(f"{100 * alarms[window]:.0f} %" for window in windows)])
    return table


def label_terms() -> Table:
    """Terms of the denoiser's loss, by what it knows after them."""
    terms = result("label-terms")["terms"]
    rows = [name for name in terms["start"]["validation"] if name.startswith("near_auroc/")]
    heads = [f"near AUROC of `{name.removeprefix('near_auroc/')}`" for name in rows]
    table = [["trained with", "images", "minutes", "accuracy as a classifier", *heads]]
    for name, each in terms.items():
        settings = ", ".join(f"`{key}: {value:g}`" for key, value in each["settings"].items())
        says = settings or {"start": "nothing: the start", "none": "no term"}.get(name, name)
        values = [f"{100 * each['validation'][key]:.1f}" for key in ("accuracy_as_classifier", *rows)]
        table.append([says, f"{each['images']:,}", f"{each['seconds'] / 60:.0f}", *values])
    return table


def label_rows() -> Table:
    """Ways to ask for the label, by levels and draws."""
    table = [["asked for", "evaluations", "near AUROC"]]
    for name, row in result("label-rows")["rows"].items():
        table.append([name, str(row["evaluations"]), f"{100 * row['near_auroc']:.1f}"])
    return table


def studies() -> Table:
    """What each study takes on digits, from its command to its page."""
    report = result("studies")
    table = [["study", "from start to page"]]
    for name, seconds in report["seconds"].items():
        table.append([f"`{name}`", f"{seconds:.0f} s" if isinstance(seconds, float) else f"ends with `{seconds}`"])
    return table


def speed_targets() -> Table:
    """What was aimed at on a processor, and what was measured."""
    whole = result("pipeline")["seconds"]["now"]["whole"]
    rates = [row["images_per_second"] for row in result("networks")["rows"].values()]
    same, patched = rates[3] / rates[0], rates[5] / rates[0]
    commands = result("startup")["commands"]
    help_seconds, score_seconds = (commands[name]["this"]["median"]["elapsed"] for name in ("help", "score"))
    own = result("python_share")["own_seconds_ratio"]
    idle = min(_times_as_fast(0, images) for images in (1, 50, 200))
    beside_one, single_beside_two = _times_as_fast(1, 200), _times_as_fast(2, 1)
    slower = result("pipeline_rows")["seconds"]
    without_units = slower["now"]["whole"] / slower["before"]["whole"]
    rows: list[tuple[str, str, bool]] = [
        ("`digits` from start to table: at most 2 min", f"{whole:.0f} s", whole <= 120),
        ("`digits` without bfloat16 units: no slower", f"{without_units:.2f} of before", without_units <= 1),
        ("scoring on an idle machine: at least 0.95×", f"{idle:.2f}×", idle >= 0.95),
        ("scoring beside one busy program: at least 1.5×", f"{beside_one:.2f}×", beside_one >= 1.5),
        ("single images beside two busy programs: at least 20×", f"{single_beside_two:.1f}×", single_beside_two >= 20),
        ("32x32, the same network: at least 2.5×", f"{same:.2f}×", same >= 2.5),
        (
            "32x32, patches of as many parameters: at least 20×",
            f"{patched:.1f}×",
            patched >= 20,
        ),
        ("`diffguard score` of one image: at most 4 s", f"{score_seconds:.2f} s", score_seconds <= 4),
        ("`diffguard --help`: at most 0.3 s", f"{help_seconds:.2f} s", help_seconds <= 0.3),
        ("the engine's own Python: half", f"{own:.2f} of before", own <= 0.5),
    ]
    return [["aim", "measured", ""], *([aim, measured, "met" if met else "missed"] for aim, measured, met in rows)]


TABLES: dict[str, Callable[[], Table]] = {
    "digits-short": lambda: rows("digits", README_ROWS, only="ordinary"),
    "digits-ten": lambda: rows("digits", RESULT_ROWS),
    "digits": lambda: rows("digits"),
    "digits-differences": lambda: differences("digits"),
    "digits-run": lambda: run_of("digits"),
    "glyphs-ten": lambda: rows("glyphs", RESULT_ROWS, only="ordinary"),
    "glyphs": lambda: rows("glyphs", only="ordinary"),
    "glyphs-differences": lambda: differences("glyphs"),
    "glyphs-run": lambda: run_of("glyphs"),
    "cifar10-jpeg": cifar10,
    "cifar10-jpeg-differences": lambda: cifar10(differences=True),
    "studies": studies,
    "photographs": photographs,
    "photographs-adds": photographs_adds,
    "photographs-classifiers": photographs_classifiers,
    "photographs-training": photographs_training,
    "photographs-denoisers": photographs_denoisers,
    "photographs-classes": photographs_classes,
    "photographs-gate": photographs_gate,
    "photographs-drift": photographs_drift,
    "label-terms": label_terms,
    "label-rows": label_rows,
    "cost": cost,
    "engine": engine,
    "steps": lambda: steps("steps"),
    "steps-glyphs": lambda: steps("steps-glyphs"),
    "calibration": calibration,
    "cascade": cascade,
    "fusion": fusion,
    "serving": serving,
    "clients": clients,
    "training": training,
    "precision": precision,
    "networks": networks,
    "startup": startup,
    "python-share": python_share,
    "load": load,
    "pipeline": pipeline,
    "pipeline-avx2": lambda: pipeline("pipeline_avx2"),
    "pipeline-rows": lambda: pipeline("pipeline_rows"),
    "speed-targets": speed_targets,
}


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def with_tables(text: str, name: str) -> str:
    """A page with its tables as the results have them.

    Args:
        name: of its file, for errors.

    Raises:
        DataError: a table is unknown, or its second mark is missing.
    """
    if len(OPENED.findall(text)) != len(list(MARKED.finditer(text))):
        raise DataError(f"{name}: a table has no <!-- end of table --> after it")

    def table(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise DataError(f"{name}: there is no table {match['name']}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{markdown(TABLES[match['name']]())}\n{match[3]}"

    return MARKED.sub(table, text)


def pages() -> list[Path]:
    """The pages that may show tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is out of date")
    options = parser.parse_args()
    old = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(ROOT).as_posix()
        if (current := with_tables(text, name)) == text:
            continue
        old.append(name)
        if not options.check:
            page.write_text(current, encoding="utf-8")
    if old and options.check:
        raise DataError(f"tables out of date in {', '.join(old)}: run python experiments/tables.py")
    print(f"{'written: ' + ', '.join(old) if old else 'tables are up to date'}")


if __name__ == "__main__":
    run_stage(main)
