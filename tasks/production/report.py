"""Reports of monitoring: a line, Markdown, and a run in MLflow."""

import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.production.figures import ood_grid, p_value_histogram
from tasks.production.monitor import Observed
from tasks.services.tracking import experiment_id, flat, log_batch, logged_run, open_tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "diffguard-monitor"


def log(observed: Observed) -> str:
    """Log observations as a run named by date, so that runs show changes over time.

    Returns:
        The id of the run. Its status is FAILED where the flow's is.

    Raises:
        ServiceError: MLflow does not answer.
    """
    client = open_tracking()
    name = f"{datetime.now():%Y-%m-%d %H:%M:%S} · {observed.settings.images.rstrip('/').rpartition('/')[2]}"
    tags = {
        "mlflow.source.name": "flows/monitor.py",
        "mlflow.source.type": "PROJECT",
        "mlflow.note.content": report(observed),
        "promise": observed.verdict,
        "detector": observed.detector,
    }
    end = "FAILED" if observed.fails else "FINISHED"
    with logged_run(client, experiment_id(client, EXPERIMENT), name, tags, end) as run_id:
        _log_contents(client, run_id, observed)
    return run_id


def _log_contents(client: "MlflowClient", run_id: str, observed: Observed) -> None:
    info = observed.info
    params = {
        **observed.settings.model_dump(mode="json"),
        "detector": {
            "uri": observed.detector,
            "row": info.detector,
            "classifier": info.classifier,
            "benchmark": info.benchmark,
            "alpha": info.alpha,
            "calibration_images": observed.calibration,
            "bundle_hash": observed.bundle_hash,
        },
    }
    log_batch(client, run_id, flat(params), metrics_of(observed))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        observed.table.to_csv(folder / "scores.csv", index=False)
        observed.by_class.to_csv(folder / "by-class.csv", index=False)
        (folder / "report.md").write_text(report(observed) + "\n", encoding="utf-8")
        if observed.unreadable:
            (folder / "unreadable.txt").write_text("\n".join(observed.unreadable) + "\n", encoding="utf-8")
        p_value_histogram(observed.uniformity, observed.rejection, info.alpha, folder / "p-values.png")
        ood_grid(observed.most_ood).save(folder / "most-ood.png")
        client.log_artifacts(run_id, str(folder))


def verdict_line(observed: Observed) -> str:
    """The verdict in one line, with its figures.

    Example: rejected 9.1 % (7.9-10.4 %) of 2,000 images, alpha 5 % (by chance of 160 calibration images up to 8.2 %)
    """
    rejection, settings = observed.rejection, observed.settings
    expected = "alpha" if settings.expected_rate is None else "expected"
    line = (
        f"rejected {percent(rejection.rate)} % ({percent(rejection.low)}-{percent(rejection.high)} %) of "
        f"{rejection.images:,} images, {expected} {percent(rejection.expected)} %"
    )
    if rejection.allowed > rejection.expected:
        line += f" (by chance of {observed.calibration:,} calibration images up to {percent(rejection.allowed)} %)"
    lost, total = len(observed.unreadable), len(observed.unreadable) + rejection.images
    if observed.verdict == "unreadable":
        return (
            f"{lost:,} of {total:,} images cannot be read ({percent(lost / total)} %), more than "
            f"{percent(settings.most_unreadable)} %; the first: {observed.unreadable[0]}"
        )
    if observed.verdict == "too few":
        return f"too few images for a verdict ({rejection.images:,}, at least {settings.at_least:,}): {line}"
    return line


def warnings(observed: Observed) -> list[str]:
    """Return warnings: what deserves attention but does not break the guarantee."""
    messages = []
    if observed.uniformity.p_value < 0.01:
        messages.append(
            f"p-values are not uniform (Kolmogorov-Smirnov {observed.uniformity.statistic:.3f}, "
            f"p = {observed.uniformity.p_value:.2g}): these images are not of the kind that the detector was "
            "calibrated on"
        )
    if observed.rejection.is_below:
        messages.append("fewer images are rejected than alpha, more so than chance explains; recalibrate")
    if observed.unreadable and observed.verdict != "unreadable":
        lost = len(observed.unreadable)
        messages.append(f"{lost:,} image{'s' * (lost > 1)} cannot be read; the first: {observed.unreadable[0]}")
    return messages


def metrics_of(observed: Observed) -> dict[str, float]:
    """The figures of a run, under names that stay the same, so that runs can be compared over time."""
    rejection, uniform = observed.rejection, observed.uniformity
    return {
        "rejection_rate": rejection.rate,
        "rejection_rate_low": rejection.low,
        "rejection_rate_high": rejection.high,
        "expected_rate": rejection.expected,
        "allowed_rate": rejection.allowed,
        "promise_broken": float(observed.verdict == "broken"),
        "ks_statistic": uniform.statistic,
        "ks_p_value": uniform.p_value,
        "images": float(rejection.images),
        "rejected": float(rejection.count),
        "unreadable": float(len(observed.unreadable)),
        "mean_score": float(observed.table["score"].mean()),
        "mean_confidence": float(observed.table["confidence"].mean()),
        "share_diffused": float(observed.table["diffused"].mean()),
        "images_per_second": rejection.images / max(observed.seconds, 1e-9),
    }


def report(observed: Observed) -> str:
    """Return the report as Markdown."""
    rejection, uniform, info = observed.rejection, observed.uniformity, observed.info
    words = {"kept": "kept", "broken": "broken", "too few": "not judged", "unreadable": "not judged"}
    lines = [
        f"**The guarantee is {words[observed.verdict]}**: {verdict_line(observed)}.",
        "",
        *(f"- warning: {warning}\n" for warning in warnings(observed)),
        f"`{info.detector}` guards `{info.classifier}` on `{info.benchmark}` ({observed.detector}); images: "
        f"`{observed.settings.images}`.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| rejected | {rejection.count:,} of {rejection.images:,} |",
        f"| rejection rate | {percent(rejection.rate)} % |",
        f"| its 95 % interval | {percent(rejection.low)} to {percent(rejection.high)} % |",
        f"| expected | {percent(rejection.expected)} % |",
        f"| highest rate that chance explains | {percent(rejection.allowed)} % |",
        f"| Kolmogorov-Smirnov against uniform p-values | {uniform.statistic:.3f} (p = {uniform.p_value:.2g}) |",
        f"| unreadable | {len(observed.unreadable):,} |",
        "",
        "| class | predicted | rejected | rate |",
        "|---|---|---|---|",
    ]
    counted = observed.by_class.query("predicted > 0").sort_values("predicted", ascending=False)
    for row in counted.head(50).itertuples():
        lines.append(f"| {row.class_name} | {row.predicted} | {row.rejected} | {percent(row.rate)} % |")
    return "\n".join(lines)


def most_ood(observed: Observed) -> list[dict[str, str]]:
    """The most OOD images as rows of a table, without their pictures."""
    return [
        {
            "image": str(row.image),
            "predicted": str(row.class_name),
            "score": f"{row.score:.4g}",
            "p-value": f"{row.p_value:.2g}",
            "verdict": "OOD" if row.is_ood else "InD",
        }
        for _, row in observed.most_ood
    ]


def percent(share: float) -> str:
    """A share in percent with one decimal, or none if it is whole.

    Example:
        >>> percent(0.05), percent(0.0912)
        ('5', '9.1')
    """
    return f"{100 * share:.1f}".removesuffix(".0")
