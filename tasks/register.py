"""Stage register: the bundle as a version of a registered model in MLflow, and which version is champion."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diffguard.deploy.bundle import VALIDATION_FILE, check_bundle, hash_bundle
from diffguard.metrics import resample_scores
from tasks.bundle import FOLDER
from tasks.config import project
from tasks.config.run import Run
from tasks.evaluate.stage import Metrics
from tasks.services.tracking import open_tracking, taken_by_mlflow, with_interval

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from diffguard.deploy.info import DetectorInfo
from tasks.services.registry import (
    ALIAS,
    BUNDLE_HASH,
    DECISION,
    METRICS,
    PICTURE,
    Registered,
    model_name,
    picture_on_page,
    same_bundle,
    table_of_figures,
)

FEWEST = 50
"""InD and OOD validation images that a first champion needs, of either."""


@dataclass(frozen=True)
class Comparison:
    """A challenger against the champion, on validation images; see `compare`."""

    is_better: bool
    why: str


def register(run: Run, parent: str, metrics: Metrics) -> Registered:
    """Log the run's bundle as a model of its MLflow run, register it, and move the alias if it is better.

    A bundle that is a version already is not registered again.

    Args:
        parent: id of the MLflow run that `tasks.log.log` made.
        metrics: of the test split, for what the model's page shows; the alias goes by validation alone.

    Raises:
        DataError: the run has no bundle.
        ServiceError: MLflow does not answer, or takes no model.
    """
    folder = run.results / FOLDER
    info = check_bundle(folder)
    with taken_by_mlflow(f"the detector {folder.relative_to(project.ROOT)}"):
        return _register(run, folder, info, parent, metrics)


def _register(run: Run, folder: Path, info: "DetectorInfo", parent: str, metrics: Metrics) -> Registered:
    client = open_tracking()
    name, found = model_name(run.benchmark.name), metrics[info.classifier][info.detector]
    if (known := same_bundle(client, name, hash_bundle(folder), parent)) is not None:
        return known
    picture = run.results / PICTURE
    version, model_id = _logged(client, name, parent, folder, picture, run.code)
    _log_metrics(client, model_id, parent, found)
    client.set_model_version_tag(name, version, BUNDLE_HASH, hash_bundle(folder))
    _describe(client, name, version, info, found, has_picture=picture.is_file())

    # A number in some stores, text in others.
    champion = {alias: str(each) for alias, each in client.get_registered_model(name).aliases.items()}.get(ALIAS)
    if champion is None:
        table = pd.read_parquet(folder / VALIDATION_FILE)
        comparison = first_champion(table, run.params.evaluate.draws, run.params.evaluate.seed)
    elif champion == version:  # a second attempt
        why = client.get_model_version(name, version).tags.get(DECISION, f"version {version} is {ALIAS}")
        return Registered(name, version, True, why)
    else:
        mine, theirs = pd.read_parquet(folder / VALIDATION_FILE), _validation_of(name, champion)
        comparison = compare(mine, theirs, run.params.evaluate.draws, run.params.evaluate.seed)
    if comparison.is_better:
        client.set_registered_model_alias(name, ALIAS, version)
    was = "" if champion is None else f", in place of version {champion}"
    stays = f"there is no {ALIAS}" if champion is None else f"version {champion} stays {ALIAS}"
    verdict = f"version {version} is {ALIAS}{was}" if comparison.is_better else stays
    why = f"{verdict}: {comparison.why}"
    client.set_model_version_tag(name, version, DECISION, why)
    return Registered(name, version, comparison.is_better, why)


def first_champion(table: pd.DataFrame, draws: int, seed: int) -> Comparison:
    """Whether a detector may be the first champion: enough validation images, and better than chance on them.

    Args:
        table: its bundle's validation table.
        draws, seed: of the bootstrap.
    """
    ind, ood = table[table["role"] == "ind"], table[table["role"] != "ind"]
    by_hand = (
        f"a first {ALIAS} takes {FEWEST} of either; move the alias by hand, or give the benchmark a larger split "
        "validation"
    )
    if len(ind) < FEWEST or len(ood) < FEWEST:
        return Comparison(False, f"it has {len(ind)} InD and {len(ood)} OOD validation images, and {by_hand}")
    datasets = {str(name): rows["score"].to_numpy(float) for name, rows in ood.groupby("dataset")}
    drawn = resample_scores(
        [ind["score"].to_numpy(float)],
        {name: [scores] for name, scores in datasets.items()},
        {"mean": list(datasets)},
        draws=draws,
        seed=seed,
    )
    found: Any = drawn.summary()["mean"]["auroc"]
    value, low, high = (100 * found[part] for part in ("value", "low", "high"))
    is_better = low > 50
    return Comparison(
        is_better,
        f"there was no champion; on {len(ind)} InD and {len(ood)} OOD validation images its AUROC is {value:.2f} % "
        f"(95 % interval {low:.2f} to {high:.2f}), which is {'' if is_better else 'not '}above chance",
    )


def compare(challenger: pd.DataFrame, champion: pd.DataFrame | None, draws: int, seed: int) -> Comparison:
    """Whether a challenger is better: the 95 % interval of the AUROC difference, paired bootstrap, lies above 0.

    The AUROC is the mean over the OOD datasets, on the validation images that both have, by content hash.

    Args:
        challenger, champion: their bundles' validation tables; None: it cannot be read.
        draws, seed: of the bootstrap.
    """
    if champion is None:
        return Comparison(False, "the champion's validation scores cannot be read; move the alias by hand")
    for who, table in (("challenger", challenger), ("champion", champion)):
        if table.empty:
            return Comparison(
                False,
                f"the {who} has no validation images, so nothing says which is better; move the alias by hand, or "
                "give the benchmark a split validation",
            )
    columns = ["content_hash", "role", "score"]
    both = challenger.drop_duplicates("content_hash").merge(
        champion.drop_duplicates("content_hash")[columns], on="content_hash", suffixes=("", "_champion")
    )
    both = both[(both["role"] == "ind") == (both["role_champion"] == "ind")]
    ind, ood = both[both["role"] == "ind"], both[both["role"] != "ind"]
    if ind.empty or ood.empty:
        return Comparison(
            False, f"the two have {len(ind)} InD and {len(ood)} OOD validation images in common, and both are needed"
        )
    datasets = {str(name): rows for name, rows in ood.groupby("dataset")}
    sampled = [
        resample_scores(
            [ind[column].to_numpy(float)],
            {name: [rows[column].to_numpy(float)] for name, rows in datasets.items()},
            {"mean": list(datasets)},
            draws=draws,
            seed=seed,
        )
        for column in ("score", "score_champion")
    ]
    mine, theirs = (each.by_seed["mean"]["auroc"][0, 0] for each in sampled)
    found: Any = sampled[0].difference(sampled[1])["mean"]["auroc"]
    is_better = found["low"] > 0
    value, low, high = (100 * found[part] for part in ("value", "low", "high"))
    return Comparison(
        is_better,
        f"on {len(ind)} InD and {len(ood)} OOD validation images ({', '.join(datasets)}) that both have, the "
        f"challenger's AUROC is {100 * mine:.2f} %, the champion's {100 * theirs:.2f} %; the difference, {value:+.2f} "
        f"points, has the 95 % interval {low:+.2f} to {high:+.2f} (paired bootstrap), which is "
        f"{'' if is_better else 'not '}above 0",
    )


def _logged(
    client: "MlflowClient", name: str, parent: str, folder: Path, picture: Path, trust: list[str]
) -> tuple[str, str]:
    """The version of the registered model that this run made, and its logged model's id; made if it is not there."""
    import diffguard.mlflow as flavor

    there = client.search_model_versions(f"name = '{name}' and run_id = '{parent}'")
    if there:  # a second attempt; its source is models:/<id>
        return str(there[0].version), str(there[0].source).rpartition("/")[2]
    info = flavor.log_model(
        folder,
        run_id=parent,
        registered_model_name=name,
        extra_files=[str(picture)] if picture.is_file() else None,
        trust=trust,
    )
    return str(info.registered_model_version), str(info.model_id)


def _log_metrics(client: "MlflowClient", model_id: str, parent: str, found: Any) -> None:
    """The headline figures on the test split, as metrics of the logged model."""
    for group in (each for each in ("near", "far") if each in found):
        for metric in METRICS:
            for key, value in with_interval(f"detector/{group}_{metric}", found[group][metric]).items():
                client.log_metric(parent, key, value, model_id=model_id)


def _describe(
    client: "MlflowClient", name: str, version: str, info: "DetectorInfo", found: Any, *, has_picture: bool
) -> None:
    """What the version's page shows: tags, a table and a picture."""
    figures = {
        f"{group}_{metric}": "{:.1f} % ({:.1f} to {:.1f})".format(
            *(100 * found[group][metric][part] for part in ("value", "low", "high"))
        )
        for group in ("near", "far")
        if group in found
        for metric in METRICS
    }
    numbers = {
        f"{group}_{metric}.{part}": f"{found[group][metric][part]:.6f}"
        for group in ("near", "far")
        if group in found
        for metric in METRICS
        for part in ("value", "low", "high")
    }
    tags = {
        "benchmark": info.benchmark,
        "detector": info.detector,
        "classifier": info.classifier,
        "alpha": f"{info.alpha:g}",
        "method_version": str(info.method_version),
        **figures,
        **numbers,
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    lines = [
        f"`{info.detector}` guards `{info.classifier}` on `{info.benchmark}`; "
        f"it takes at most {100 * info.alpha:g} % of InD images for OOD.",
        *table_of_figures(figures),
    ]
    if has_picture:
        lines += picture_on_page(name, version)
    client.update_model_version(name, version, "\n".join(lines))
    client.update_registered_model(
        name,
        f"OOD detectors of the benchmark `{info.benchmark}`. The flow `diffguard/evaluate` moves the alias `{ALIAS}` "
        f"to the first version that is better than chance on {FEWEST} InD and {FEWEST} OOD validation images, then to "
        "one that is better than it by the paired 95 % interval of the AUROC difference.",
    )


def _validation_of(name: str, version: str) -> pd.DataFrame | None:
    """The validation table of a version's bundle; None: it cannot be had."""
    import mlflow

    uri = f"models:/{name}/{version}/{FOLDER}/{VALIDATION_FILE}"
    try:
        return pd.read_parquet(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except Exception:  # whatever the store's driver raises for what was deleted
        return None
