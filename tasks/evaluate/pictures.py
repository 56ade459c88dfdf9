"""What people look at: grids of reconstructions, and curves of one detector."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import roc_curve

from diffguard.calibration.conformal import Conformal
from diffguard.utils.names import label_name
from tasks.score.store import Samples

COLUMNS = ("input", "unconditional", "reconstruction", "difference")
CELL, GAP, LINE = 84, 6, 16
INK, FAINT, OOD_RED, IND_GREEN = "#1b1b1b", "#6b6b6b", "#b3261e", "#1a7f37"


def sample_grid(samples: Samples, table: pd.DataFrame, classes: list[str], decision: Conformal) -> Image.Image:
    """One row an image: input, unconditional reconstruction, reconstruction, difference, verdict.

    Args:
        samples: the images, a row each.
        table: their score rows, in any order.
        classes: names of the labels.
        decision: on each image.
    """
    rows = table.set_index("id").loc[samples.ids]
    rejected = decision.rejects(rows["score"], rows["predicted"])
    width = len(COLUMNS) * (CELL + GAP) + 150
    canvas = Image.new("RGB", (width, 24 + len(rows) * (CELL + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for column, title in enumerate(COLUMNS):
        draw.text((column * (CELL + GAP) + CELL / 2, 12), title, fill=INK, font=font, anchor="mm")
    difference = np.abs(samples.input.astype(int) - samples.reconstruction.astype(int)).astype(np.uint8)
    images = (samples.input, samples.unconditional, samples.reconstruction, difference)
    for number, row in enumerate(rows.itertuples()):
        top = 24 + number * (CELL + GAP)
        for column, each in enumerate(images):
            canvas.paste(_cell(each[number]), (column * (CELL + GAP), top))
        is_ood = rejected[number]
        lines = [
            (str(row.dataset), FAINT),
            (f"predicted {label_name(classes, row.predicted)}", INK),
            (f"score {row.score:.4g}", FAINT),
            ("OOD" if is_ood else "InD", OOD_RED if is_ood else IND_GREEN),
        ]
        for place, (text, color) in enumerate(lines):
            position = (len(COLUMNS) * (CELL + GAP) + 4, top + CELL / 2 + (place - 1.5) * LINE)
            draw.text(position, text, fill=color, font=font, anchor="lm")
    return canvas


def curves(table: pd.DataFrame, threshold: float, title: str, path: Path) -> None:
    """ROC of each OOD dataset, and histograms of the scores with the threshold, as one PNG.

    Args:
        table: test rows of one detector.
        threshold: of all predicted classes together.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=90)
    roc, histogram = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.9, wspace=0.16)
    ind = table.loc[table["role"] == "ind", "score"]
    groups = [("InD", ind)] + [(str(n), r["score"]) for n, r in table[table["role"] != "ind"].groupby("dataset")]
    low, high = np.quantile(table["score"], [0.0, 0.99])
    bins = np.linspace(low, max(high, low + 1e-9), 40)
    for number, (name, scores) in enumerate(groups):
        color = f"C{number}"
        histogram.hist(np.minimum(scores, bins[-1]), bins, density=True, histtype="step", color=color, label=name)
        if name != "InD":
            is_ood = np.r_[np.zeros(len(ind)), np.ones(len(scores))]
            fpr, tpr, _ = roc_curve(1 - is_ood, -np.r_[ind, scores])
            roc.plot(fpr, tpr, color=color, label=name)
    histogram.axvline(threshold, color="black", linestyle=":", label="threshold")
    histogram.set(xlabel="outlier score (higher = more OOD)", ylabel="density")
    roc.set(xlabel="OOD images accepted", ylabel="InD images accepted", xlim=(0, 1), ylim=(0, 1.01))
    for axes in (roc, histogram):
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def of_dataset(samples: Samples, ids: set[str]) -> Samples:
    """The samples whose ids are among these."""
    keep = np.array([each in ids for each in samples.ids])
    return Samples(
        [each for each in samples.ids if each in ids],
        samples.input[keep],
        samples.reconstruction[keep],
        samples.unconditional[keep],
    )


def _cell(image: NDArray[Any]) -> Image.Image:
    """[C, H, W] uint8 enlarged by nearest neighbour, so that every pixel can be seen."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    return Image.fromarray(pixels).convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
