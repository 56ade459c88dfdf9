"""A training as a run of MLflow."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffguard.errors import DiffGuardError
from diffguard.settings import TrainedClassifier, TrainedDenoiser
from diffguard.utils.text import first_line
from tasks.common.files import write_whole
from tasks.config.run import Run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

    from diffguard.training import TrainingStep
from tasks.services.tracking import experiment_id, flat, log_batch, open_tracking, run_tags

TRAINING = "diffguard-training"
"""The experiment of trainings: beside the evaluations, which are compared with each other."""


class TrainingLog:
    """A run of a training: its settings, curves over steps, system metrics, and pictures of samples as they come.

    A training of hours does not end because MLflow does: what it does not take is said once, points of curves are sent
    again later, and a picture is left out.
    """

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.client, self.run_id = client, run_id
        logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
        self.system = SystemMetricsMonitor(run_id, resume_logging=True)
        self.system.start()
        self.began, self.logged = time.monotonic(), -math.inf
        self.steps: list[TrainingStep] = []
        self.points: list[tuple[int, int, dict[str, float]]] = []
        self.fails = False

    def step(self, step: "TrainingStep") -> None:
        """A point of each curve, of the mean over some steps: some hundreds of points however long it takes."""
        self.steps.append(step)
        now = time.monotonic()
        if now - self.logged < max(0.1, (now - self.began) / 300):
            return
        self._add_point()
        self.logged = now
        if len(self.points) >= 20 or now - self.began > 60:
            self._send()

    def value(self, step: int, name: str, value: float) -> None:
        """A point of a curve of its own."""
        self.points.append((int(time.time() * 1000), step, {name: value}))

    def picture(self, name: str, picture: "Image") -> None:
        """Log a picture under a name with folders."""
        self._try(lambda: self.client.log_image(self.run_id, picture, artifact_file=name))

    def close(self, status: str) -> None:
        """End the run as FINISHED, KILLED or FAILED."""
        if self.steps:
            self._add_point()
        self._send()
        self.system.finish()
        self._try(lambda: self.client.set_terminated(self.run_id, status))

    def _add_point(self) -> None:
        last, count = self.steps[-1], len(self.steps)
        values = {
            "loss": sum(step.loss for step in self.steps) / count,
            "gradient_norm": sum(step.gradient_norm for step in self.steps) / count,
            "learning_rate": last.learning_rate,
            "images_per_second": count / sum(1 / step.images_per_second for step in self.steps),
            "images_seen": float(last.images_seen),
        }
        self.points.append((int(time.time() * 1000), last.step, values))
        self.steps = []

    def _send(self) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, at, step) for at, step, values in self.points for name, value in values.items()]

        def send() -> None:
            for first in range(0, len(metrics), 1000):
                self.client.log_batch(self.run_id, metrics=metrics[first : first + 1000])
            self.points = []

        self._try(send)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # whatever the tracking store raises
            if not self.fails:
                print(f"warning: MLflow does not take the training's figures ({first_line(error)}); training goes on")
            self.fails = True
        else:
            self.fails = False


def open_training(
    run: Run, model: str, spec: TrainedClassifier | TrainedDenoiser, seed: int, note: Path
) -> TrainingLog | None:
    """Begin to log a training, or go on with it.

    Args:
        note: a file that holds the id of the training's run in MLflow; it is written if it is not there.

    Returns:
        None, with a warning, if MLflow does not answer or does not take it: training goes on without.
    """
    try:
        client = open_tracking()
        experiment = experiment_id(client, TRAINING)
    except DiffGuardError as error:
        print(f"warning: the training is not logged: {error}")
        return None
    if note.is_file() and (begun := _resumed(client, note.read_text(encoding="utf-8"))):
        return TrainingLog(client, begun)
    name = f"{model} of {run.benchmark.name}, seed {seed}"
    run_id = client.create_run(experiment, run_name=name, tags=run_tags(run)).info.run_id
    kind = "denoiser" if isinstance(spec, TrainedDenoiser) else "classifier"
    params = {
        "benchmark": run.benchmark.name,
        "model": model,
        "seed": seed,
        kind: spec.model_dump(mode="json", exclude_none=True),
    }
    log_batch(client, run_id, flat(params), {})
    write_whole(note, lambda target: target.write_text(run_id, encoding="utf-8"))
    return TrainingLog(client, run_id)


def _resumed(client: "MlflowClient", run_id: str) -> str | None:
    """The id, once its run is under way again; None: this tracking store has no such run, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        client.update_run(run_id, status="RUNNING")
    except MlflowException:
        return None
    return run_id
