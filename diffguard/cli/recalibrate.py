"""Recalibrate a detector on your own in-distribution images, and write it as a new bundle.

Its models and settings stay the same; the calibration scores are new, and with them p-values and thresholds.
"""

import argparse
from pathlib import Path

from diffguard.cli import detector_option
from diffguard.cli.image_files import batches, find_images
from diffguard.errors import DataError, SettingError


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them; all InD")
    detector_option.add(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the new bundle")
    parser.add_argument("--accept", type=float, help="share of InD images to accept, 1 - alpha (default: as before)")


def run(options: argparse.Namespace) -> int:
    """Recalibrate and write the bundle; returns the exit code."""
    if options.accept is not None and not 0 < options.accept < 1:
        raise SettingError(f"--accept: {options.accept:g} is not between 0 and 1")
    from diffguard.deploy.bundle import check_new, save_bundle
    from diffguard.deploy.recalibration import CalibrationScores, recalibrated

    check_new(options.output)  # before the scoring, which takes long
    paths = find_images(options.paths)
    detector = detector_option.open_selected(options)
    detector.expect(len(paths))
    scores = CalibrationScores(detector)
    for batch in batches(paths, detector):
        for path, image in batch:
            # Leaving an image out would select among them, which voids the coverage guarantee.
            if isinstance(image, DataError):
                raise image
            scores.add(str(path), image)
    new = recalibrated(detector, scores.table(), None if options.accept is None else 1 - options.accept)
    save_bundle(new, options.output)
    count = len(new.conformal.thresholds)
    print(f"{options.output}: {new.info.detector}, calibrated on {len(paths)} images; alpha {new.alpha:g}")
    print(f"thresholds of their own: {count} of {len(new.classes)} classes; others: {new.conformal.threshold():.5g}")
    return 0
