"""Result tables as people read them."""

from collections.abc import Sequence
from typing import Any

from diffguard.utils.names import readable

Metrics = dict[str, dict[str, dict[str, Any]]]
"""{classifier: {row: {dataset or "near" or "far": metrics}}}.

A combination's row also has "difference", {member: {dataset or group: {metric: {"value", "low", "high"}}}}: its
metrics minus that member's. A cascade's also has "diffused"; see `tasks.combine.diffused`. A combination that chooses
on validation has "fitted", of each training seed what was chosen and what the choice is based on; see `validation` of
`diffguard.detectors.cascade.Cascade`, `diffguard.detectors.selection.Best` and
`diffguard.detectors.weighted.Weighted`. A row that takes the denoiser for a classifier has "denoiser",
{"accuracy": {"value", "low", "high"}}.
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


def choices(metrics: Metrics) -> str:
    """What each combination that chooses on validation has chosen, a line each; empty without one."""
    lines = []
    for classifier, rows in metrics.items():
        for name, row in rows.items():
            chosen = row.get("fitted", [])
            for seed, fitted in enumerate(chosen):
                of = f"{classifier}, training seed {seed + 1} of {len(chosen)}" if len(chosen) > 1 else classifier
                says = _weights if "weights" in fitted else _fusion if "members" in fitted else _band
                lines.append(f"- {name} ({of}): {says(fitted, fitted['validation'])}")
    return "\n".join(lines)


def report(metrics: Metrics, warnings: Sequence[str] = ()) -> str:
    """All tables, what was chosen on validation and what the denoiser knows, and what is to be known of the datasets.

    Args:
        warnings: see `tasks.prepare.fairness.dataset_warnings`.
    """
    parts = [result_table(metrics)]
    # The same denoiser under every classifier, but for labels that a row gave up.
    for name, row in next(iter(metrics.values()), {}).items():
        if accuracy := row.get("denoiser", {}).get("accuracy"):
            share = _cell(accuracy)
            parts.append(f"The denoiser as a classifier ({name}) gives {share} % of InD images their label.")
    if differences := difference_table(metrics):
        parts.append("Differences of combinations to their members (paired bootstrap):")
        parts.append(differences)
    if chosen := choices(metrics):
        parts.append("Chosen on validation:")
        parts.append(chosen)
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


def _fusion(fitted: dict[str, Any], validation: dict[str, Any]) -> str:
    """Which members a fusion has chosen, and how far it is above the runner-up, in points of mean AUROC."""
    other = validation["runner_up"]
    other_members, difference = " + ".join(other["members"]), _cell(other["difference"], signed=True)
    return (
        f"{' + '.join(fitted['members'])}, mean AUROC {100 * validation['auroc']['mean']:.1f}, "
        f"{difference} against the runner-up, {other_members}"
    )


def _weights(fitted: dict[str, Any], validation: dict[str, Any]) -> str:
    """The weights of a fusion's members, and its AUROC on the images that they were fitted on."""
    weights = " + ".join(f"{weight:.2f} {name}" for name, weight in fitted["weights"].items())
    return f"{weights}, mean AUROC {100 * validation['auroc']['mean']:.1f} on the images that they were fitted on"


def _band(fitted: dict[str, Any], validation: dict[str, Any]) -> str:
    """Which share of a stream a cascade's band lets through, and what it loses, in points of AUROC."""
    stated = f"{100 * validation['stated_loss']:g} points"
    if fitted["band"] == [None, None]:
        if validation["images_needed"] is None:
            return f"everything goes on: no number of such images would show a loss of at most {stated}"
        needed = {part: int(float(f"{count:.2g}")) for part, count in validation["images_needed"].items()}
        return (
            f"everything goes on: to show a loss of at most {stated} takes about {_counts(needed)} images; "
            f"there are {_counts(validation['images'])}"
        )
    losses = ", ".join(
        f"{group} {100 * loss['value']:.1f} (at most {100 * loss['upper']:.1f})"
        for group, loss in validation["loss"].items()
    )
    return f"{100 * validation['share']:.0f} % of a stream goes on, loss {losses} points where {stated} may be lost"


def _counts(images: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {'InD' if part == 'ind' else part}" for part, count in images.items())
