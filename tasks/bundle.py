"""Stage bundle: the run's default detector as a folder that can be deployed, `diffguard.deploy.bundle`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from diffguard.deploy.bundle import TABLE_COLUMNS, save_bundle
from diffguard.deploy.detector import DeployedDetector
from diffguard.deploy.info import DetectorInfo
from diffguard.detectors.baselines import needs_fit, views_of
from diffguard.detectors.parts import stored_view
from diffguard.errors import SettingError
from diffguard.models.folder import read_reference
from diffguard.settings import Combination
from diffguard.version import METHOD_VERSION, __version__
from tasks.combine import Tables, fitted, score_tables
from tasks.common.console import run_stage
from tasks.common.devices import devices
from tasks.common.files import fetched
from tasks.config.benchmark import DENOISER
from tasks.config.run import Run, open_run
from tasks.models.loaded import TrainBatches, load_models
from tasks.score.plan import Item, plan

FOLDER = "detector"
"""The bundle's folder beside the run's metrics."""


def bundle(run: Run, items: list[Item]) -> Path | None:
    """Write the bundle of the run's detector, under its first classifier and training seed.

    Returns:
        Its folder; None: the run has no row that can be deployed.
    """
    name = deployed_row(run)
    if name is None:
        return None
    tables = score_tables(run, items)
    classifier, seed = run.params.classifiers[0], run.params.seeds[0]
    folder = run.results / FOLDER
    save_bundle(_detector(run, tables, name, classifier, seed), folder)
    return folder


def deployed_row(run: Run) -> str | None:
    """The row that is deployed: params.yaml's choice, or the default, or the first of this run that can be."""
    rows = run.params.names
    chosen = run.params.bundle.detector
    if chosen in rows:
        if reason := undeployable(run, chosen):
            raise SettingError(f"params.yaml: bundle.detector: {chosen} cannot be deployed: {reason}")
        return chosen
    return next((name for name in (run.default, *rows) if undeployable(run, name) is None), None)


def undeployable(run: Run, name: str) -> str | None:
    """Why a row cannot decide on a new image; None: it can."""
    if name in run.params.combine:
        reasons = (undeployable(run, member) for member in run.params.combine[name].of)
        return next((reason for reason in reasons if reason is not None), None)
    if name in run.params.score.imported:
        return f"the scores of {name} are imported"
    variant = run.params.score.variants.get(name)
    if variant is not None and variant.label != "predicted":
        return f"{name} is told the label (label: {variant.label})"
    return None


def _detector(run: Run, tables: Tables, name: str, classifier: str, seed: int) -> DeployedDetector:
    models = load_models(run, seed, devices()[0])
    score = run.params.score
    rows = _rows_of(run, name)
    combine = {row: settings for row, settings in run.params.combine.items() if row in rows}
    baselines = {row: settings for row, settings in score.baselines.items() if row in rows}
    variants = {row: models.fitted(classifier, row) for row in score.variants if row in rows}
    info = DetectorInfo(
        diffguard=__version__,
        method_version=METHOD_VERSION,
        benchmark=run.benchmark.name,
        classifier=classifier,
        seed=seed,
        classes=tuple(run.classes),
        image=run.benchmark.image,
        alpha=round(1 - run.params.calibrate.accept, 12),
        detector=name,
        variants=variants,
        baselines=baselines,
        combine=combine,
        combined={row: fitted(run, tables, classifier, row, seed).to_json() for row in combine},
    )
    network = models.classifiers[classifier]
    views = {stored_view(baseline) for baseline in baselines.values() if needs_fit(baseline)}
    by_row = {row: tables[classifier, row, seed] for row in rows}
    specs = {
        "classifier": read_reference(fetched(run.model(seed, classifier))),
        "denoiser": read_reference(fetched(run.model(seed, DENOISER))),
    }
    return DeployedDetector(
        info,
        network,
        models.denoiser if variants else None,
        calibration=_table(run, by_row, name, lambda rows: rows["split"] == "calibration"),
        validation=_table(run, by_row, name, lambda rows: rows["split"] == "validation"),
        seen={sees: views_of(sees, network, TrainBatches(models)) for sees in sorted(views)},
        example=_example(run, by_row[name]),
        specs=specs,
        slots=score.slots,
    )


def _rows_of(run: Run, name: str) -> list[str]:
    """A row and those that it is made of."""
    settings = run.params.combine.get(name)
    members = settings.of if isinstance(settings, Combination) else ()
    return list(dict.fromkeys([*(row for member in members for row in _rows_of(run, member)), name]))


def _table(run: Run, by_row: dict[str, pd.DataFrame], name: str, chosen: Callable[[pd.DataFrame], Any]) -> pd.DataFrame:
    """Images of one split with the scores of each row; see `diffguard.deploy.detector.DeployedDetector`."""
    table = by_row[name]
    hashes = run.manifest.set_index("id")["content_hash"]
    table = table.assign(content_hash=table["id"].map(hashes))
    kept = table.loc[chosen(table), [*TABLE_COLUMNS, "score"]]
    members = {f"score/{row}": scores.loc[chosen(scores), "score"] for row, scores in by_row.items() if row != name}
    return kept.assign(**members).reset_index(drop=True)


def _example(run: Run, table: pd.DataFrame) -> Image.Image:
    """The most usual calibration image: that of the median score."""
    scores = table.loc[table["split"] == "calibration"].sort_values("score")
    wanted = scores["id"].iloc[len(scores) // 2]
    path = run.manifest.set_index("id").loc[wanted, "path"]
    with (run.home / str(path)).open("rb") as file, Image.open(file) as picture:
        return picture.copy()


def main() -> None:
    run = open_run()
    folder = bundle(run, plan(run))
    if folder is None:
        raise SettingError("bundle: none of params.yaml's rows can decide on a new image; add a variant")
    print(f"{folder}: {deployed_row(run)}, classifier {run.params.classifiers[0]}")


if __name__ == "__main__":
    run_stage(main)
