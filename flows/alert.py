"""An automation of Prefect's: a notification when a run of the deployment `diffguard/monitor` has failed.

    python -m flows.alert slack-webhook/on-call

The notification block (Slack, Microsoft Teams, e-mail, a webhook, …) is made in Prefect's UI, under Blocks. Run
again, it changes the automation that is there.
"""

import argparse
import sys

from prefect.client.orchestration import get_client
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from diffguard.errors import DiffGuardError, ServiceError, SettingError

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
    if not PREFECT_API_URL.value():
        raise SettingError("PREFECT_API_URL: not set; automations are kept by a server, see what `make serve` prints")
    try:
        with get_client(sync_client=True) as client:
            document = client.read_block_document_by_name(name, kind, include_secrets=False)
            automation = AutomationCore(
                name=NAME,
                description="A detector's guarantee is broken on production images, or they could not be monitored.",
                trigger=EventTrigger(
                    expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
                    match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
                    match_related=[
                        ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": "diffguard"}),
                        ResourceSpecification(
                            {"prefect.resource.role": "deployment", "prefect.resource.name": "monitor"}
                        ),
                    ],
                    posture=Posture.Reactive,
                    threshold=1,
                ),
                actions=[
                    SendNotification(
                        block_document_id=document.id,
                        subject=NAME,
                        body="{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
                    )
                ],
            )
            existing = client.read_automations_by_name(NAME)
            if existing:
                client.update_automation(existing[0].id, automation)
            else:
                client.create_automation(automation)
    except ObjectNotFound:
        raise SettingError(f"block: there is no {block}; make it in Prefect's UI, under Blocks") from None
    except OSError as error:
        raise ServiceError(f"Prefect at {PREFECT_API_URL.value()} cannot be reached ({error})") from None


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
