"""The picture of README.md: what a finished run's detector sees in one InD and one OOD image of the test split.

    python experiments/picture.py [--data data/digits] [--ind FILE] [--ood FILE] [--output docs/images/verdicts.png]

For each image a row: the image, its reconstruction under the predicted label, and how far they are apart; and where
its score lies among those of the InD calibration images.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from diffguard.images import read_picture
from diffguard.loading import open_detector
from tasks.common.console import run_stage
from tasks.config.project import ROOT

IND_COLOR, OOD_COLOR, CALIBRATION_COLOR = "#1a7f37", "#b3261e", "#c9ced6"


def show(axes: Axes, pixels: np.ndarray, title: str, colors: str = "gray", limit: float = 1.0) -> None:
    axes.imshow(pixels, cmap=colors, vmin=0, vmax=limit, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "digits", help="of a finished run")
    parser.add_argument("--ind", default="digits-0-5/test/00102.png", metavar="FILE")
    parser.add_argument("--ood", default="digits-6-8/test/00003.png", metavar="FILE")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "verdicts.png")
    options = parser.parse_args()
    detector = open_detector(options.data / "detector")
    calibration = detector.calibration[detector.column(detector.info.detector)].to_numpy()
    figure = plt.figure(figsize=(9.6, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=[1, 1, 1, 2.3])
    for row, (kind, file) in enumerate((("in-distribution", options.ind), ("out-of-distribution", options.ood))):
        image = detector.prepare(read_picture(options.data / "images" / file))
        [decision] = detector.decide(image[None], reconstructions=True)
        assert decision.reconstruction is not None
        pixels, reconstruction = image[0].numpy(), decision.reconstruction[0].cpu().numpy()
        color = OOD_COLOR if decision.is_ood else IND_COLOR
        axes = [figure.add_subplot(grid[row, column]) for column in range(4)]
        axes[0].set_ylabel(kind, fontsize=10)
        show(axes[0], pixels, "image")
        show(axes[1], reconstruction, f"regenerated as “{decision.class_name}”")
        show(axes[2], np.abs(reconstruction - pixels), "difference", "magma", 0.5)
        axes[3].hist(calibration, bins=30, color=CALIBRATION_COLOR, label="InD calibration images")
        axes[3].axvline(decision.score, color=color, linewidth=2.5, label="this image")
        verdict = "OOD" if decision.is_ood else "InD"
        title = f"{verdict}: score {decision.score:.3f}, p-value {decision.p_value:.2g}"
        axes[3].set_title(title, color=color, fontsize=11, fontweight="bold")
        axes[3].set_yticks([])
        axes[3].set_xlim(0, 1.15 * max(calibration.max(), 0.07))
        axes[3].spines[["top", "right", "left"]].set_visible(False)
        axes[3].set_xlabel("outlier score" if row else "")
        if row == 0:
            axes[3].legend(fontsize=8, frameon=False, loc="upper right")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=110)
    print(options.output)


if __name__ == "__main__":
    run_stage(main)
