"""Where scoring tasks run: threads of this process, one a device, or a Ray cluster."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from diffguard.errors import SettingError
from diffguard.utils.text import first_line
from tasks.common.text import known_name
from tasks.config import project

RUNNERS = ("threads", "ray")

_NOT_CODE = [
    ".git",
    ".venv",
    ".dvc",
    "data/*/*",
    "!data/benchmarks/*",
    "!data/studies/*",
    "mlruns",
    "mlartifacts",
    "mlflow.db*",
]


@dataclass(frozen=True)
class Runner:
    """A task runner and how many scoring tasks it has room for at a time."""

    task_runner: TaskRunner[Any]
    places: int


@contextmanager
def scoring_runner(kind: str, workers: int | None, address: str | None, *, mounted: bool = True) -> Iterator[Runner]:
    """The runner of a flow's scoring tasks.

    Args:
        kind: "threads" or "ray".
        workers: of Ray, how many tasks at a time; None: one a GPU, or one for four processors.
        address: of a Ray cluster; None: one on this machine, for this run.
        mounted: whether a cluster's machines have the project's folder where this one has it, data and all; else
            the code alone goes along.

    Raises:
        SettingError: the kind is unknown, Ray is not installed, or its workers could not reach Prefect or lack
            the project's folder.
    """
    known_name("runner", [kind], RUNNERS)
    if kind == "threads":
        if workers is not None or address is not None:
            raise SettingError("workers, address: belong to runner ray; threads are one a device")
        from tasks.common.devices import devices

        yield Runner(ThreadPoolTaskRunner(max_workers=len(devices())), len(devices()))
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # read on import: progress is not taken for a repetition
    try:
        import ray
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options
    except ImportError:
        raise SettingError("runner: ray is not installed; run: pip install 'diffguard-ood[ray]'") from None
    if address is not None and not PREFECT_API_URL.value():
        raise SettingError("address: workers of a Ray cluster report to a Prefect server; set PREFECT_API_URL")
    options: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    if address is not None and mounted:
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(project.ROOT)}}
    elif address is not None:
        options["runtime_env"] = {"working_dir": str(project.ROOT), "excludes": _NOT_CODE}
    try:
        # Without an address Ray would join whatever cluster it finds named on this machine, or hang on a dead one.
        ray.init(address or "local", namespace="prefect", log_to_driver=True, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SettingError(f"address: no Ray cluster at {address} ({first_line(error)})") from None
    try:
        if address is not None and mounted:
            _check_mounted(project.ROOT)
        resources = ray.cluster_resources()
        processors, gpus = int(resources.get("CPU", os.cpu_count() or 1)), int(resources.get("GPU", 0))
        places = workers or gpus or max(1, processors // 4)
        # A killed worker's task is given to another one; what it had finished stays.
        share: dict[str, Any] = {"num_cpus": max(1, processors // places), "max_retries": 3}
        if gpus:
            share["num_gpus"] = gpus / places if places > gpus else 1
        # Workers report to the server that this process uses, a temporary one included.
        with get_client(sync_client=True) as client:
            api = str(client.api_url)
        with temporary_settings({PREFECT_API_URL: api}), remote_options(**share):
            yield Runner(RayTaskRunner(), places)
    finally:
        ray.shutdown()


def _check_mounted(folder: Path) -> None:
    """Raise a SettingError if a machine of the cluster that has processors lacks the folder."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    is_folder = ray.remote(os.path.isdir)
    for node in ray.nodes():
        if not node["Alive"] or not node["Resources"].get("CPU"):
            continue
        on_node = is_folder.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        )
        if not ray.get(on_node.remote(str(folder))):
            raise SettingError(
                f"address: {node['NodeManagerHostname']} of the Ray cluster has no folder {folder}; mount the project "
                "there, or give share, a URL where workers read data and write scores"
            )
