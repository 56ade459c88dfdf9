"""Serve a detector over HTTP: POST /score, GET /health, /version and /metrics, and the page /docs.

With DIFFGUARD_API_KEY set, clients have to send that key.
"""

import argparse
import math
import os
from typing import TYPE_CHECKING

from diffguard.cli import detector_option
from diffguard.errors import SettingError
from diffguard.serving.api_key import VARIABLE, checked_key
from diffguard.serving.limits import MAX_REQUEST_SECONDS, REQUEST_SECONDS, Limits
from diffguard.settings import parse_settings

if TYPE_CHECKING:
    from diffguard.deploy.detector import DeployedDetector

MOST_PROCESSES = 8
"""That share an endpoint's batches on a processor, where nothing else is asked for: each takes some 300 MB."""


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    default = Limits()
    detector_option.add(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (8000); 0: any free one")
    parser.add_argument(
        "--max-images", type=int, default=default.max_images, help=f"most images of a request ({default.max_images})"
    )
    parser.add_argument(
        "--max-megabytes",
        type=float,
        default=default.max_bytes / 2**20,
        help=f"most MiB of a request's body ({default.max_bytes / 2**20:g})",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=default.max_pixels, help=f"most pixels of an image ({default.max_pixels:,})"
    )
    parser.add_argument(
        "--max-total-pixels",
        type=int,
        default=default.max_total_pixels,
        help=f"most pixels of all images of a request ({default.max_total_pixels:,})",
    )
    parser.add_argument(
        "--timeout", type=float, default=REQUEST_SECONDS, help=f"time-out of a request in seconds ({REQUEST_SECONDS:g})"
    )
    parser.add_argument(
        "--processes",
        type=int,
        help=f"most processes that share a batch on a processor (one a core, at most {MOST_PROCESSES})",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code."""
    if not 0 <= options.port <= 65535:
        raise SettingError(f"--port: {options.port} is not within 0..65535")
    if not 0 < options.timeout <= MAX_REQUEST_SECONDS:
        raise SettingError(f"--timeout: {options.timeout:g} is not above 0 and at most {MAX_REQUEST_SECONDS:,} seconds")
    if not 0 < options.max_megabytes < math.inf:
        raise SettingError(f"--max-megabytes: {options.max_megabytes:g} is not a finite number above 0")
    sizes = {
        "max_images": options.max_images,
        "max_bytes": int(options.max_megabytes * 2**20),
        "max_pixels": options.max_pixels,
        "max_total_pixels": options.max_total_pixels,
    }
    limits = parse_settings(Limits, sizes, "diffguard serve")
    key = checked_key(os.environ.get(VARIABLE))
    uri = detector_option.find(options.detector)
    detector_option.check_device(options.device)
    if options.processes is not None and options.processes < 1:
        raise SettingError(f"--processes: {options.processes} is not at least 1")
    from diffguard.loading import open_detector

    try:
        from diffguard.serving.server import serve
    except ImportError as error:
        raise SettingError(f"diffguard serve: {error}; run: pip install 'diffguard-ood[serve]'") from None

    def source() -> "DeployedDetector":
        detector = open_detector(uri, options.device, options.trust_code)
        detector.expect(None, MOST_PROCESSES if options.processes is None else options.processes)
        return detector

    return serve(source, options.host, options.port, limits, options.timeout, key)
