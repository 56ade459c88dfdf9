"""Scores of image files under a bare pair of models, without a bundle: no calibration but a given threshold."""

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
    """Declare the options, beside those of the command `score`."""
    group = parser.add_argument_group("without a bundle", "two models, and the settings of a score")
    group.add_argument("--classifier", help="a .safetensors file that DiffGuard saved, or package.module:name of one")
    group.add_argument("--denoiser", type=Path, help="a folder in Diffusers' layout")
    group.add_argument("--variant", help="a preset's name, or JSON of settings in place of the default variant's")
    group.add_argument("--threshold", type=float, help="a score above it is OOD; exit code 3 if any is")
    group.add_argument("--patch", type=_pixels, help="side of the patches that the denoiser sees; by its channels")
    group.add_argument("--resize", type=_pixels, help="first resize the short side to this many pixels")
    group.add_argument("--crop", type=_pixels, help="then cut out the middle, a square of this side in pixels")


def _pixels(text: str) -> int:
    """A number of pixels, for argparse."""
    if not text.isdecimal() or not 1 <= int(text) <= 65536:
        raise argparse.ArgumentTypeError(f"{text}: not a number of pixels, 1 to 65536")
    return int(text)


def score_files(options: argparse.Namespace) -> int:
    """Print one line an image: path, predicted label, score, verdict; returns the exit code.

    An image that cannot be used is an error, and the others are scored all the same.
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
            images[path] = _prepared(path, detector, options)
        except DataError as error:
            errors[path] = error
    shapes = {tuple(image.shape) for image in images.values()}
    if len(shapes) > 1:
        raise DataError(f"{options.paths[0]}: images of {len(shapes)} sizes; give --resize and --crop")
    found, failed = _decided(detector, images)
    for path in options.paths:
        if wrong := errors.get(path) or failed.get(path):
            print(f"error: {in_a_line(str(wrong))}", file=sys.stderr)
            continue
        verdict = found[path]
        decision = "" if verdict.is_ood is None else ("\tOOD" if verdict.is_ood else "\tInD")
        print(f"{in_a_line(path)}\tlabel {verdict.label}\tscore {verdict.score:.5g}{decision}")
    if errors or failed:
        return 1
    return 3 if any(verdict.is_ood for verdict in found.values()) else 0


def _prepared(path: Path, detector: "DiffGuard", options: argparse.Namespace) -> "Tensor":
    """The image of a file; see `diffguard.images.read_image`.

    Raises:
        DataError: it cannot be read, or is not of the shape that the denoiser takes.
    """
    from diffguard.images import read_image

    channels, side, _ = detector.denoiser.image_shape
    image = read_image(path, channels, options.resize, options.crop)
    _, height, width = image.shape
    if detector.variant.process_method == "none" and (height, width) != (side, side):
        raise DataError(f"{path}: {width}x{height} pixels; the denoiser takes {side}x{side}; give --resize and --crop")
    if height != width:
        raise DataError(f"{path}: {width}x{height} pixels; give --resize and --crop")
    return image


def _decided(
    detector: "DiffGuard", images: dict[Path, "Tensor"]
) -> "tuple[dict[Path, Verdict], dict[Path, DataError]]":
    """The verdicts on images, and why there is none on others."""
    import torch

    from diffguard.detectors.diffguard import verdicts

    paths, failed = list(images), dict[Path, DataError]()
    while paths:
        try:
            found = verdicts(detector, torch.stack([images[path] for path in paths]))
            return dict(zip(paths, found, strict=True)), failed
        except NotFiniteError as error:
            failed |= {paths[row]: DataError(f"{paths[row]}: {error}") for row in error.rows}
            paths = [path for path in paths if path not in failed]
    return {}, failed


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
