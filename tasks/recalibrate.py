"""A deployed detector calibrated anew on other InD images: a new bundle, and a new version in MLflow's registry."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
from pydantic import Field

from diffguard.bundle import check_new, open_detector, save_bundle
from diffguard.deployed import DeployedDetector
from diffguard.recalibration import CalibrationScores, recalibrated
from diffguard.settings import Settings
from tasks import settings as project
from tasks.deployed import default_detector
from tasks.log import experiment_id, flat, log_batch, open_tracking
from tasks.monitor_report import percent
from tasks.production import Production
from tasks.register import ALIAS, model_name

EXPERIMENT = "diffguard-calibrate"

STEP = 64
"""Images between two reports of progress."""


class Recalibration(Settings):
    """What a detector is calibrated on.

    Attributes:
        images, column, limit: see `tasks.production.Production`; InD images that trained nothing.
        detector: see `tasks.monitor.Monitoring`.
        accept: share of InD images to accept; None: as before.
        output: the new bundle's folder; None: data/<benchmark>/detectors/<date and time>.
        promote: let the alias champion go to the new version. It changes the threshold, not the ranking, so nothing
            that could be measured says which is better.
    """

    images: str = Field(min_length=1)
    detector: str | None = None
    accept: float | None = Field(default=None, gt=0, lt=1)
    output: str | None = None
    column: str | None = None
    limit: int | None = Field(default=None, ge=1)
    promote: bool = False


@dataclass(frozen=True)
class Recalibrated:
    """A new bundle.

    Attributes:
        detector: URI of the one that it was made of. folder: where it is.
        metrics: threshold and alpha, before and after; the share of validation images that each rejects.
    """

    settings: Recalibration
    detector: str
    bundle_hash: str | None
    folder: Path
    benchmark: str
    row: str
    images: int
    metrics: dict[str, float]


def recalibrate(
    settings: Recalibration, progress: Callable[[int, int], object] = lambda done, total: None
) -> Recalibrated:
    """Score InD images and write the detector with them as its calibration images.

    Args:
        progress: told how many of how many are done.

    Raises:
        DataError: an image cannot be read: one that is left out unseen would bend the promise. Or see `Production`.
        SettingError: too few images to promise that; or see `Production`.
        DataError, SettingError, ServiceError: see `diffguard.bundle.open_detector`.
    """
    images = Production(settings.images, settings.column, settings.limit)
    if settings.output is not None:
        check_new(settings.output)
    uri = settings.detector or default_detector()
    before = open_detector(uri)
    scores = CalibrationScores(before)
    for done, each in enumerate(images, 1):
        scores.add(each.name, before.prepare(each.open()))
        if done % STEP == 0 or done == len(images):
            progress(done, len(images))
    after = recalibrated(before, scores.table(), None if settings.accept is None else 1 - settings.accept)
    folder = Path(settings.output) if settings.output is not None else _new_folder(before.info.benchmark)
    check_new(folder)
    save_bundle(after, folder)
    metrics = {**_figures(before, "before"), **_figures(after, "after"), "images": float(len(images))}
    return Recalibrated(
        settings,
        uri,
        before.bundle_hash,
        folder,
        before.info.benchmark,
        before.info.detector,
        len(images),
        metrics,
    )


def _new_folder(benchmark: str) -> Path:
    return project.ROOT / "data" / benchmark / "detectors" / f"{datetime.now():%Y-%m-%d-%H%M%S}"


def _figures(detector: DeployedDetector, when: str) -> dict[str, float]:
    """What it takes for OOD of the validation images, which neither calibration has seen."""
    table, conformal = detector.validation, detector.conformal
    figures = {f"alpha_{when}": detector.alpha, f"threshold_{when}": conformal.threshold()}
    figures[f"classes_of_their_own_{when}"] = float(len(conformal.thresholds))
    rejected = pd.Series(conformal.rejects(table["score"], table["predicted"]), index=table.index, dtype=float)
    for name, each in rejected.groupby(table["dataset"]):
        figures[f"validation_rejected_{when}/{name}"] = float(each.mean())
    return figures


def register(made: Recalibrated) -> str:
    """Log a new bundle as a run in MLflow, and register it as a version of the benchmark's model.

    Returns:
        The URI of the version.

    Raises:
        ServiceError: MLflow does not answer.
    """
    import diffguard.mlflow as flavor

    client, settings, name = open_tracking(), made.settings, model_name(made.benchmark)
    run_name = f"{datetime.now():%Y-%m-%d %H:%M:%S} · {made.row} on {settings.images.rstrip('/').rpartition('/')[2]}"
    origin = {
        "made_by": "diffguard/calibrate",
        "calibrated_from": made.detector,
        "calibrated_from_bundle": str(made.bundle_hash),
        "calibrated_on": f"{made.images} images of {settings.images}",
        "detector": made.row,
        "benchmark": made.benchmark,
        "alpha": f"{made.metrics['alpha_after']:g}",
    }
    tags = {
        "mlflow.source.name": "flows/calibrate.py",
        "mlflow.source.type": "PROJECT",
        "mlflow.note.content": report(made),
        **origin,
    }
    run_id = str(client.create_run(experiment_id(client, EXPERIMENT), run_name=run_name, tags=tags).info.run_id)
    try:
        log_batch(client, run_id, flat({**settings.model_dump(mode="json"), "detector": made.detector}), made.metrics)
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "report.md").write_text(report(made) + "\n", encoding="utf-8")
            client.log_artifacts(run_id, temporary)
        info = flavor.log_model(made.folder, run_id=run_id, registered_model_name=name)
        version = str(info.registered_model_version)
        for key, value in origin.items():
            client.set_model_version_tag(name, version, key, value)
        decision = f"version {version} is {ALIAS}: the run was told to promote it"
        if settings.promote:
            client.set_registered_model_alias(name, ALIAS, version)
        else:
            decision = f"the alias {ALIAS} stays where it was: the run was not told to promote version {version}"
        client.set_model_version_tag(name, version, "champion_decision", decision)
        client.update_model_version(name, version, report(made))
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return f"models:/{name}/{version}"


def report(made: Recalibrated) -> str:
    """What it is, and what it changes, as Markdown."""
    found = made.metrics
    rows = [
        ("alpha", *(f"{percent(found[f'alpha_{when}'])} %" for when in ("before", "after"))),
        (
            "threshold of other classes",
            *(f"{found[f'threshold_{when}']:.5g}" for when in ("before", "after")),
        ),
        (
            "classes with thresholds of their own",
            *(f"{found[f'classes_of_their_own_{when}']:g}" for when in ("before", "after")),
        ),
    ]
    start = "validation_rejected_before/"
    for dataset in (key.removeprefix(start) for key in found if key.startswith(start)):
        rates = (f"{percent(found[f'validation_rejected_{when}/{dataset}'])} %" for when in ("before", "after"))
        rows.append((f"validation, {dataset}: rejected", *rates))
    return "\n".join(
        [
            f"`{made.row}` of `{made.benchmark}`, calibrated anew on {made.images:,} images of "
            f"`{made.settings.images}`; it was made of {made.detector}.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *(f"| {name} | {before} | {after} |" for name, before, after in rows),
        ]
    )
