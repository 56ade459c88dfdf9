"""Which detector a command asks: an option, the environment, or the project's own."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from diffguard.errors import DataError, SettingError
from diffguard.utils.text import first_line, read_text

if TYPE_CHECKING:
    from diffguard.deploy.detector import DeployedDetector

VARIABLE = "DIFFGUARD_DETECTOR"


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--detector",
        metavar="URI",
        help=f"a bundle's folder, or models:/name@alias of MLflow (default: ${VARIABLE}, or that of the project here)",
    )
    parser.add_argument(
        "--trust-code",
        action="append",
        default=[],
        metavar="package.module",
        help="code of one's own that the detector may name, and what is below it; repeat it for more",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")


def find(given: str | None) -> str:
    """The URI of the detector to use.

    In the folder of a project, which has a params.yaml, it is data/<benchmark>/detector. One that the command line
    does not name is told on stderr.

    Raises:
        SettingError: none is named, and there is none here.
    """
    if given:
        return given
    if named := os.environ.get(VARIABLE):
        print(f"detector: {named} (by {VARIABLE})", file=sys.stderr)
        return named
    where = _of_project()
    if where is not None and where.is_dir():
        print(f"detector: {where} (of params.yaml's benchmark; --detector names another)", file=sys.stderr)
        return str(where)
    reason = "none is named" if where is None else f"there is none in {where}"
    make = "" if where is None else ", or make it: dvc repro bundle"
    raise SettingError(f"--detector: {reason}; give a bundle's folder or models:/name@alias (or set {VARIABLE}){make}")


def open_found(options: argparse.Namespace) -> "DeployedDetector":
    """The detector that the options name.

    Raises:
        DataError, SettingError, ServiceError: see `diffguard.loading.open_detector`.
    """
    uri = find(options.detector)
    from diffguard.loading import open_detector

    check_device(options.device)
    return open_detector(uri, options.device, options.trust_code)


def check_device(device: str | None) -> None:
    """That torch has a device of this name.

    Raises:
        SettingError: it does not.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise SettingError(f"--device {device}: not to be had here ({reason})") from None


def _of_project() -> Path | None:
    path = Path("params.yaml")
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(read_text(path))
    except (OSError, yaml.YAMLError):
        raise DataError(f"{path}: not YAML; mend it, or name a detector by --detector") from None
    name = values.get("benchmark") if isinstance(values, dict) else None
    return Path("data") / name / "detector" if isinstance(name, str) else None
