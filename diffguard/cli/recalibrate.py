"""Calibrate a detector anew on in-distribution images of one's own, and write it as a new bundle.

Its models and settings stay; what changes are the scores that p-values come from, and so the thresholds.
"""

import argparse
from pathlib import Path

from diffguard.cli import detector_option
from diffguard.cli.image_files import batches, find_images
from diffguard.errors import DataError, SettingError

HELP = "calibrate a detector on new in-distribution images"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them; all InD")
    detector_option.add(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the new bundle")
    parser.add_argument("--accept", type=float, help="share of InD images to accept (default: as before)")


def run(options: argparse.Namespace) -> int:
    """Calibrate; returns the exit code."""
    if options.accept is not None and not 0 < options.accept < 1:
        raise SettingError(f"--accept: {options.accept:g} is not between 0 and 1")
    from diffguard.deploy.bundle import check_new, save_bundle
    from diffguard.deploy.recalibration import CalibrationScores, recalibrated

    check_new(options.output)  # before all the work
    paths = find_images(options.paths)
    detector = detector_option.open_found(options)
    scores = CalibrationScores(detector)
    for batch in batches(paths, detector):
        for path, image in batch:
            # One that is left out unseen would bend the promise.
            if isinstance(image, DataError):
                raise image
            scores.add(str(path), image)
    new = recalibrated(detector, scores.table(), None if options.accept is None else 1 - options.accept)
    save_bundle(new, options.output)
    own = len(new.conformal.thresholds)
    print(f"{options.output}: {new.info.detector}, calibrated on {len(paths)} images; alpha {new.alpha:g}")
    print(f"thresholds of their own: {own} of {len(new.classes)} classes; others: {new.conformal.threshold():.5g}")
    return 0
