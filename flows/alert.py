"""An automation of Prefect's: a notification when a run of the deployment `diffguard/monitor` has failed.

    python -m flows.alert slack-webhook/on-call

The notification block (Slack, Microsoft Teams, e-mail, a webhook, …) is made in Prefect's UI, under Blocks. Run
again, it changes the automation that is there.
"""

import argparse
import sys
from uuid import UUID

from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound

from diffguard.errors import DiffGuardError, SettingError
from flows.automations import OUR_RUNS, keep, server

NAME = "diffguard/monitor has failed"


def alert(block: str) -> None:
    """Make or change the automation.

    Args:
        block: type and name of a notification block, as Prefect's UI and `prefect block ls` show them.

    Raises:
        SettingError: there is no such block, or no server is named. ServiceError: the server does not answer.
    """
    kind, _, name = block.partition("/")
    if not name:
        raise SettingError(f"block: {block!r} is not type/name, as slack-webhook/on-call; see: prefect block ls")
    try:
        with server() as client:
            document = client.read_block_document_by_name(name, kind, include_secrets=False)
            keep(client, _automation(document.id))
    except ObjectNotFound:
        raise SettingError(f"block: there is no {block}; make it in Prefect's UI, under Blocks") from None


def _automation(block: UUID) -> AutomationCore:
    deployed = ResourceSpecification({"prefect.resource.role": "deployment", "prefect.resource.name": "monitor"})
    return AutomationCore(
        name=NAME,
        description="A detector's guarantee is broken on production images, or they could not be monitored.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=[OUR_RUNS, deployed],
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject=NAME,
                body="{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
            )
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.alert", description="Be told when a run of the deployment diffguard/monitor has failed."
    )
    parser.add_argument("block", help="a notification block, as slack-webhook/on-call")
    try:
        alert(parser.parse_args().block)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    print(f"automation {NAME!r} is set")


if __name__ == "__main__":
    main()
