"""From which strength of a change of appearance on a detector rejects more InD images than it promises."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.common.text import markdown_table
from tasks.config.changes import CHANGES


def fails_from(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The weakest point at which, and at every stronger one, the whole interval of rejections is above the promise.

    Args:
        points: of one row and one kind of change; see `tasks.studies.results.results`.

    Returns:
        The point; None: the strongest change is not rejected more often than promised.
    """
    kind = CHANGES[points[0]["axes"]["change"]]
    found = None
    for point in sorted(points, key=lambda each: each["axes"]["strength"], reverse=not kind.is_inverse):
        if not _fails(point):
            break
        found = point
    return found


def failure_table(results: Mapping[str, Any]) -> str:
    """For each row and kind of change the strength from which on it fails, as a Markdown table; "" without changes."""
    changed = [point for point in results["points"] if point["axes"].get("change", "none") != "none"]
    if not changed or not {"rejected", "promised"} <= changed[0]["measures"].keys():
        return ""
    kinds = list(dict.fromkeys(point["axes"]["change"] for point in changed))
    several = len(results["classifiers"]) > 1
    heads = [*(["classifier"] if several else []), "row", "unchanged", *(_head(kind) for kind in kinds)]
    lines = []
    for classifier in results["classifiers"]:
        of_classifier = [point for point in results["points"] if point["classifier"] == classifier]
        for row in dict.fromkeys((point["line"], point["row"]) for point in of_classifier):
            of_row = [point for point in of_classifier if (point["line"], point["row"]) == row]
            unchanged = next(point for point in of_row if point["axes"]["change"] == "none")
            cells = [f"`{row[1]}`", f"{_percent(unchanged)} of {100 * unchanged['measures']['promised']['value']:.1f}"]
            for kind in kinds:
                of_kind = [point for point in of_row if point["axes"]["change"] == kind]
                cells.append(_cell(of_kind))
            lines.append([*([classifier] if several else []), *cells])
    return markdown_table(heads, lines)


CAPTION = (
    "From which strength on each row fails: at it and at every stronger one the whole 95 % interval (Clopper and "
    "Pearson) of InD test images rejected lies above the rate promised. In brackets the share rejected there, in "
    "percent. *Only* are strengths at which it fails while the strongest change is rejected no more often than "
    "promised; – is nowhere. Unchanged: percent rejected of percent promised. Thresholds are those of unchanged "
    "calibration images. A row that does not fail may be blind: see how many images the classifier still gets right."
)


def _fails(point: Mapping[str, Any]) -> bool:
    return bool(point["measures"]["rejected"]["low"] > point["measures"]["promised"]["value"])


def _cell(points: Sequence[Mapping[str, Any]]) -> str:
    failed = fails_from(points)
    if failed is not None:
        return f"{_strength(failed)} ({_percent(failed)})"
    alone = [f"{_strength(point)} ({_percent(point)})" for point in points if _fails(point)]
    return f"only {', '.join(alone)}" if alone else "–"


def _strength(point: Mapping[str, Any]) -> str:
    return f"{point['axes']['strength']:g}"


def _head(kind: str) -> str:
    return f"{kind} ({CHANGES[kind].title})"


def _percent(point: Mapping[str, Any]) -> str:
    return f"{100 * point['measures']['rejected']['value']:.1f}"
