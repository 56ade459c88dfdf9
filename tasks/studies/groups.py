"""Groups of OOD images by how close they are to InD: by quantiles of a row's scores, by dataset, or as a file says."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np
import pandas as pd

from diffguard.errors import DataError, SettingError


def quantile_groups(scores: pd.Series, parts: int) -> pd.Series:
    """Parts of as equal size as can be, 1 with the lowest scores: the images that are nearest to InD.

    Args:
        scores: outlier scores by image id; ties are parted in the order of the ids.

    Returns:
        The part of each image, 1 to `parts`, by its id.

    Raises:
        SettingError: there are fewer images than parts.

    Example:
        >>> quantile_groups(pd.Series({"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0}), 2).to_dict()
        {'a': 2, 'b': 1, 'c': 1, 'd': 2}
    """
    if len(scores) < parts:
        raise SettingError(f"groups: {len(scores)} OOD images cannot make {parts} parts")
    ranks = scores.sort_index().rank(method="first")
    return np.ceil(ranks * parts / len(ranks) - 1e-9).astype(int).reindex(scores.index)


def named_groups(rows: pd.DataFrame, groups: Mapping[str, Sequence[str]], where: str) -> pd.Series:
    """The group of each image, by the name of its class, or else of its dataset.

    Args:
        rows: of the manifest; see `class_of`.
        groups: names of classes and datasets, by group.
        where: the file that says so, for messages.

    Returns:
        The group of each image, by its id.

    Raises:
        DataError: an image is in no group.
    """
    group_of = {name: group for group, names in groups.items() for name in names}
    found = class_of(rows).map(group_of).where(lambda of_class: of_class.notna(), rows["dataset"].map(group_of))
    if found.isna().any():
        row = rows.loc[found.isna()].iloc[0]
        raise DataError(
            f"{where}: {row['id']} is in no group; name its class, {class_of(rows)[row.name]!r}, or its dataset"
        )
    return pd.Series(found.to_numpy(), index=rows["id"].to_numpy())


def class_of(rows: pd.DataFrame) -> pd.Series:
    """The class of each image: the manifest's, or the folder that its file came from, or its dataset."""

    def name(row: pd.Series) -> str:
        folder = PurePath(str(row["origin"])).parent.name
        return str(row["class_name"] or folder or row["dataset"])

    return rows.apply(name, axis=1)
