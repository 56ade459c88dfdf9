"""What people look at: grids of reconstructions, and curves of one detector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import roc_curve

from diffguard.calibration.conformal import Conformal
from diffguard.deploy.explanation import brightening
from diffguard.utils.names import label_name
from tasks.evaluate.report import Metrics
from tasks.score.store import Samples

COLUMNS = ("input", "unconditional", "reconstruction")
CELL, GAP, LINE = 96, 6, 16
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
    cell = _side(samples.input.shape[-1])
    pictures = (len(COLUMNS) + 1) * (cell + GAP)
    canvas = Image.new("RGB", (pictures + 150, 24 + len(rows) * (cell + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    difference = np.abs(samples.input.astype(int) - samples.reconstruction.astype(int))
    times = brightening(difference / 255)
    difference = (times * difference).clip(max=255).astype(np.uint8)
    for column, title in enumerate((*COLUMNS, f"difference ×{times}" if times > 1 else "difference")):
        draw.text((column * (cell + GAP) + cell / 2, 12), title, fill=INK, font=font, anchor="mm")
    images = (samples.input, samples.unconditional, samples.reconstruction, difference)
    for number, row in enumerate(rows.itertuples()):
        top = 24 + number * (cell + GAP)
        for column, each in enumerate(images):
            canvas.paste(_cell(each[number], cell), (column * (cell + GAP), top))
        is_ood = rejected[number]
        lines = [
            (str(row.dataset), FAINT),
            (f"predicted {label_name(classes, row.predicted)}", INK),
            (f"score {row.score:.4g}", FAINT),
            ("OOD" if is_ood else "InD", OOD_RED if is_ood else IND_GREEN),
        ]
        for place, (text, color) in enumerate(lines):
            position = (pictures + 4, top + cell / 2 + (place - 1.5) * LINE)
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


def auroc_by_cost(metrics: Metrics, costs: Mapping[str, Mapping[str, float | None]], title: str, path: Path) -> None:
    """Near AUROC of each row, with its interval, by network evaluations per image, as a PNG; a panel a classifier.

    Named are the rows that no other one is at least as good and as cheap as. Rows whose cost is not known, and, of a
    benchmark without near-OOD, all, are left out.

    Args:
        costs: network evaluations per image, by classifier and row.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(5.6 * len(metrics), 4.6), dpi=90, layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (classifier, rows) in zip(panels, metrics.items(), strict=True):
        shown = {
            name: (cost, {part: 100 * (1 - row["near"]["auroc"][part]) for part in ("value", "low", "high")})
            for name, row in rows.items()
            if "near" in row and (cost := costs[classifier][name]) is not None
        }
        least = np.inf
        for name, (cost, lack) in sorted(shown.items(), key=lambda item: (item[1][0], item[1][1]["value"])):
            value, most, fewest = (max(lack[part], 0.01) for part in ("value", "low", "high"))
            leads = value < least
            least = min(least, value)
            color = IND_GREEN if leads else FAINT
            bar = [[value - fewest], [most - value]]
            axes.errorbar(cost, value, bar, fmt="o", ms=4, color=color, lw=0.8, alpha=1 if leads else 0.5)
            if leads:
                near_edge = cost > 10
                place = {"xytext": (-6 if near_edge else 6, 5), "ha": "right" if near_edge else "left"}
                axes.annotate(name, (cost, value), textcoords="offset points", fontsize=8, color=INK, **place)
        # What AUROC lacks to 100 % by its logarithm: between 90 and 99.9 lies what people choose by.
        axes.set_yscale("log")
        axes.invert_yaxis()
        ticks = (50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05)
        low, high = sorted(axes.get_ylim())
        axes.set_yticks([tick for tick in ticks if low <= tick <= high])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda lack, _: f"{100 - lack:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xscale("symlog", linthresh=1)
        most_evaluations = max((cost for cost, _ in shown.values()), default=1)
        axes.set_xticks([tick for tick in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= most_evaluations])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:g}"))
        axes.set_xlim(-0.3, 1.4 * max(most_evaluations, 1))
        axes.set(title=classifier, xlabel="network evaluations per image", ylabel="near AUROC, %")
        axes.grid(color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(f"{title}: near AUROC by cost; named is what nothing cheaper reaches", fontsize=10)
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


def _side(size: int) -> int:
    """Of a cell in pixels, for images of this side: small ones are enlarged by a whole number of times."""
    return min(size, 2 * CELL) if size > CELL else size * round(CELL / size)


def _cell(image: NDArray[Any], side: int) -> Image.Image:
    """[C, H, W] uint8; enlarged by nearest neighbour, so that every pixel can be seen."""
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    kind = Image.Resampling.NEAREST if side >= len(pixels) else Image.Resampling.BOX
    return Image.fromarray(pixels).convert("RGB").resize((side, side), kind)
