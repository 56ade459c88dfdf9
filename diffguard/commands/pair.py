"""Scores of image files under a bare pair of models, without a bundle: no calibration but a given threshold."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from diffguard.errors import DataError
from diffguard.names import readable

if TYPE_CHECKING:
    from torch import Tensor

    from diffguard.settings import Variant

OPTIONS = ("classifier", "denoiser", "variant", "threshold", "resize", "crop")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options, beside those of the command `score`."""
    group = parser.add_argument_group("without a bundle", "two models, and the settings of a score")
    group.add_argument("--classifier", help="a .safetensors file that DiffGuard saved, or package.module:name of one")
    group.add_argument("--denoiser", type=Path, help="a folder in Diffusers' layout")
    group.add_argument("--variant", help="a preset's name, or JSON of settings in place of the default variant's")
    group.add_argument("--threshold", type=float, help="a score above it is OOD; exit code 3 if any is")
    group.add_argument("--resize", type=int, help="first resize the short side to this many pixels")
    group.add_argument("--crop", type=int, help="then cut out the middle, a square of this side in pixels")


def score_files(options: argparse.Namespace) -> int:
    """Print one line an image: path, predicted label, score, verdict; returns the exit code."""
    import torch

    from diffguard.classifiers import load_classifier
    from diffguard.detector import DiffGuard, verdicts
    from diffguard.pipelines import load_denoiser
    from diffguard.utils.importing import import_object

    variant = parse_variant(options.variant or "{}")
    name = str(options.classifier)
    classifier = (
        import_object(name)() if ":" in name and not Path(name).exists() else load_classifier(name, options.trust_code)
    )
    detector = DiffGuard(classifier, load_denoiser(options.denoiser), variant)
    detector.threshold = options.threshold
    channels, side, _ = detector.denoiser.image_shape
    images = [read_image(path, channels, options.resize, options.crop) for path in options.paths]
    first = images[0].shape
    for path, image in zip(options.paths, images, strict=True):
        if variant.process_method == "none" and image.shape[1:] != (side, side):
            raise DataError(f"{path}: {image.shape[2]}x{image.shape[1]} pixels; the denoiser takes {side}x{side}")
        if image.shape != first or image.shape[1] != image.shape[2]:
            raise DataError(f"{path}: {image.shape[2]}x{image.shape[1]} pixels; give --resize and --crop")
    found = verdicts(detector, torch.stack(images))
    for path, verdict in zip(options.paths, found, strict=True):
        decision = "" if verdict.is_ood is None else ("\tOOD" if verdict.is_ood else "\tInD")
        print(f"{readable(path)}\tlabel {verdict.label}\tscore {verdict.score:.5g}{decision}")
    return 3 if any(verdict.is_ood for verdict in found) else 0


def parse_variant(text: str) -> "Variant":
    """A preset's name, or JSON of settings that replace the default variant's.

    Raises:
        SettingError: no such preset or setting. DataError: not JSON, or it needs calibration images.
    """
    from diffguard.settings import DEFAULT_VARIANT, PRESETS, Variant, parse_settings

    if text in PRESETS:
        return PRESETS[text]
    try:
        changes = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"--variant: neither a preset ({', '.join(PRESETS)}) nor JSON ({error})") from None
    if not isinstance(changes, dict):
        raise DataError("--variant: not a JSON object")
    base = {} if "preset" in changes else DEFAULT_VARIANT.model_dump()
    variant = parse_settings(Variant, {**base, **changes}, "--variant")
    if variant.needs_calibration:
        raise DataError("--variant: stop.median_at needs calibration images; give stop.thresholds")
    if variant.needs_train:
        raise DataError("--variant: distance path needs InD images to be fitted on; give path")
    return variant


def read_image(path: Path, channels: int, resize: int | None, crop: int | None) -> "Tensor":
    """An image file as [C, H, W] in [0, 1].

    Args:
        resize: the short side is brought to this many pixels first (bilinear, antialiased: Pillow's).
        crop: side of the square that is then cut out of the middle.

    Raises:
        DataError: the file cannot be read.
    """
    import torchvision.transforms.functional as transforms
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: the image cannot be read ({error})") from None
    if resize is not None:
        image = transforms.resize(image, resize)
    if crop is not None:
        image = transforms.center_crop(image, crop)
    tensor: Tensor = transforms.to_tensor(image)
    return tensor
