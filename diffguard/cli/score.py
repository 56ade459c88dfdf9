"""Decide on image files and on the images of folders.

Prints a table, or JSON lines. Exit code: 0, all are in-distribution; 3, at least one is OOD; 1, an image or a
setting is wrong (the other images are decided all the same); 2, the command line is.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffguard.cli import detector_option, output, score_pair
from diffguard.cli.image_files import batches, find_images
from diffguard.errors import DataError, NotFiniteError, SettingError
from diffguard.utils.names import in_a_line

if TYPE_CHECKING:
    from diffguard.deploy.detector import DeployedDetector

HELP = "decide on image files: in-distribution or OOD"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them")
    detector_option.add(parser)
    parser.add_argument("--output", type=output.output_path, metavar="FILE", help="also write .parquet, .csv or .json")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line in place of the table")
    score_pair.add(parser)


def run(options: argparse.Namespace) -> int:
    """Score; returns the exit code."""
    if options.classifier or options.denoiser:
        return _run_pair(options)
    if given := [name for name in score_pair.OPTIONS if getattr(options, name) is not None]:
        raise SettingError(f"--{given[0]}: goes with --classifier and --denoiser; a bundle has its own settings")
    paths = find_images(options.paths)
    detector = detector_option.open_found(options)
    width = min(60, max(len(str(path)) for path in paths))
    counts = {"InD": 0, "OOD": 0, "unreadable": 0}
    with output.open_writer(options.output) as write:
        if not options.json:
            print(_line(width, "path", "label", "confidence", "score", "p-value", "verdict"))
        for batch in batches(paths, detector):
            for row in _decided(detector, batch):
                write(row)
                verdict = "unreadable" if row["error"] else ("OOD" if row["is_ood"] else "InD")
                counts[verdict] += 1
                _show(row, verdict, width, options.json)
            sys.stdout.flush()
    told = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    where = f"{options.output}: " if options.output else ""
    print(f"{where}{len(paths)} images: {told} (alpha {detector.alpha:g}, {detector.info.detector})", file=sys.stderr)
    if counts["unreadable"]:
        return 1
    return 3 if counts["OOD"] else 0


def _run_pair(options: argparse.Namespace) -> int:
    if options.detector or options.output or options.json:
        raise SettingError("--classifier, --denoiser: a bare pair of models goes without --detector, --output, --json")
    if not (options.classifier and options.denoiser):
        raise SettingError("--classifier and --denoiser: each needs the other")
    options.paths = find_images(options.paths)
    return score_pair.score_files(options)


def _decided(detector: "DeployedDetector", batch: Sequence[tuple[Path, Any]]) -> list[dict[str, Any]]:
    """A row for each file of a batch, in its order."""
    import torch

    images = [image for _, image in batch if not isinstance(image, DataError)]
    decisions = iter(detector.decide_each(torch.stack(images)) if images else [])
    found = []
    for path, image in batch:
        decision = image if isinstance(image, DataError) else next(decisions)
        if isinstance(decision, NotFiniteError):  # which names no file
            found.append(output.row_of(path, error=f"{path}: {decision}"))
        elif isinstance(decision, DataError):
            found.append(output.row_of(path, error=str(decision)))
        else:
            found.append(output.row_of(path, decision))
    return found


def _show(row: dict[str, Any], verdict: str, width: int, as_json: bool) -> None:
    if row["error"]:
        print(f"error: {in_a_line(row['error'])}", file=sys.stderr)
    if as_json:
        print(json.dumps({key: value for key, value in row.items() if value is not None}))
    elif row["error"]:
        print(_line(width, in_a_line(row["path"]), "", "", "", "", verdict))
    else:
        numbers = (f"{row['confidence']:.1%}", f"{row['score']:.4g}", f"{row['p_value']:.3g}")
        print(_line(width, in_a_line(row["path"]), row["class_name"], *numbers, verdict))


def _line(width: int, path: str, label: str, confidence: str, score: str, p_value: str, verdict: str) -> str:
    return f"{path:<{width}}  {label:<16} {confidence:>10} {score:>10} {p_value:>8}  {verdict}"
