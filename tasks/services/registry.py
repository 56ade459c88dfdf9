"""MLflow's model registry: the names, tags and pages of versions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


ALIAS, DECISION = "champion", "champion_decision"
"""The alias, and the tag of every version that says why it got it, or not."""

PICTURE, EXTRA_FILES = "verdicts.png", "extra_files"
"""The stage evaluate's picture, and where MLflow puts it in a model."""

METRICS = {"auroc": "AUROC", "fpr95": "FPR@95"}
FIGURES = {f"{group}_{metric}": f"{group} {title}" for group in ("near", "far") for metric, title in METRICS.items()}
"""The headline figures, with their titles; and those of a version, as its tags have them."""

BUNDLE_HASH = "bundle_hash"
"""The tag of a version that tells which bundle it is."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    Attributes:
        is_champion: whether the alias moved to it.
        why: in words, with the figures.
    """

    name: str
    version: str
    is_champion: bool
    why: str

    @property
    def uri(self) -> str:
        """What `diffguard serve --detector` and `mlflow models serve -m` take."""
        return f"models:/{self.name}/{self.version}"


def model_name(benchmark: str) -> str:
    """The registered model of a benchmark's detectors."""
    return f"diffguard-{benchmark}"


def same_bundle(client: "MlflowClient", name: str, bundle_hash: str, parent: str = "") -> Registered | None:
    """The latest version that has this bundle; None: there is none, or it is of the run `parent` itself."""
    from mlflow.exceptions import MlflowException

    versions = client.search_model_versions(f"name = '{name}' and tag.{BUNDLE_HASH} = '{bundle_hash}'")
    if not versions or any(version.run_id == parent for version in versions):
        return None
    latest = max(versions, key=lambda version: int(version.version))
    try:
        champion = str(client.get_model_version_by_alias(name, ALIAS).version)
    except MlflowException:
        champion = None
    why = f"the bundle is version {latest.version} already, to the byte, and no new one; "
    why += f"there is no {ALIAS}" if champion is None else f"version {champion} stays {ALIAS}"
    return Registered(name, str(latest.version), champion == str(latest.version), why)


def table_of_figures(tags: Mapping[str, str]) -> list[str]:
    """Those of `FIGURES` that are among a version's tags, as lines of Markdown."""
    rows = [f"| {title} | {tags[key]} |" for key, title in FIGURES.items() if key in tags]
    return ["", "| test split | value (95 % interval) |", "|---|---|", *rows] if rows else []


def picture_on_page(name: str, version: str) -> list[str]:
    """The picture of a version that has one, as lines of Markdown."""
    path = f"model-versions/get-artifact?path={EXTRA_FILES}/{PICTURE}&name={name}&version={version}"
    return ["", f"![two images of each test dataset, and what it says of them]({path})"]
