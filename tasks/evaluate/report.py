"""Result tables as people read them."""

from collections.abc import Sequence
from typing import Any

from diffguard.utils.names import readable

Metrics = dict[str, dict[str, dict[str, Any]]]
"""{classifier: {row: {dataset or "near" or "far": metrics}}}.

A combination's row also has "difference", {member: {dataset or group: {metric: {"value", "low", "high"}}}}: its
metrics minus that member's. A cascade's also has "diffused"; see `tasks.combine.diffused`. A row that takes the
denoiser for a classifier has "denoiser", {"accuracy": {"value", "low", "high"}}.
"""


def result_table(metrics: Metrics) -> str:
    """AUROC and FPR@95 in percent, with 95 % intervals, as a Markdown table."""
    lines = [
        "| classifier | detector | near AUROC | near FPR@95 | far AUROC | far FPR@95 |",
        "|---|---|---|---|---|---|",
    ]
    for classifier, rows in metrics.items():
        for name, row in rows.items():
            lines.append(f"| {classifier} | {name} | {' | '.join(_cells(row))} |")
    return "\n".join(lines)


def difference_table(metrics: Metrics) -> str:
    """How far each combination is above each of its members, in points, with 95 % intervals, as a Markdown table.

    Each interval is of the difference on the same draws of images. Empty without a combination.
    """
    lines = [
        "| classifier | combination − member | near AUROC | near FPR@95 | far AUROC | far FPR@95 |",
        "|---|---|---|---|---|---|",
    ]
    for classifier, rows in metrics.items():
        for name, row in rows.items():
            for member, difference in row.get("difference", {}).items():
                cells = " | ".join(_cells(difference, signed=True))
                lines.append(f"| {classifier} | {name} − {member} | {cells} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def report(metrics: Metrics, warnings: Sequence[str] = ()) -> str:
    """Both tables, what the denoiser knows of its labels, and what is to be known of the datasets, as Markdown.

    Args:
        warnings: see `tasks.prepare.fairness.dataset_warnings`.
    """
    parts = [result_table(metrics)]
    # The same denoiser under every classifier, but for labels that a row gave up.
    for name, row in next(iter(metrics.values())).items():
        if accuracy := row.get("denoiser", {}).get("accuracy"):
            share = _cell(accuracy)
            parts.append(f"The denoiser as a classifier ({name}) gives {share} % of InD images their label.")
    if differences := difference_table(metrics):
        parts.append("Differences of combinations to their members (paired bootstrap):")
        parts.append(differences)
    if warnings:
        parts.append("\n".join(f"- warning: {readable(warning)}" for warning in warnings))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any], *, signed: bool = False) -> list[str]:
    metrics = [row.get(group, {}).get(metric) for group in ("near", "far") for metric in ("auroc", "fpr95")]
    return [_cell(metric, signed=signed) for metric in metrics]


def _cell(metric: dict[str, float] | None, *, signed: bool = False) -> str:
    if metric is None:
        return "–"
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if signed else f"{value:.1f} ({low:.1f}–{high:.1f})"
