"""Monitoring as a flow: score production images, log the decisions, and fail if the detector's guarantee is broken.

Run it by `python -m flows.monitor IMAGES`, or as the deployment `diffguard/monitor`.
"""

import argparse
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from diffguard.settings import parse_settings
from flows.command import run_flow, tell_watcher
from tasks import workflow
from tasks.production.monitor import Monitoring
from tasks.production.report import verdict_line


@flow(name="diffguard", log_prints=True)
def monitor(
    images: str,
    detector: str | None = None,
    expected_rate: float | None = None,
    limit: int | None = None,
    at_least: int = 50,
    column: str | None = None,
    most_unreadable: float = 0.05,
    on_broken: Literal["fail", "warn"] = "fail",
    trust_code: list[str] | None = None,
) -> State[Any]:
    """Check whether a deployed detector keeps its guarantee on production images.

    The guarantee is that at most a share alpha of InD images is rejected (the false-rejection rate). It is broken when
    the 95 % interval of the rejection rate lies above the expected rate, and the rate above what the detector's
    calibration set allows by chance. The flow run then ends as failed, with a line of the figures, after all was logged
    to MLflow; an automation can act on that.

    Args:
        images: a folder of images; or a Parquet file with a column of paths, or of contents of PNG or JPEG files; or
            an fsspec URL of one.
        detector: a bundle's folder, or models:/name@alias of MLflow; if not given, the registered champion of
            params.yaml's benchmark, or data/<benchmark>/detector if there is none.
        expected_rate: the share of images that may be rejected, as observed before; the detector's alpha if not given.
        limit: the most images that are scored, by a random choice that stays the same.
        at_least: the fewest images for a verdict; with fewer the run reports, and does not judge.
        column: of the Parquet file; image or path if not given.
        most_unreadable: the largest share of images that may be unreadable; more fail the run.
        on_broken: fail, or warn, which only reports.
        trust_code: code that the detector may name, as package.module, beside what the project's own files name.
    """
    settings = monitoring(locals())
    workflow.check_tracking()
    observed = workflow.observe(settings.model_dump())
    workflow.log_monitoring(observed)
    tell_watcher(lambda: verdict_line(observed), fails=observed.fails)
    end = Failed if observed.fails else Completed
    return end(message=verdict_line(observed))


def monitoring(options: dict[str, Any]) -> Monitoring:
    """Checked options.

    Raises:
        SettingError: one is wrong; the message names it.
    """
    return parse_settings(Monitoring, options, "monitor")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.monitor",
        description="Check whether a detector keeps its guarantee on production images; exit code 1 if not.",
    )
    parser.add_argument("images", help="a folder of images, or a Parquet file of paths or contents, or a URL of one")
    parser.add_argument("--detector", metavar="URI", help="a bundle, or models:/name@alias; the champion if not given")
    parser.add_argument(
        "--expected-rate", type=float, help="share of images that may be rejected; the detector's alpha"
    )
    parser.add_argument("--limit", type=int, help="the most images that are scored")
    parser.add_argument("--at-least", type=int, default=50, help="the fewest images for a verdict (50)")
    parser.add_argument("--column", help="of the Parquet file; image or path if not given")
    parser.add_argument("--most-unreadable", type=float, default=0.05, help="largest share of unreadable images (0.05)")
    parser.add_argument("--on-broken", choices=("fail", "warn"), default="fail", help="what a broken guarantee does")
    parser.add_argument(
        "--trust-code", action="append", metavar="package.module", help="code that the detector may name; repeat it"
    )
    message = run_flow(monitor, monitoring, vars(parser.parse_args()))
    print(f"\n{message}\n\nWhere to look next: the experiment diffguard-monitor in `.venv/bin/mlflow ui`.")


if __name__ == "__main__":
    main()
