"""Recalibration as a flow: a deployed detector on other InD images, registered in MLflow.

Run it by `python -m flows.recalibrate IMAGES`, or as the deployment `diffguard/recalibrate`.
"""

import argparse
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from diffguard.settings import parse_settings
from flows.command import run_flow, tell_watcher
from tasks import workflow
from tasks.production.recalibrate import Recalibration


@flow(name="diffguard", log_prints=True)
def recalibrate(
    images: str,
    detector: str | None = None,
    accept: float | None = None,
    output: str | None = None,
    column: str | None = None,
    limit: int | None = None,
    promote: bool = False,
    trust_code: list[str] | None = None,
) -> State[Any]:
    """Recalibrate a deployed detector, write it as a bundle, and register it in MLflow.

    Models and settings stay; the scores that p-values come from change, and so do the thresholds.

    Args:
        images: InD images that trained nothing: a folder; or a Parquet file with a column of paths, or of contents of
            PNG or JPEG files; or an fsspec URL of one.
        detector: a bundle's folder, or models:/name@alias of MLflow; if not given, the registered champion of
            params.yaml's benchmark, or data/<benchmark>/detector if there is none.
        accept: the share of InD images to accept; as before if not given.
        output: the new bundle's folder; data/<benchmark>/detectors/<date and time> if not given.
        column: of the Parquet file; image or path if not given.
        limit: the most images that are taken, by a random choice that stays the same.
        promote: let the alias champion of the registered model go to the new version.
        trust_code: code that the detector may name, as package.module, beside what the project's own files name.
    """
    settings = recalibration(locals())
    workflow.check_tracking()
    bundle = workflow.recalibrate(settings.model_dump())
    uri = workflow.register_recalibrated(bundle)
    champion = ", now champion" if settings.promote else ""
    made = f"{bundle.row}, calibrated on {bundle.images:,} images: {bundle.folder}, {uri}{champion}"
    tell_watcher(lambda: made)
    return Completed(message=made)


def recalibration(options: dict[str, Any]) -> Recalibration:
    """Checked options.

    Raises:
        SettingError: one is wrong; the message names it.
    """
    return parse_settings(Recalibration, options, "recalibrate")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.recalibrate", description="Recalibrate a deployed detector on InD images."
    )
    parser.add_argument(
        "images", help="a folder of InD images, or a Parquet file of paths or contents, or a URL of one"
    )
    parser.add_argument("--detector", metavar="URI", help="a bundle, or models:/name@alias; the champion if not given")
    parser.add_argument("--accept", type=float, help="share of InD images to accept; as before if not given")
    parser.add_argument("--output", help="the new bundle's folder; one under data/<benchmark>/detectors if not given")
    parser.add_argument("--column", help="of the Parquet file; image or path if not given")
    parser.add_argument("--limit", type=int, help="the most images that are taken")
    parser.add_argument("--promote", action="store_true", help="move the alias champion to the new version")
    parser.add_argument(
        "--trust-code", action="append", metavar="package.module", help="code that the detector may name; repeat it"
    )
    print(f"\n{run_flow(recalibrate, recalibration, vars(parser.parse_args()))}")


if __name__ == "__main__":
    main()
