"""Decide whether image files, and the images of folders, are in-distribution or OOD.

Prints a table, or JSON lines. Exit code: 0, all images are in-distribution; 3, at least one is OOD; 1, an image cannot
be read (the others are decided all the same) or a setting is wrong; 2, the command line is wrong.
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


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="image files, or folders of them")
    detector_option.add(parser)
    parser.add_argument("--output", type=output.output_path, metavar="FILE", help="also write .parquet, .csv or .json")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of the table")
    score_pair.add(parser)


def run(options: argparse.Namespace) -> int:
    """Score images and print the decisions; returns the exit code."""
    if options.classifier or options.denoiser:
        return _run_pair(options)
    if names := [name for name in score_pair.OPTIONS if getattr(options, name) is not None]:
        raise SettingError(f"--{names[0]}: goes with --classifier and --denoiser; a bundle has its own settings")
    paths = find_images(options.paths)
    detector = detector_option.open_selected(options)
    detector.expect(len(paths))
    width = min(60, max(len(str(path)) for path in paths))
    counts = {"InD": 0, "OOD": 0, "unreadable": 0}
    with output.open_writer(options.output) as write:
        if not options.json:
            print(_line(width, "path", "label", "confidence", "score", "p-value", "verdict"))
        for batch in batches(paths, detector):
            for row in _rows(detector, batch):
                write(row)
                verdict = "unreadable" if row["error"] else ("OOD" if row["is_ood"] else "InD")
                counts[verdict] += 1
                _show(row, verdict, width, options.json)
            sys.stdout.flush()
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    prefix = f"{options.output}: " if options.output else ""
    print(
        f"{prefix}{len(paths)} images: {summary} (alpha {detector.alpha:g}, {detector.info.detector})", file=sys.stderr
    )
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


def _rows(detector: "DeployedDetector", batch: Sequence[tuple[Path, Any]]) -> list[dict[str, Any]]:
    """Decide on a batch; a row for each file, in order."""
    import torch

    images = [image for _, image in batch if not isinstance(image, DataError)]
    decisions = iter(detector.decide_each(torch.stack(images)) if images else [])
    rows = []
    for path, image in batch:
        decision = image if isinstance(image, DataError) else next(decisions)
        if isinstance(decision, NotFiniteError):  # its message does not name the file
            rows.append(output.row_of(path, error=f"{path}: {decision}"))
        elif isinstance(decision, DataError):
            rows.append(output.row_of(path, error=str(decision)))
        else:
            rows.append(output.row_of(path, decision))
    return rows


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
