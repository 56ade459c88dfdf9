"""Automations of Prefect's: a run whose process has died goes on where it was, on any worker.

    python -m flows.resume

`make serve` sets them. Two things are seen: a process that ended while its worker lived, which reports it at once; and
a machine or container that is gone with its worker, by the run's heartbeats (PREFECT_FLOWS_HEARTBEAT_FREQUENCY, which
prefect.yaml sets to 30 seconds).
"""

import argparse
import sys
from datetime import timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from diffguard.errors import DiffGuardError, ServiceError
from flows.automations import OUR_RUNS, keep, server

SILENT_SECONDS = 90
"""Without a heartbeat for so long, a run's process is taken to have died."""

MOST_STARTS = 5
"""A run that has been started so often is not started again: it dies of itself, perhaps since memory ends."""

_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled")}


def set_automations(client: SyncPrefectClient) -> None:
    """Make or change both."""
    deployed = ResourceSpecification({"prefect.resource.role": "deployment"})  # not what is a part of a run
    keep(
        client,
        AutomationCore(
            name="diffguard: a run without heartbeats goes on",
            description=f"A run that has sent no heartbeat for {SILENT_SECONDS} seconds is scheduled again.",
            trigger=EventTrigger(
                after={_HEARTBEAT},
                expect={_HEARTBEAT, *_ENDS},
                match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
                match_related=[OUR_RUNS, deployed],
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=SILENT_SECONDS),
            ),
            actions=[_scheduled(f"No heartbeat for {SILENT_SECONDS} seconds: its process has died.")],
        ),
    )
    keep(
        client,
        AutomationCore(
            name="diffguard: a run whose process was killed goes on",
            description="A run whose process a worker has seen end too early is scheduled again.",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Crashed"},
                match=ResourceSpecification(
                    {
                        "prefect.resource.id": "prefect.flow-run.*",
                        # What a worker reports; a run that was told to end says that itself, in other words.
                        "prefect.state-message": "Flow run infrastructure exited with non-zero status code -9*",
                    }
                ),
                match_related=[OUR_RUNS, deployed],
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[_scheduled("Its process was killed.")],
        ),
    )


def _scheduled(why: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=f"{why} It goes on.", force=True)


def check_starts(run_count: int) -> None:
    """Check, as a run starts, that it may.

    Args:
        run_count: how often it has been started, this time included.

    Raises:
        ServiceError: too often.
    """
    if run_count > MOST_STARTS:
        raise ServiceError(
            f"this run has been started {run_count} times, and its process died each time, perhaps since memory ended; "
            "what it has made stays, and a new run goes on from there"
        )


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m flows.resume", description="Let runs whose process has died go on, on any worker."
    ).parse_args()
    try:
        with server() as client:
            set_automations(client)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    print("a run whose process has died goes on by itself")


if __name__ == "__main__":
    main()
