"""Recalibrates a deployed detector on other InD images: a new bundle, and a new version in MLflow's registry."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import Field
from sklearn.metrics import roc_auc_score

from diffguard.deploy.bundle import check_new, hash_bundle, save_bundle
from diffguard.deploy.detector import DeployedDetector
from diffguard.deploy.recalibration import CalibrationScores, recalibrated
from diffguard.loading import open_detector
from diffguard.settings import Settings
from diffguard.version import METHOD_VERSION
from tasks.config import project
from tasks.config.params import project_code
from tasks.production.detector import default_detector
from tasks.production.images import Production
from tasks.production.report import percent
from tasks.services.registry import (
    ALIAS,
    BUNDLE_HASH,
    DECISION,
    EXTRA_FILES,
    FIGURES,
    PICTURE,
    model_name,
    picture_on_page,
    same_bundle,
    table_of_figures,
)
from tasks.services.tracking import experiment_id, flat, log_batch, logged_run, mlflow_keys, open_tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "diffguard-calibrate"

MEASURED = "test_figures"
"""The tag of a version that says whose figures on the test split it shows; none: the registry has no earlier one."""

STEP = 64
"""Images between two reports of progress."""


class Recalibration(Settings):
    """What a detector is calibrated on.

    Attributes:
        images, column, limit: see `tasks.production.images.Production`; InD images that trained nothing.
        detector: see `tasks.production.monitor.Monitoring`.
        accept: share of InD images to accept; None: as before.
        output: the new bundle's folder; None: data/<benchmark>/detectors/<date and time>.
        promote: move the alias champion to the new version. It changes the threshold, not the ranking, so nothing
            that could be measured says which is better.
        trust_code: see `tasks.production.monitor.Monitoring`.
    """

    images: str = Field(min_length=1)
    detector: str | None = None
    accept: float | None = Field(default=None, gt=0, lt=1)
    output: str | None = None
    column: str | None = None
    limit: int | None = Field(default=None, ge=1)
    promote: bool = False
    trust_code: list[str] | None = None


@dataclass(frozen=True)
class Recalibrated:
    """A new bundle.

    Attributes:
        detector: URI of the one that it was made of.
        folder: where it is.
        metrics: threshold and alpha, before and after; the share of validation images that each rejects, and the AUROC
            on them, which a combination's new z-scores may change.
    """

    settings: Recalibration
    detector: str
    bundle_hash: str | None
    folder: Path
    benchmark: str
    classifier: str
    row: str
    images: int
    metrics: dict[str, float]


def recalibrate(
    settings: Recalibration, progress: Callable[[int, int], object] = lambda done, total: None
) -> Recalibrated:
    """Score InD images and write the detector with them as its calibration images.

    Args:
        progress: called with the number of images done and in total.

    Raises:
        DataError: an image cannot be read: leaving it out would bias the false-rejection rate. Or see `Production`.
        SettingError: too few images for that false-rejection rate; or see `Production`.
        DataError, SettingError, ServiceError: see `diffguard.loading.open_detector`.
    """
    images = Production(settings.images, settings.column, settings.limit)
    if settings.output is not None:
        check_new(settings.output)
    uri = settings.detector or default_detector()
    trust = [*project_code(), *(settings.trust_code or ())]
    before = open_detector(uri, trust=trust)
    before.expect(len(images))
    scores = CalibrationScores(before)
    for done, image in enumerate(images, 1):
        scores.add(image.name, before.prepare(image.open(), image.name))
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
        before.info.classifier,
        before.info.detector,
        len(images),
        metrics,
    )


def _new_folder(benchmark: str) -> Path:
    return project.ROOT / "data" / benchmark / "detectors" / f"{datetime.now():%Y-%m-%d-%H%M%S}"


def _figures(detector: DeployedDetector, when: str) -> dict[str, float]:
    """Return the rejection rates and AUROC on validation images, which no calibration used."""
    table, conformal = detector.validation, detector.conformal
    figures = {f"alpha_{when}": detector.alpha, f"threshold_{when}": conformal.threshold()}
    figures[f"classes_of_their_own_{when}"] = float(len(conformal.thresholds))
    rejected = pd.Series(conformal.rejects(table["score"], table["predicted"]), index=table.index, dtype=float)
    for name, rates in rejected.groupby(table["dataset"]):
        figures[f"validation_rejected_{when}/{name}"] = float(rates.mean())
    is_ind = table["role"] == "ind"
    for name, rows in table[~is_ind].groupby("dataset") if is_ind.any() else ():
        both = pd.concat([table[is_ind], rows])
        figures[f"validation_auroc_{when}/{name}"] = float(roc_auc_score(both["role"] != "ind", both["score"]))
    return figures


@dataclass(frozen=True)
class _Source:
    """The registered version that has the bundle that was recalibrated, and the figures measured on it.

    Attributes:
        tags: its `FIGURES`, and `MEASURED`: whose these are.
        metrics: those of its logged model on the test split.
        picture: None: it has none.
    """

    tags: dict[str, str]
    metrics: dict[str, float]
    picture: Path | None


def _source_of(client: "MlflowClient", name: str, bundle_hash: str | None, folder: Path) -> _Source:
    """What the registry knows of a bundle; nothing of one that it does not have.

    Args:
        folder: where the picture is put.
    """
    import mlflow

    versions = client.search_model_versions(f"name = '{name}' and tag.{BUNDLE_HASH} = '{bundle_hash}'")
    if not versions:
        return _Source({MEASURED: "none"}, {}, None)
    [version, *_] = versions
    model = client.get_logged_model(str(version.source).rpartition("/")[2])
    uri = f"models:/{name}/{version.version}/{EXTRA_FILES}/{PICTURE}"
    try:
        picture = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except Exception:  # whatever the store's driver raises for what is not there
        picture = None
    # If it was recalibrated itself, its figures are those of an earlier version.
    tags = {MEASURED: f"of version {version.version}, before it was recalibrated", **version.tags}
    metrics = {metric.key: metric.value for metric in model.metrics or () if metric.key.startswith("detector/")}
    return _Source({key: tags[key] for key in (*FIGURES, MEASURED) if key in tags}, metrics, picture)


def register(bundle: Recalibrated) -> str:
    """Log a new bundle as a run in MLflow, and register it as a version of the benchmark's model.

    One that is a version already, to the byte, is not registered again; it is promoted if that is asked for.

    Returns:
        The URI of the version.

    Raises:
        ServiceError: MLflow does not answer.
    """
    import diffguard.mlflow as flavor

    client, settings, name = open_tracking(), bundle.settings, model_name(bundle.benchmark)
    if (known := same_bundle(client, name, hash_bundle(bundle.folder))) is not None:
        if settings.promote:
            client.set_registered_model_alias(name, ALIAS, known.version)
        return known.uri
    run_name = f"{datetime.now():%Y-%m-%d %H:%M:%S} · {bundle.row} on {settings.images.rstrip('/').rpartition('/')[2]}"
    origin = {
        "made_by": "diffguard/calibrate",
        "calibrated_from": bundle.detector,
        "calibrated_from_bundle": str(bundle.bundle_hash),
        "calibrated_on": f"{bundle.images} images of {settings.images}",
        "detector": bundle.row,
        "benchmark": bundle.benchmark,
        "classifier": bundle.classifier,
        "alpha": f"{bundle.metrics['alpha_after']:g}",
        "method_version": str(METHOD_VERSION),
    }
    tags = {
        "mlflow.source.name": "flows/recalibrate.py",
        "mlflow.source.type": "PROJECT",
        "mlflow.note.content": report(bundle),
        **origin,
    }
    with logged_run(client, experiment_id(client, EXPERIMENT), run_name, tags) as run_id:
        log_batch(client, run_id, flat({**settings.model_dump(mode="json"), "detector": bundle.detector}), {})
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "report.md").write_text(report(bundle) + "\n", encoding="utf-8")
            client.log_artifacts(run_id, temporary)
        with tempfile.TemporaryDirectory() as temporary:
            source = _source_of(client, name, bundle.bundle_hash, Path(temporary))
            pictures = None if source.picture is None else [str(source.picture)]
            info = flavor.log_model(
                bundle.folder,
                run_id=run_id,
                registered_model_name=name,
                extra_files=pictures,
                trust=[*project_code(), *(settings.trust_code or ())],
            )
        version = str(info.registered_model_version)
        metrics = {**source.metrics, **bundle.metrics}
        for name_of_metric, key in mlflow_keys(metrics).items():
            client.log_metric(run_id, key, metrics[name_of_metric], model_id=info.model_id)
        client.set_logged_model_tags(info.model_id, source.tags)
        for key, value in {**origin, **source.tags, BUNDLE_HASH: hash_bundle(bundle.folder)}.items():
            client.set_model_version_tag(name, version, key, value)
        client.update_model_version(name, version, _page(bundle, source, name, version))
        decision = f"version {version} is {ALIAS}: the run was told to promote it"
        if settings.promote:
            client.set_registered_model_alias(name, ALIAS, version)
        else:
            decision = f"the alias {ALIAS} stays where it was: the run was not told to promote version {version}"
        client.set_model_version_tag(name, version, DECISION, decision)
    return f"models:/{name}/{version}"


def _page(bundle: Recalibrated, source: _Source, name: str, version: str) -> str:
    """What the version's page shows: what was changed, and what is known from before."""
    lines = [report(bundle)]
    if figures := table_of_figures(source.tags):
        lines += [
            "",
            f"These figures and the picture are {source.tags[MEASURED]}. Now the threshold is another, and a "
            "combination may order images otherwise; the AUROC on validation images says how far.",
            *figures,
        ]
    if source.picture is not None:
        lines += picture_on_page(name, version)
    return "\n".join(lines)


def report(bundle: Recalibrated) -> str:
    """Return what was recalibrated and what it changes, as Markdown."""
    metrics = bundle.metrics
    rows = [
        ("alpha", *(f"{percent(metrics[f'alpha_{when}'])} %" for when in ("before", "after"))),
        (
            "threshold of other classes",
            *(f"{metrics[f'threshold_{when}']:.5g}" for when in ("before", "after")),
        ),
        (
            "classes with thresholds of their own",
            *(f"{metrics[f'classes_of_their_own_{when}']:g}" for when in ("before", "after")),
        ),
    ]
    start = "validation_rejected_before/"
    for dataset in (key.removeprefix(start) for key in metrics if key.startswith(start)):
        rates = (f"{percent(metrics[f'validation_rejected_{when}/{dataset}'])} %" for when in ("before", "after"))
        rows.append((f"validation, {dataset}: rejected", *rates))
    start = "validation_auroc_before/"
    for dataset in (key.removeprefix(start) for key in metrics if key.startswith(start)):
        aurocs = (f"{percent(metrics[f'validation_auroc_{when}/{dataset}'])} %" for when in ("before", "after"))
        rows.append((f"validation, {dataset}: AUROC", *aurocs))
    return "\n".join(
        [
            f"`{bundle.row}` of `{bundle.benchmark}`, recalibrated on {bundle.images:,} images of "
            f"`{bundle.settings.images}`; it was made of {bundle.detector}.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *(f"| {name} | {before} | {after} |" for name, before, after in rows),
        ]
    )
