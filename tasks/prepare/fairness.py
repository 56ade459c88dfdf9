"""Dataset bias: whether InD and OOD files differ in properties that have nothing to do with their content."""

import pandas as pd
from sklearn.metrics import roc_auc_score

PROPERTIES = {
    "source_width": "width",
    "source_height": "height",
    "source_quality": "JPEG quality",
    "source_bytes": "file size",
}
WORST = 0.75
"""AUROC of one such property alone, in either direction, from which a warning is given."""


def unfair(manifest: pd.DataFrame) -> list[str]:
    """Return a warning for each file property that separates an OOD dataset from the InD images.

    A detector may exploit it, and its figures then say nothing about what images show.

    Args:
        manifest: as the stage prepare wrote it; images that were drawn, not read, have no file.
    """
    warnings = []
    stored = manifest[manifest["split"] != "train"]
    ind = stored[stored["role"] == "ind"]
    for name, ood in stored[stored["role"] != "ind"].groupby("dataset", sort=False):
        formats = [sorted({file_format or "drawn" for file_format in rows["source_format"]}) for rows in (ind, ood)]
        if formats[0] != formats[1]:
            warnings.append(f"{name}: its files are {' and '.join(formats[1])}, InD's {' and '.join(formats[0])}")
        for column, title in PROPERTIES.items():
            if (ind[column] == 0).all() or (ood[column] == 0).all():
                continue
            truth = [0] * len(ind) + [1] * len(ood)
            auroc = roc_auc_score(truth, [*ind[column], *ood[column]])
            if max(auroc, 1 - auroc) >= WORST:
                warnings.append(
                    f"{name}: {title} alone tells it from InD with AUROC {100 * max(auroc, 1 - auroc):.0f} % "
                    f"(median {ood[column].median():g}, InD {ind[column].median():g})"
                )
    return warnings
