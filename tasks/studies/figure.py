"""The figures of studies, all in one style."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.config.changes import CHANGES
from tasks.config.study import Figure, split_measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b5b5b", "#8c510a")
"""Of Okabe and Ito, told apart by people who see no red or green."""
MARKERS = "osD^vPX*"
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
PANEL = (4.3, 3.1)
"""Width and height of a panel, in inches."""
DPI = 110

SHARES = ("auroc", "fpr95", "aupr_in", "aupr_out", "error", "rejected", "accuracy", "promised")
"""Metrics that are shown in percent."""
_METRICS = {
    "auroc": "AUROC",
    "fpr95": "FPR@95",
    "aupr_in": "AUPR-in",
    "aupr_out": "AUPR-out",
    "evaluations": "network evaluations per image",
    "stop": "mean stop",
    "score": "mean score",
    "rejected": "InD images rejected",
    "promised": "rejections promised",
    "accuracy": "accuracy",
    "error": "1 − AUROC",
    "parameters": "parameters",
    "macs": "multiply-accumulates a call",
    "training_macs": "multiply-accumulates of the training",
}
_AS_CLASSIFIER = {"accuracy": "accuracy as a classifier", "error": "error as a classifier"}
_AXES = {"scale": "guidance scale", "stop": "level where inversion stops", "median_at": "level of the median"}


def label(name: str) -> str:
    """A measure, or an axis, as people read it.

    Example:
        >>> label("near auroc"), label("scale")
        ('near AUROC', 'guidance scale')
    """
    group, _, metric = name.rpartition(" ")
    if metric not in _METRICS or (not group and metric == "stop"):
        return _AXES.get(name, name.replace("_", " "))
    text = _METRICS[metric]
    if group == "denoiser":
        return f"{text}, denoiser" if metric not in ("accuracy", "error") else f"denoiser's {_AS_CLASSIFIER[metric]}"
    if metric == "accuracy":
        return "classifier's accuracy"
    if metric in ("evaluations", "stop", "score", "rejected"):
        return f"{text}, {'InD' if group == 'ind' else group}" if group else text
    return f"{group} {text}".strip()


def measure_label(measure: str) -> str:
    """A measure with its unit, as a column or an axis is titled."""
    group, metric = split_measure(measure)
    text = "mean stop" if group is None and metric == "stop" else label(measure)
    return f"{text}, %" if metric in SHARES else text


def scale_of(measure: str) -> float:
    """What a measure is multiplied with where it is shown."""
    return 100.0 if split_measure(measure)[1] in SHARES else 1.0


def draw(path: Path, results: Mapping[str, Any], settings: Figure) -> None:
    """A panel for each `y` and classifier: points along `x`, a line for each combination of the other axes' values.

    Rows of params.yaml, which have no axis, are dashed lines. Without an `x` the points are listed. Bars are 95 %
    intervals.
    """
    import matplotlib
    from matplotlib.figure import Figure as MakeCanvas

    classifiers = results["classifiers"]
    with matplotlib.rc_context(STYLE):
        if settings.x is None:
            rows = len(results["points"]) // len(classifiers)
            canvas = MakeCanvas(figsize=(2.2 + 3.2 * len(settings.y), 0.9 + 0.19 * rows), dpi=DPI, layout="constrained")
            panels = canvas.subplots(1, len(settings.y), sharey=True, squeeze=False)[0]
            for axes, measure in zip(panels, settings.y, strict=True):
                _list(axes, results["points"], classifiers, measure)
        else:
            panels = _panels(results, settings)
            columns = max(len(row) for row in panels)
            size = (PANEL[0] * columns, PANEL[1] * len(panels) + 0.75)
            canvas = MakeCanvas(figsize=size, dpi=DPI, layout="constrained")
            grid = canvas.subplots(len(panels), columns, squeeze=False)
            for row, of_row in zip(grid, panels, strict=True):
                for axes in row[len(of_row) :]:
                    axes.set_visible(False)
                for axes, panel in zip(row, of_row, strict=False):
                    _lines(axes, panel, settings)
        _legend(canvas)
        _save(canvas, path)


def draw_curve(path: Path, curve: Mapping[str, Any]) -> None:
    """How alike noisy latents are to the image, by level: a panel for each similarity, a line for each dataset."""
    import matplotlib
    from matplotlib.figure import Figure as MakeCanvas

    with matplotlib.rc_context(STYLE):
        similarities = list(curve["similarities"])
        size = (PANEL[0] * len(similarities), PANEL[1] + 0.45)
        canvas = MakeCanvas(figsize=size, dpi=DPI, layout="constrained")
        panels = canvas.subplots(1, len(similarities), squeeze=False)[0]
        for axes, similarity in zip(panels, similarities, strict=True):
            for number, (dataset, levels) in enumerate(curve["similarities"][similarity].items()):
                role = curve["datasets"][dataset]
                color = COLORS[number % len(COLORS)]
                x = list(range(1, len(levels) + 1))
                axes.plot(
                    x,
                    [each["value"] for each in levels],
                    color=color,
                    label=f"{dataset} ({_role(role)})",
                    linewidth=2.2 if role == "ind" else 1.2,
                )
                axes.fill_between(
                    x,
                    [each["low"] for each in levels],
                    [each["high"] for each in levels],
                    color=color,
                    alpha=0.18,
                    linewidth=0,
                )
            axes.axvline(curve["at"], color="#8a8a8a", linestyle=":", linewidth=1)
            unit = "PSNR to the image, dB" if similarity == "psnr" else f"1 − {similarity} to the image"
            axes.set(xlabel="noise level (steps of inversion)", ylabel=unit)
        _legend(canvas)
        _save(canvas, path)


def _role(role: str) -> str:
    return "InD" if role == "ind" else f"{role}-OOD"


def _value(point: Mapping[str, Any], name: str) -> Any:
    """Of an axis, or of a measure."""
    if name in point["axes"]:
        return point["axes"][name]
    found = point["measures"].get(name)
    return None if found is None else found["value"] * scale_of(name)


@dataclass(frozen=True)
class _Panel:
    """Points that are shown together, of one classifier and measure."""

    title: str
    y: str
    points: Sequence[Mapping[str, Any]]
    value: Any = None


COLUMNS = 3
"""Of panels by an axis' values."""


def _panels(results: Mapping[str, Any], settings: Figure) -> list[list[_Panel]]:
    """Rows of panels: one for each classifier, or, with `panels`, of the first classifier for the axis' values."""
    classifiers = results["classifiers"]
    if settings.panels is None:
        several = len(classifiers) > 1
        return [
            [
                _Panel(
                    f"classifier {classifier}" if several else "",
                    measure,
                    [point for point in results["points"] if point["classifier"] == classifier],
                )
                for measure in settings.y
            ]
            for classifier in classifiers
        ]
    points = [point for point in results["points"] if point["classifier"] == classifiers[0]]
    with_x = [point for point in points if settings.x in point["axes"] and settings.panels in point["axes"]]
    values = list(dict.fromkeys(point["axes"][settings.panels] for point in with_x))
    made = []
    for measure in settings.y:
        for value in values:
            of_value = [point for point in with_x if point["axes"][settings.panels] == value]
            made.append(_Panel(str(value), measure, of_value, value))
    return [made[first : first + COLUMNS] for first in range(0, len(made), COLUMNS)]


def _line_of(point: Mapping[str, Any], settings: Figure) -> str:
    """The name of the line that a point is on: along a measure, points that differ by a number are on one."""
    x = settings.x
    others = [
        _axis(axis, value)
        for axis, value in point["axes"].items()
        if axis not in (x, settings.panels) and (x in point["axes"] or not isinstance(value, int | float))
    ]
    return " ".join([point["row"] if point["line"] == "rows" else point["line"], *others])


def _lines(axes: "Axes", panel: _Panel, settings: Figure) -> None:
    x, y, log = str(settings.x), panel.y, settings.log
    lines: dict[str, list[Mapping[str, Any]]] = {}
    rows = []
    points = panel.points
    for point in points:
        if point["measures"][y] is None:
            continue
        if point["line"] == "rows" and not point["axes"]:
            rows.append(point)
        else:
            lines.setdefault(_line_of(point, settings), []).append(point)
    numeric = all(isinstance(_value(point, x), int | float) for line in lines.values() for point in line)
    ticks: list[Any] = list(dict.fromkeys(_value(point, x) for line in lines.values() for point in line))
    places = [_value(point, x) for line in lines.values() for point in line]
    is_measure = any(x in point["measures"] for point in points)
    # Side by side, so that bars do not hide each other; not where the place itself says something.
    step = 0.09
    if numeric:
        step = 0.0 if "x" in log or is_measure or not places else 0.009 * (max(places) - min(places))
    for number, (name, of_line) in enumerate(lines.items()):
        values = [_value(point, x) if numeric else ticks.index(_value(point, x)) for point in of_line]
        values = [value + step * (number - (len(lines) - 1) / 2) for value in values]
        style = {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
        }
        axes.errorbar(
            values,
            *_bars(of_line, y),
            label=name,
            capsize=2,
            elinewidth=0.9,
            # Of more than two names no order is meant.
            linestyle="-" if numeric or len(ticks) < 3 else "none",
            **style,
        )
    for number, point in enumerate(rows):
        color = COLORS[(len(lines) + number) % len(COLORS)]
        interval = point["measures"][y]
        axes.axhline(interval["value"] * scale_of(y), color=color, linestyle="--", linewidth=1, label=point["name"])
        axes.axhspan(
            interval["low"] * scale_of(y), interval["high"] * scale_of(y), color=color, alpha=0.08, linewidth=0
        )
    if numeric and all(isinstance(tick, int) for tick in ticks) and len(ticks) <= 12:
        axes.set_xticks(sorted(ticks))
    if not numeric:
        axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
    promised = {point["measures"]["promised"]["value"] for point in points if point["measures"].get("promised")}
    if split_measure(y)[1] == "rejected" and promised:
        axes.axhline(100 * max(promised), color="#5b5b5b", linestyle=":", linewidth=1, label="promised")
    if panel.title:
        axes.set_title(panel.title)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set(xlabel=measure_label(x) if is_measure else label(x), ylabel=measure_label(y))
    if settings.panels == "change" and x == "strength":
        change = CHANGES[str(panel.value)]
        axes.set_xlabel(change.title)
        if change.is_inverse:
            axes.invert_xaxis()


def _axis(axis: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{axis}={value}"


def _list(axes: "Axes", points: Sequence[Mapping[str, Any]], classifiers: Sequence[str], measure: str) -> None:
    names = list(dict.fromkeys(point["name"] for point in points))
    for number, classifier in enumerate(classifiers):
        shown = [p for p in points if p["classifier"] == classifier and p["measures"][measure] is not None]
        places = [names.index(point["name"]) + 0.24 * (number - (len(classifiers) - 1) / 2) for point in shown]
        values, bars = _bars(shown, measure)
        axes.errorbar(
            values,
            places,
            xerr=bars,
            linestyle="none",
            marker=MARKERS[number],
            color=COLORS[number],
            elinewidth=0.9,
            markersize=3.5,
            label=classifier,
        )
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(measure_label(measure))


def _bars(points: Sequence[Mapping[str, Any]], measure: str) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach below and above them."""
    scale = scale_of(measure)
    found = [point["measures"][measure] for point in points]
    # The value of all images may lie outside the quantiles of few draws.
    below = [max(0.0, scale * (each["value"] - each["low"])) for each in found]
    above = [max(0.0, scale * (each["high"] - each["value"])) for each in found]
    return [scale * each["value"] for each in found], [below, above]


def _save(canvas: "Canvas", path: Path) -> None:
    """As a PNG of few colours, a quarter of the size."""
    from PIL import Image

    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(64).save(path, optimize=True)


def _legend(canvas: "Canvas") -> None:
    """One legend under all panels."""
    handles: dict[str, Any] = {}
    for axes in canvas.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        columns = min(len(handles), max(2, int(canvas.get_figwidth() // 2.2)))
        canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
