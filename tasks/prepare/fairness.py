"""Dataset bias: whether InD and OOD files differ in properties that have nothing to do with their content."""

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from diffguard.settings import ImageFormat
from tasks.config.run import Run
from tasks.models.first_stage import seen_datasets

PROPERTIES = {
    "source_width": "width",
    "source_height": "height",
    "source_quality": "JPEG quality",
    "source_bytes": "file size",
}
SIDES = ["source_width", "source_height"]
WORST = 0.75
"""AUROC of one such property alone, in either direction, from which a warning is given."""


def dataset_warnings(run: Run, manifest: pd.DataFrame | None = None) -> list[str]:
    """Return a line for each thing that makes figures on an OOD dataset of a run say less than they seem to.

    Args:
        manifest: in place of the run's own; see `unfair`.
    """
    return [*unfair(run.manifest if manifest is None else manifest, run.benchmark.image), *seen_datasets(run)]


def unfair(manifest: pd.DataFrame, form: ImageFormat) -> list[str]:
    """Return a warning for each file property that separates an OOD dataset from the InD images.

    A detector may exploit it, and its figures then say nothing about what images show. Sizes count as what they
    become: files that are enlarged to the benchmark's format are smoother than files that have its size.

    Args:
        manifest: as the stage prepare wrote it; images that were drawn, not read, have no file.
        form: that the files were brought to.
    """
    warnings = []
    stored = manifest[manifest["split"] != "train"]
    ind = stored[stored["role"] == "ind"]
    for name, ood in stored[stored["role"] != "ind"].groupby("dataset", sort=False):
        formats = [sorted({file_format or "drawn" for file_format in rows["source_format"]}) for rows in (ind, ood)]
        if formats[0] != formats[1]:
            warnings.append(f"{name}: its files are {' and '.join(formats[1])}, InD's {' and '.join(formats[0])}")
        if resizing := _other_resizing(ind, ood, form):
            warnings.append(f"{name}: {resizing}")
        for column, title in PROPERTIES.items():
            if (resizing and column in SIDES) or (ind[column] == 0).all() or (ood[column] == 0).all():
                continue
            if (auroc := _separation(ind[column], ood[column])) >= WORST:
                warnings.append(
                    f"{name}: {title} alone tells it from InD with AUROC {100 * auroc:.0f} % "
                    f"(median {ood[column].median():g}, InD {ind[column].median():g})"
                )
    return warnings


def _separation(ind: pd.Series, ood: pd.Series) -> float:
    """AUROC of a property as a score, in the direction that separates better."""
    auroc = float(roc_auc_score([0] * len(ind) + [1] * len(ood), [*ind, *ood]))
    return max(auroc, 1 - auroc)


def _other_resizing(ind: pd.DataFrame, ood: pd.DataFrame, form: ImageFormat) -> str:
    """Say how OOD files are resized and how InD ones are, if that separates them; "" if it does not."""
    if (ind[SIDES] == 0).to_numpy().any() or (ood[SIDES] == 0).to_numpy().any():
        return ""
    # The short side is what is brought to a length; EXIF's orientation, which swaps the sides, does not matter.
    factors = [(form.resize or form.size) / rows[SIDES].min(axis=1) for rows in (ind, ood)]
    # OOD files on both sides of InD's factor, enlarged and shrunk, are found by their distance to it.
    distances = [np.log(values / factors[0].median()).abs() for values in factors]
    auroc = max(_separation(*factors), _separation(*distances))
    if auroc < WORST:
        return ""
    return (
        f"{_size(ood)} files are {_resizing(factors[1])}, InD's of {_size(ind)} are {_resizing(factors[0])}: "
        f"smoothness alone tells them apart (AUROC of the factor {100 * auroc:.0f} %); bring InD's files through the "
        "same resizing first, or hold every figure against that of the row complexity, the control"
    )


def _size(rows: pd.DataFrame) -> str:
    """Width and height of files, or how far they go."""
    sizes = rows[SIDES].drop_duplicates()
    if len(sizes) == 1:
        return "{}x{}".format(*sizes.iloc[0])
    return "{}x{} to {}x{}".format(*rows[SIDES].min(), *rows[SIDES].max())


def _resizing(factors: pd.Series) -> str:
    """What becomes of files: native, or enlarged or shrunk by how much; of nine in ten if the factors differ."""
    low, high = (factors.quantile(share, interpolation="nearest") for share in (0.05, 0.95))
    texts = [_factor(low), _factor(high)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _factor(factor: float) -> str:
    """A factor in words.

    Example:
        >>> _factor(32 / 28), _factor(1.0), _factor(32 / 128)
        ('enlarged 1.14x', 'native', 'shrunk 4x')
    """
    if factor == 1:
        return "native"
    return f"enlarged {factor:.3g}x" if factor > 1 else f"shrunk {1 / factor:.3g}x"
