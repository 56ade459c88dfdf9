"""The command `diffguard`: scores of image files under a trained pair of models."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffguard import __version__
from diffguard.errors import DataError, DiffGuardError

if TYPE_CHECKING:
    from torch import Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can mend is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="diffguard", description="Out-of-distribution detection for classifiers.")
    parser.add_argument("--version", action="version", version=f"diffguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="score image files: higher = more OOD")
    score.add_argument("paths", nargs="+", type=Path, help="image files")
    score.add_argument("--classifier", type=Path, required=True, help="a .safetensors file that DiffGuard saved")
    score.add_argument("--denoiser", type=Path, required=True, help="a folder in Diffusers' layout")
    score.add_argument("--variant", default="{}", help="JSON of settings in place of the default variant's")
    score.add_argument("--threshold", type=float, help="a score above it is OOD; exit code 3 if any is")
    options = parser.parse_args(arguments)
    try:
        found_ood = score_files(options.paths, options.classifier, options.denoiser, options.variant, options.threshold)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    sys.exit(3 if found_ood else 0)


def score_files(paths: Sequence[Path], classifier: Path, denoiser: Path, variant: str, threshold: float | None) -> bool:
    """Print one line an image: path, predicted label, score, verdict.

    Returns:
        Whether any image is OOD.
    """
    import torch

    from diffguard.classifiers import load_classifier
    from diffguard.denoisers import load_denoiser
    from diffguard.detector import DiffGuard, verdicts
    from diffguard.settings import DEFAULT_VARIANT, Variant, parse_settings

    try:
        changes = json.loads(variant)
    except json.JSONDecodeError as error:
        raise DataError(f"--variant: not JSON ({error})") from None
    if not isinstance(changes, dict):
        raise DataError("--variant: not a JSON object")
    settings = parse_settings(Variant, {**DEFAULT_VARIANT.model_dump(), **changes}, "--variant")
    if settings.needs_fit:
        raise DataError("--variant: stop.median_at needs calibration images; give stop.thresholds")
    detector = DiffGuard(load_classifier(classifier), load_denoiser(denoiser), settings)
    detector.threshold = threshold
    images = torch.stack([read_image(path, detector.denoiser.image_shape) for path in paths])
    found = verdicts(detector, images)
    for path, verdict in zip(paths, found, strict=True):
        decision = "" if verdict.is_ood is None else ("\tOOD" if verdict.is_ood else "\tInD")
        print(f"{path}\tlabel {verdict.label}\tscore {verdict.score:.5g}{decision}")
    return any(verdict.is_ood for verdict in found)


def read_image(path: Path, shape: tuple[int, int, int]) -> "Tensor":
    """An image file as [C, H, W] in [0, 1].

    Raises:
        DataError: the file cannot be read, or is not of this shape.
    """
    import numpy as np
    import torch
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: the image cannot be read ({error})") from None
    if pixels.shape[:2] != (height, width):
        raise DataError(f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels; the denoiser takes {width}x{height}")
    tensor = torch.from_numpy(pixels).float() / 255
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


if __name__ == "__main__":
    main()
