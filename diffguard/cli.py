"""The command `diffguard`: scores of image files under a trained pair of models."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from diffguard import __version__
from diffguard.errors import DataError, DiffGuardError, SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from diffguard.settings import Variant


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can mend is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="diffguard", description="Out-of-distribution detection for classifiers.")
    parser.add_argument("--version", action="version", version=f"diffguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_score(commands.add_parser("score", help="score image files: higher = more OOD"))
    _add_convert(commands.add_parser("convert", help="write a published checkpoint as a folder in Diffusers' layout"))
    given = sys.argv[1:] if arguments is None else list(arguments)
    project = {entry.name: entry for entry in entry_points(group="diffguard.commands")}
    for name in project:
        commands.add_parser(name, help="of the project around the library: run it in its folder")
    try:
        if given and given[0] in project:
            code = _project_command(project[given[0]])(given[1:])
        else:
            options = parser.parse_args(given)
            code = options.run(options)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


def _project_command(entry: EntryPoint) -> Callable[[Sequence[str]], int]:
    """A command that comes with the project around the library."""
    try:
        command: Callable[[Sequence[str]], int] = entry.load()
    except ImportError as error:
        raise SettingError(f"diffguard {entry.name}: run it in the project's folder ({error})") from None
    return command


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="image files")
    parser.add_argument(
        "--classifier", required=True, help="a .safetensors file that DiffGuard saved, or package.module:name of one"
    )
    parser.add_argument("--denoiser", type=Path, required=True, help="a folder in Diffusers' layout")
    parser.add_argument(
        "--variant", default="{}", help="a preset's name, or JSON of settings in place of the default variant's"
    )
    parser.add_argument("--threshold", type=float, help="a score above it is OOD; exit code 3 if any is")
    parser.add_argument("--resize", type=int, help="first resize the short side to this many pixels")
    parser.add_argument("--crop", type=int, help="then cut out the middle, a square of this side in pixels")
    parser.set_defaults(run=score_files)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="256x256_diffusion_uncond.pt, cin256-v2's model.ckpt, or alike")
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--image-size", type=int, default=256, help="side of the images in pixels (256)")
    parser.add_argument("--head-channels", type=int, default=64, help="pixel model: channels an attention head (64)")
    parser.add_argument("--heads", type=int, default=1, help="latent model: attention heads (1)")
    parser.set_defaults(run=convert_checkpoint)


def convert_checkpoint(options: argparse.Namespace) -> int:
    """Convert a checkpoint and say what it was; returns the exit code."""
    from diffguard.convert import convert

    denoiser = convert(
        options.checkpoint,
        options.folder,
        image_size=options.image_size,
        head_channels=options.head_channels,
        heads=options.heads,
    )
    parameters = sum(each.numel() for each in denoiser.unet.parameters())
    labels = f"{denoiser.num_labels} labels" if denoiser.num_labels else "no labels"
    print(f"{options.folder}: {type(denoiser).__name__}, UNet of {parameters:,} parameters, {labels}")
    return 0


def score_files(options: argparse.Namespace) -> int:
    """Print one line an image: path, predicted label, score, verdict; returns the exit code."""
    import torch

    from diffguard.classifiers import import_object, load_classifier
    from diffguard.detector import DiffGuard, verdicts
    from diffguard.pipelines import load_denoiser

    variant = parse_variant(options.variant)
    name = str(options.classifier)
    classifier = import_object(name)() if ":" in name and not Path(name).exists() else load_classifier(name)
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
        print(f"{path}\tlabel {verdict.label}\tscore {verdict.score:.5g}{decision}")
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


if __name__ == "__main__":
    main()
