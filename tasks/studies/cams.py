"""Where the classifier of each run looks: GradCAM maps of a few test images."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffguard.models.classifiers.base import predict_logits
from diffguard.models.gradcam import cam_maps
from tasks.common.devices import leased_device
from tasks.config.run import Run
from tasks.models.loaded import load_models
from tasks.studies.figure import DPI, STYLE
from tasks.studies.points import Planned


def draw_cams(path: Path, planned: Planned, count: int) -> None:
    """A row for each run and classifier, a column for each image; maps are of the predicted label.

    Args:
        count: how many InD images, and as many near-OOD ones, or far-OOD if there are none.
    """
    import matplotlib
    from matplotlib.figure import Figure

    first = planned.open(planned.points[0].run)
    rows = _images(first, count)
    maps = {
        (key, classifier): _maps(planned.open(key), classifier, rows)
        for key in planned.runs
        for classifier in first.params.classifiers
    }
    side = 1.15
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        canvas = Figure(figsize=(side * len(rows), side * 1.2 * len(maps)), dpi=DPI, layout="constrained")
        grid = canvas.subplots(len(maps), len(rows), squeeze=False)
        for of_run, ((key, classifier), (images, cams, predicted)) in zip(grid, maps.items(), strict=True):
            for axes, image, cam, label, role in zip(of_run, images, cams, predicted, rows["role"], strict=True):
                axes.imshow(image, cmap="gray", vmin=0, vmax=1)
                axes.imshow(cam, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.set_title(f"{'InD' if role == 'ind' else role}: {first.classes[label]}", fontsize=7)
            of_run[0].set_ylabel(key or classifier)
        canvas.savefig(path, metadata={"Software": None})


CAPTION = (
    "GradCAM maps of the predicted label, which is over each image, on InD and OOD test images; bright is where the "
    "classifier looks, and where a variant with a mask (`cam_cut`) guides."
)


def _images(run: Run, count: int) -> pd.DataFrame:
    """InD and OOD test images, chosen by content hash."""
    test = run.scored[run.scored["split"] == "test"].sort_values("content_hash")
    roles = ("ind", "near" if (test["role"] == "near").any() else "far")
    return pd.concat([test[test["role"] == role].head(count) for role in roles])


def _maps(
    run: Run, classifier: str, rows: pd.DataFrame
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Images [N, H, W(, 3)] and their maps [N, H, W], in [0, 1], and predicted labels."""
    with leased_device() as device:
        models = load_models(run, run.params.seeds[0], device)
        images = models.read(rows)
        predicted = predict_logits(models.classifiers[classifier], images).argmax(dim=1)
        maps = cam_maps(models.classifiers[classifier], images, predicted)
    shown = images.cpu().numpy().transpose(0, 2, 3, 1)
    return shown[..., 0] if shown.shape[-1] == 1 else shown, maps.cpu().numpy(), predicted.cpu().numpy()
