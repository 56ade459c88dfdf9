"""Figures of monitored images: the histogram of p-values, and a grid of the most OOD images."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffguard.calibration.drift import Rejection, Uniformity
from diffguard.deploy.explanation import shortened
from tasks.evaluate.pictures import FAINT, IND_GREEN, INK, LINE, OOD_RED


def p_value_histogram(uniformity: Uniformity, rejection: Rejection, alpha: float, path: Path) -> None:
    """P-values of production images against those of InD images, which are uniform, as a PNG.

    The gray band is where 95 % of the shares of each bar lie, if the images are of the calibration images' kind.

    Args:
        alpha: p-values up to this one are rejected.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.14, top=0.77)
    bins = len(uniformity.counts)
    even, edges = 100 / bins, np.linspace(0, 1, bins + 1)
    shares = 100 * uniformity.counts / uniformity.counts.sum()
    spread = 196 * np.sqrt((1 - 1 / bins) / bins / uniformity.effective)
    axes.axhspan(max(0, even - spread), even + spread, color="#e4e4e4", label="95 % of InD samples")
    axes.axhline(even, color=FAINT, linewidth=1, label="uniform")
    is_rejected = edges[1:] <= alpha + 1e-9
    colors = np.where(is_rejected, OOD_RED, "#4a7fb5")
    axes.bar(edges[:-1], shares, 1 / bins, align="edge", color=colors, edgecolor="white", linewidth=0.6)
    axes.axvline(alpha, color=OOD_RED, linestyle=":", label=f"rejected up to {alpha:g}")
    top = 1.1 * max(shares.max(), even + spread)
    axes.set(xlim=(0, 1), ylim=(0, top), xlabel="conformal p-value (small = OOD)", ylabel="images, %")
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    title = (
        f"{100 * rejection.rate:.1f} % of {rejection.images:,} images rejected "
        f"({100 * rejection.low:.1f} to {100 * rejection.high:.1f} %), {100 * rejection.expected:g} % expected"
    )
    figure.suptitle(
        f"{title}\nKolmogorov-Smirnov {uniformity.statistic:.3f}, p = {uniformity.p_value:.2g}", fontsize=10, y=0.98
    )
    figure.savefig(path)


def ood_grid(images: list[tuple[Image.Image, Any]], columns: int = 6) -> Image.Image:
    """Images side by side, each with its file, predicted class, score, p-value and verdict under it.

    Args:
        images: pictures, with their rows: image, class_name, score, p_value, is_ood.
    """
    side, width, gap, lines = 128, 148, 10, 4
    fonts = [ImageFont.load_default(size) for size in (11, 13)]
    height = side + lines * LINE + 2 * gap
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (picture, row) in enumerate(images):
        left, top = gap + number % columns * (width + gap), gap + number // columns * height
        times = max(1, side // picture.width)
        cell = picture.convert("RGB").resize((picture.width * times,) * 2, Image.Resampling.NEAREST)
        cell.thumbnail((side, side))
        canvas.paste(cell, (left + (width - cell.width) // 2, top + (side - cell.height) // 2))
        captions = [
            (shortened(str(row.image)[::-1], 22)[::-1], FAINT, fonts[0]),
            (shortened(str(row.class_name), 20), INK, fonts[1]),
            (f"score {row.score:.4g}", FAINT, fonts[0]),
            (f"p {row.p_value:.2g}, {'OOD' if row.is_ood else 'InD'}", OOD_RED if row.is_ood else IND_GREEN, fonts[0]),
        ]
        for place, (text, color, font) in enumerate(captions):
            position = (left + width / 2, top + side + gap / 2 + (place + 0.5) * LINE)
            draw.text(position, text, fill=color, font=font, anchor="mm")
    return canvas
