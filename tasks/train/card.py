"""The card of a denoiser that was trained here: README.md in its folder, as the Hugging Face hub shows it.

It holds no date, no path and no time.
"""

import re
from collections.abc import Mapping

import pandas as pd
import yaml

from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import TrainedDenoiser
from diffguard.version import METHOD_VERSION, __version__
from tasks.config.run import Run

_ON_HUB = re.compile("[a-z0-9.-]+")
"""What the hub calls a license."""


def denoiser_card(
    run: Run,
    spec: TrainedDenoiser,
    seed: int,
    denoiser: PixelDenoiser,
    rows: pd.DataFrame,
    steps: int,
    start: str | None,
    measured: Mapping[str, float],
) -> str:
    """The card's text.

    Args:
        rows: of the manifest, of the images that it was trained on.
        steps: of this training.
        start: hash of the weights that it began with; None: random ones.
        measured: the last figures of `tasks.train.meter.Meter.measure`, on validation images, before weights are
            rounded.
    """
    channels, height, width = denoiser.image_shape
    weights = sum(weight.numel() for weight in denoiser.unet.parameters())
    head = {
        "library_name": "diffusers",
        "tags": ["diffguard", "class-conditional", "out-of-distribution-detection"],
        **({} if spec.license is None else {"license": spec.license if _ON_HUB.fullmatch(spec.license) else "other"}),
    }
    seen = steps * min(spec.batch_size, len(rows))
    settings = spec.model_dump(mode="json", exclude={"kind", "stored", "license", "checkpoint_minutes"})
    lines = [
        f"# Denoiser of `{run.benchmark.name}`",
        "",
        f"A diffusion model of {channels}×{height}×{width} images in [-1, 1] for {denoiser.num_labels} classes and "
        f"none, trained by DiffGuard {__version__} (method {METHOD_VERSION}): a Diffusers `UNet2DModel`"
        + (f" on patches of {spec.patch}×{spec.patch} pixels (`pixel_unshuffle`)" if spec.patch > 1 else "")
        + f", {weights:,} parameters in {spec.stored}"
        + (", averaged over the training" if spec.ema else "")
        + f"; it predicts {spec.prediction_type}.",
        "",
        "`diffguard.models.denoisers.loading.load_denoiser(folder)` opens it; label "
        f"{denoiser.null_label} stands for none.",
        "",
        "## Data",
        f"{len(rows):,} images, split train of "
        f"{', '.join(f'`{name}`' for name in sorted(rows['dataset'].unique()))}; labels in this order: "
        f"{', '.join(str(name) for name in run.classes)}.",
        "",
        "## Training",
        f"Seed {seed}, {steps:,} steps, {seen:,} images ({seen / len(rows):.1f} epochs), "
        + ("from random weights." if start is None else f"from the weights with the hash {start}."),
        "",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False, default_flow_style=None).strip(),
        "```",
        "",
        "## Figures",
        *(_figures(measured) or ["None were measured: the benchmark has no InD validation images."]),
        "",
        "## License",
        spec.license or "None is given: ask whoever trained it, and see what its images allow.",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n" + "\n".join(lines) + "\n"


def _figures(measured: Mapping[str, float]) -> list[str]:
    if not measured:
        return []
    rows = [f"| {_in_words(name)} | {100 * value:.1f} |" for name, value in measured.items()]
    return ["| on validation images | % |", "|---|---|", *rows]


def _in_words(name: str) -> str:
    """Of a curve of the meter, as validation/near_auroc/label-gain."""
    what, _, row = name.removeprefix("validation/").partition("/")
    words = what.replace("_", " ").replace("auroc", "AUROC").replace("as classifier", "as a classifier")
    return f"{words} of `{row}`" if row else words
