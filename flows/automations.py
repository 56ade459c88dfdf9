"""Automations that a Prefect server keeps: made anew, or changed where one of that name is there."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import AutomationCore
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import PREFECT_API_URL

from diffguard.errors import ServiceError, SettingError

OUR_RUNS = ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": "diffguard"})
"""Flow runs of this project's, by what is related to their events."""


@contextmanager
def server() -> Iterator[SyncPrefectClient]:
    """A client of the server of PREFECT_API_URL.

    Raises:
        SettingError: none is named. ServiceError: it does not answer.
    """
    if not PREFECT_API_URL.value():
        raise SettingError("PREFECT_API_URL: not set; automations are kept by a server, see what `make serve` prints")
    try:
        with get_client(sync_client=True) as client:
            yield client
    except OSError as error:
        raise ServiceError(f"Prefect at {PREFECT_API_URL.value()} cannot be reached ({error})") from None


def keep(client: SyncPrefectClient, automation: AutomationCore) -> None:
    """Make an automation, or change the one of its name."""
    existing = client.read_automations_by_name(automation.name)
    if existing:
        client.update_automation(existing[0].id, automation)
    else:
        client.create_automation(automation)
