"""Which detector a command uses: that of the option, of the environment, or of the project in this folder."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from diffguard.cli.process import without_collection
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
        help=f"a bundle's folder, or models:/name@alias, dvc://repository#name, hf://owner/name, s3://bucket/folder, … "
        f"(default: ${VARIABLE}, or that of the project here)",
    )
    parser.add_argument(
        "--trust-code",
        action="append",
        default=[],
        metavar="package.module",
        help="custom code that the detector may import, with its submodules; repeat the option for more",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")


def find(given: str | None) -> str:
    """Return the URI of the detector to use; unless it is given, it is printed on stderr.

    Args:
        given: the option's value. None: the environment variable's value, or else, in the folder of a project (which
            has a params.yaml), data/<benchmark>/detector.

    Raises:
        SettingError: no detector is named, and the project has none.
    """
    if given:
        return given
    if uri := os.environ.get(VARIABLE):
        print(f"detector: {uri} (by {VARIABLE})", file=sys.stderr)
        return uri
    folder = _project_detector()
    if folder is not None and folder.is_dir():
        print(f"detector: {folder} (of params.yaml's benchmark; --detector names another)", file=sys.stderr)
        return str(folder)
    reason = "none is named" if folder is None else f"there is none in {folder}"
    make = "" if folder is None else ", or make it: dvc repro bundle"
    raise SettingError(f"--detector: {reason}; give a bundle's folder or models:/name@alias (or set {VARIABLE}){make}")


def open_selected(options: argparse.Namespace) -> "DeployedDetector":
    """Open the detector that `find` selects.

    Raises:
        DataError, SettingError, ServiceError: see `diffguard.loading.open_detector`.
    """
    uri = find(options.detector)
    with without_collection():
        from diffguard.loading import open_detector

        check_device(options.device)
        return open_detector(uri, options.device, options.trust_code)


def check_device(device: str | None) -> None:
    """Check that torch has a device of this name.

    Raises:
        SettingError: it does not.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise SettingError(
            f"--device {device}: not available on this machine ({reason}); name another, such as cpu"
        ) from None


def _project_detector() -> Path | None:
    path = Path("params.yaml")
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(read_text(path))
    except (OSError, yaml.YAMLError):
        raise DataError(f"{path}: not YAML; correct it, or name a detector by --detector") from None
    name = values.get("benchmark") if isinstance(values, dict) else None
    return Path("data") / name / "detector" if isinstance(name, str) else None
