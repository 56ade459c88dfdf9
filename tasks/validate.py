"""Stage validate: Great Expectations over the manifest and over score tables.

A failed rule stops the flow; the message says the rule and the rows that break it.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from diffguard.errors import DataError
from diffguard.utils.hashing import hash_file
from tasks.config.benchmark import SPLITS

if TYPE_CHECKING:
    from great_expectations.expectations.expectation import Expectation

MANIFEST_COLUMNS = ("id", "path", "dataset", "role", "split", "label", "content_hash")
SCORE_COLUMNS = ("id", "dataset", "role", "split", "label", "predicted", "score", "steps", "variant")


def validate_manifest(
    manifest: pd.DataFrame, root: Path, image_size: int, mode: str, classes: int, docs: Path | None = None
) -> None:
    """Check a manifest and the image files that it names.

    Args:
        root: the folder that its paths start from.
        image_size, mode: side in pixels and Pillow mode that every image must have.
        classes: how many InD labels there are.
        docs: where to build the Data Docs site.

    Raises:
        DataError: a rule fails; the message names it and the rows.
    """
    _has_columns("manifest", manifest, MANIFEST_COLUMNS)
    rules = _manifest_rules(image_size, mode, classes, _expected_pairs(manifest))
    if failed := _check("manifest", _with_file_facts(manifest, root, classes), rules, "id", docs):
        raise DataError("manifest: " + "; ".join(failed))


def validate_scores(tables: Mapping[str, pd.DataFrame], expected_ids: Iterable[str], docs: Path | None = None) -> None:
    """Check score tables, by what each is called in messages.

    Args:
        expected_ids: the ids that every table must have, each once.
        docs: where to build the Data Docs site.

    Raises:
        DataError: a rule fails; the message names the table, the rule and the rows.
    """
    expected = list(expected_ids)
    for name, table in tables.items():
        _has_columns(name, table, SCORE_COLUMNS)
    # One frame for all: Great Expectations takes seconds a run, whatever its length.
    frame = pd.concat([_with_missing(name, table, expected) for name, table in tables.items()], ignore_index=True)
    if failed := _check("scores", frame, _score_rules(), "row", docs):
        raise DataError("; ".join(failed))


def _expected_pairs(manifest: pd.DataFrame) -> list[str]:
    """Split and class, where a split's share of the class is two images or more."""
    ind = manifest[manifest["role"] == "ind"]
    labels, splits = ind["label"].value_counts().sort_index(), ind["split"].value_counts()
    return [
        f"{split} {label}"
        for split in SPLITS
        for label, images in labels.items()
        if images * splits.get(split, 0) >= 2 * len(ind)
    ]


def _manifest_rules(image_size: int, mode: str, classes: int, pairs: list[str]) -> dict[str, "Expectation"]:
    import great_expectations.expectations as gxe

    return {
        "ids are there": gxe.ExpectColumnValuesToNotBeNull(column="id"),
        "ids are unique": gxe.ExpectColumnValuesToBeUnique(column="id"),
        "files can be read": gxe.ExpectColumnValuesToBeInSet(column="readable", value_set=[True]),
        "files are as recorded": gxe.ExpectColumnValuesToBeInSet(column="as_recorded", value_set=[True]),
        f"images are {image_size}x{image_size}": gxe.ExpectColumnValuesToBeInSet(
            column="size", value_set=[f"{image_size}x{image_size}"]
        ),
        f"images are of mode {mode}": gxe.ExpectColumnValuesToBeInSet(column="mode", value_set=[mode]),
        "roles are known": gxe.ExpectColumnValuesToBeInSet(column="role", value_set=["ind", "near", "far"]),
        "splits are known": gxe.ExpectColumnValuesToBeInSet(column="split", value_set=list(SPLITS)),
        f"labels are 0..{classes - 1} of InD, -1 of OOD": gxe.ExpectColumnValuesToBeInSet(
            column="label_fits", value_set=[True]
        ),
        "OOD is only in validation and test": gxe.ExpectColumnValuesToBeInSet(
            column="split_fits_role", value_set=[True]
        ),
        "an OOD dataset is in one split only": gxe.ExpectColumnValuesToBeInSet(
            column="splits_of_ood_dataset", value_set=[0, 1]
        ),
        "no image is in two splits": gxe.ExpectColumnValuesToBeInSet(column="splits_of_image", value_set=[1]),
        "no image is both InD and OOD": gxe.ExpectColumnValuesToBeInSet(column="sides_of_image", value_set=[1]),
        "every split has every InD class that is large enough": gxe.ExpectColumnDistinctValuesToContainSet(
            column="split_and_class", value_set=pairs
        ),
    }


def _score_rules() -> dict[str, "Expectation"]:
    import great_expectations.expectations as gxe

    return {
        "every image has a row": gxe.ExpectColumnValuesToBeInSet(column="present", value_set=[True]),
        "rows are of the run's images": gxe.ExpectColumnValuesToBeInSet(column="known", value_set=[True]),
        "no image has two rows": gxe.ExpectColumnValuesToBeUnique(column="row"),
        "scores are finite": gxe.ExpectColumnValuesToBeInSet(column="finite", value_set=[True]),
        "predictions are there": gxe.ExpectColumnValuesToNotBeNull(column="predicted"),
    }


def _with_file_facts(manifest: pd.DataFrame, root: Path, classes: int) -> pd.DataFrame:
    """The manifest with a column for each thing that a rule asks of files, labels and duplicates."""
    recorded = zip(manifest["path"], manifest["content_hash"], strict=True)
    facts = [_file_facts(root / path, digest) for path, digest in recorded]
    frame = manifest.reset_index(drop=True).join(
        pd.DataFrame(facts, columns=["readable", "as_recorded", "size", "mode"])
    )
    is_ind = frame["role"] == "ind"
    frame["label_fits"] = np.where(is_ind, frame["label"].isin(range(classes)), frame["label"] == -1)
    frame["split_fits_role"] = is_ind | frame["split"].isin(["validation", "test"])
    splits_of_dataset = frame.groupby("dataset")["split"].transform("nunique")
    frame["splits_of_ood_dataset"] = splits_of_dataset.where(~is_ind, 0)
    frame["splits_of_image"] = frame.groupby("content_hash")["split"].transform("nunique")
    frame["sides_of_image"] = is_ind.groupby(frame["content_hash"]).transform("nunique")
    frame["split_and_class"] = (frame["split"] + " " + frame["label"].astype(str)).where(is_ind, "OOD")
    return frame


def _file_facts(path: Path, recorded: str) -> tuple[bool, bool, str, str]:
    try:
        with Image.open(path) as image:
            image.load()
            size, mode = f"{image.width}x{image.height}", image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        # Of an unreadable file the other rules have nothing to say.
        return False, True, "", ""
    return True, hash_file(path) == recorded, size, mode


def _with_missing(name: str, table: pd.DataFrame, expected: list[str]) -> pd.DataFrame:
    """The table with what a rule asks of each row, and a marked row for each image that it lacks."""
    frame = table[["id", "predicted", "score"]].copy()
    frame["present"], frame["known"] = True, frame["id"].isin(expected)
    frame["finite"] = np.isfinite(frame["score"].astype(float))
    missing = pd.DataFrame({"id": sorted(set(expected) - set(frame["id"]))})
    if len(missing):
        filler = missing.assign(predicted=0, score=0.0, present=False, known=True, finite=True)
        frame = pd.concat([frame, filler], ignore_index=True)
    frame["row"] = name + ": " + frame["id"].astype(str)
    return frame


def _has_columns(name: str, frame: pd.DataFrame, columns: Iterable[str]) -> None:
    if missing := [column for column in columns if column not in frame.columns]:
        raise DataError(f"{name}: the column {missing[0]} is missing")


def _check(
    name: str, frame: pd.DataFrame, rules: Mapping[str, "Expectation"], key: str, docs: Path | None
) -> list[str]:
    """Validate a frame against the rules; what failed, in words, with the key of each row that breaks it."""
    gx, context = _context(docs)
    suite = context.suites.add(gx.ExpectationSuite(name=name))
    for words, rule in rules.items():
        rule.notes, rule.meta = words, {"rule": words}
        suite.add_expectation(rule)
    asset = context.data_sources.add_pandas(name).add_dataframe_asset(name)
    batch = asset.add_batch_definition_whole_dataframe(name)
    validation = gx.ValidationDefinition(name=name, data=batch, suite=suite)
    result = context.validation_definitions.add(validation).run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [key]},
    )
    if docs is not None:
        context.build_data_docs()
    return [_describe(outcome, key) for outcome in result.results if not outcome.success]


def _describe(result: Any, key: str) -> str:
    """The rule in words, and at most five of the rows that break it."""
    words, details = result.expectation_config.meta["rule"], result.result
    if "partial_missing_list" in details:
        rows = [f"no {value}" for value in details["partial_missing_list"]]
    else:
        indices = details.get("unexpected_index_list") or []
        rows = list(dict.fromkeys(str(index[key]) for index in indices))
    if not rows:
        rows = ["no row named"]
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"not so that {words}: {', '.join(rows[:5])}{more}"


def _context(docs: Path | None) -> tuple[Any, Any]:
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False, "metric_calculations": False}
    for site in list(context.get_site_names()):
        context.delete_data_docs_site(site)
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        context.add_data_docs_site(
            site_name="docs",
            site_config={
                "class_name": "SiteBuilder",
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
                "store_backend": {
                    "class_name": "TupleFilesystemStoreBackend",
                    "base_directory": str(docs),
                },
            },
        )
    return gx, context
