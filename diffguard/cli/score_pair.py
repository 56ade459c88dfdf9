"""Scores of image files under a bare pair of models, without a bundle: uncalibrated, with a threshold if given."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffguard.errors import DataError, NotFiniteError
from diffguard.utils.names import in_a_line

if TYPE_CHECKING:
    from torch import Tensor

    from diffguard.detectors.diffguard import DiffGuard, Verdict
    from diffguard.settings import Variant

OPTIONS = ("classifier", "denoiser", "variant", "threshold", "resize", "crop", "patch")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options, in addition to those of the command `score`."""
    group = parser.add_argument_group("without a bundle", "a classifier, a denoiser, and the settings of a score")
    group.add_argument(
        "--classifier", help="a .safetensors file that DiffGuard saved, or package.module:name of a factory"
    )
    group.add_argument("--denoiser", type=Path, help="a folder in Diffusers' layout")
    group.add_argument("--variant", help="a preset's name, or JSON of settings that replace the default variant's")
    group.add_argument("--threshold", type=float, help="scores above it are OOD; the exit code is then 3")
    group.add_argument(
        "--patch", type=_pixels, help="side of the denoiser's patches in pixels (default: from its channels)"
    )
    group.add_argument("--resize", type=_pixels, help="first resize the short side to this number of pixels")
    group.add_argument("--crop", type=_pixels, help="then crop a central square of this side in pixels")


def _pixels(text: str) -> int:
    """Parse a number of pixels, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"{text}: not a number of pixels, 1 to 65536")
    return int(text)


def score_files(options: argparse.Namespace) -> int:
    """Print one line for each image: path, predicted label, score, verdict; returns the exit code.

    An image that cannot be used is reported as an error; the others are scored all the same.
    """
    from diffguard.detectors.diffguard import DiffGuard
    from diffguard.models.classifiers.files import load_classifier
    from diffguard.models.denoisers.loading import load_denoiser
    from diffguard.utils.importing import import_object

    variant = parse_variant(options.variant or "{}")
    name = str(options.classifier)
    classifier = (
        import_object(name)() if ":" in name and not Path(name).exists() else load_classifier(name, options.trust_code)
    )
    detector = DiffGuard(classifier, load_denoiser(options.denoiser, options.patch), variant)
    detector.threshold = options.threshold
    images: dict[Path, Tensor] = {}
    errors = {}
    for path in options.paths:
        try:
            images[path] = _prepare(path, detector, options)
        except DataError as error:
            errors[path] = error
    shapes = {tuple(image.shape) for image in images.values()}
    if len(shapes) > 1:
        raise DataError(f"{options.paths[0]} and others: images of {len(shapes)} sizes; give --resize and --crop")
    decided, failed = _decide(detector, images)
    errors |= failed
    for path in options.paths:
        if reason := errors.get(path):
            print(f"error: {in_a_line(str(reason))}", file=sys.stderr)
            continue
        verdict = decided[path]
        decision = "" if verdict.is_ood is None else ("\tOOD" if verdict.is_ood else "\tInD")
        print(f"{in_a_line(path)}\tlabel {verdict.label}\tscore {verdict.score:.5g}{decision}")
    if errors:
        return 1
    return 3 if any(verdict.is_ood for verdict in decided.values()) else 0


def _prepare(path: Path, detector: "DiffGuard", options: argparse.Namespace) -> "Tensor":
    """Read the image of a file [C, H, W]; see `diffguard.images.read_image`.

    Raises:
        DataError: it cannot be read, or its shape is not what the denoiser takes.
    """
    from diffguard.images import read_image

    channels, side, _ = detector.denoiser.image_shape
    image = read_image(path, channels, options.resize, options.crop)
    _, height, width = image.shape
    if detector.variant.process_method == "none" and (height, width) != (side, side):
        raise DataError(f"{path}: {width}x{height} pixels; the denoiser takes {side}x{side}; give --resize and --crop")
    if height != width:
        raise DataError(f"{path}: {width}x{height} pixels, not square; give --resize and --crop")
    return image


def _decide(detector: "DiffGuard", images: dict[Path, "Tensor"]) -> "tuple[dict[Path, Verdict], dict[Path, DataError]]":
    """The verdicts on images, and the errors of those whose score is not finite."""
    import torch

    from diffguard.detectors.diffguard import verdicts

    paths, failed = list(images), dict[Path, DataError]()
    while paths:
        try:
            decided = verdicts(detector, torch.stack([images[path] for path in paths]))
            return dict(zip(paths, decided, strict=True)), failed
        except NotFiniteError as error:
            failed |= {paths[row]: DataError(f"{paths[row]}: {error}") for row in error.rows}
            paths = [path for path in paths if path not in failed]
    return {}, failed


def parse_variant(text: str) -> "Variant":
    """Parse a preset's name, or JSON of settings that replace the default variant's.

    Raises:
        SettingError: a setting does not exist or is out of range.
        DataError: the text is neither a preset nor JSON, or the variant needs calibration images.
    """
    from diffguard.settings import DEFAULT_VARIANT, PATH, PRESETS, Variant, parse_settings

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
        key = "path" if variant.distance == PATH else "activations"
        raise DataError(f"--variant: distance {variant.distance} is fitted on InD images; give the fitted {key}")
    return variant
