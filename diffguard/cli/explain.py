"""Draw why an image is decided to be in-distribution or OOD: input, reconstructions, difference, CAM, verdict."""

import argparse
from pathlib import Path

from diffguard.cli import detector_option
from diffguard.errors import DataError
from diffguard.utils.names import readable


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    parser.add_argument(
        "--output", type=_picture_path, required=True, metavar="FILE", help="the picture to write, such as why.png"
    )
    detector_option.add(parser)


def run(options: argparse.Namespace) -> int:
    """Draw one image's explanation; returns the exit code."""
    from diffguard.images import read_picture

    picture = read_picture(options.image)
    if not options.output.absolute().parent.is_dir():
        raise DataError(f"{options.output}: its folder does not exist; make it first")
    detector = detector_option.open_selected(options)
    image = detector.prepare(picture, str(options.image))
    explanation = detector.picture(image)
    [decision] = detector.decide(image[None])
    try:
        explanation.save(options.output)
    except OSError as error:
        raise DataError(f"{options.output}: cannot be written ({error.strerror or error})") from None
    verdict = "OOD" if decision.is_ood else "InD"
    numbers = f"confidence {decision.confidence:.1%}, score {decision.score:.4g}, p-value {decision.p_value:.3g}"
    print(f"{readable(options.image)}: {verdict}, taken for {decision.class_name} ({numbers}); see {options.output}")
    return 0


def _picture_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"{text}: neither .png, .jpg nor .webp")
    return path
