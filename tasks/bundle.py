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
from diffguard.detectors.combination import Combined
from diffguard.detectors.parts import stored_view
from diffguard.errors import SettingError
from diffguard.models.folder import read_reference
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
    combined = _combined(run, tables, name, classifier, seed)
    combine = {row: run.params.combine[row] for row in run.params.combine if row in combined}
    rows = dict.fromkeys([*(member for each in combined.values() for member in each.members), name])
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
        combined={row: combined[row].to_json() for row in combine},
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


def _combined(run: Run, tables: Tables, name: str, classifier: str, seed: int) -> dict[str, Combined]:
    """The combinations that a row is made of, itself included, without candidates that were not chosen."""
    if name not in run.params.combine:
        return {}
    combined = fitted(run, tables, classifier, name, seed)
    of_members = (_combined(run, tables, member, classifier, seed) for member in combined.members)
    return {row: each for of_member in of_members for row, each in of_member.items()} | {name: combined}


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
