"""The stages as Prefect tasks: names, retries, artifacts. The stages themselves know no Prefect.

Tasks are given the flow's choices as plain values, so that any runner can send them anywhere, and ask for their
run themselves; a process resolves it once.
"""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import FailedRun
from prefect.runtime import task_run
from prefect.tasks import Task

from diffguard.errors import DiffGuardError, ServiceError
from tasks.config.current import current_run
from tasks.config.run import Choices
from tasks.services.dvc import end_dvc, run_dvc

if TYPE_CHECKING:
    from tasks.config.run import Run
    from tasks.production.monitor import Observed
    from tasks.production.recalibrate import Recalibrated
    from tasks.score.plan import Item
    from tasks.studies.points import Planned


class _OneLine(logging.Filter):
    """Our own errors say in one line what to do, and so does a failed state; a traceback would hide it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, DiffGuardError | FailedRun):
            if str(record.msg).startswith("Engine execution exited"):  # after it was said
                return False
            record.msg, record.args, record.exc_info, record.exc_text = str(error), (), None, None
        return True


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(_OneLine())


def _may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Retry what can fail for a passing reason; a wrong setting or a bad file stays wrong, and a time-out is one."""
    error = state.data if isinstance(state.data, BaseException) else state.result(raise_on_failure=False)
    return isinstance(error, ServiceError) or not isinstance(error, DiffGuardError | TimeoutError)


_steady = {"cache_policy": NO_CACHE, "retries": 2, "retry_delay_seconds": 5, "retry_condition_fn": _may_pass}


@task(name="prepare", **_steady)
def prepare(choices: Choices) -> None:
    """The benchmark's images and manifest: by DVC if it is params.yaml's benchmark."""
    run = current_run(**choices)
    if run.recorded_seeds is not None:
        run_dvc("repro", "prepare")
        return
    from tasks.prepare.stage import make_ready

    make_ready(run.benchmark, run.home, run.params.prepare.seed)


@task(name="validate", **_steady)
def validate(choices: Choices) -> None:
    """The manifest against its rules; what makes figures on a dataset say less is a warning."""
    from diffguard.utils.names import readable
    from tasks.prepare.fairness import dataset_warnings
    from tasks.validate import validate_manifest

    run = current_run(**choices)
    image = run.benchmark.image
    docs = run.other / "docs"
    shutil.rmtree(docs, ignore_errors=True)
    try:
        validate_manifest(run.manifest, run.home, image.size, image.mode, len(run.classes), docs / "manifest")
    finally:
        page = docs / "manifest" / "index.html"
        if page.is_file():
            create_link_artifact(page.as_uri(), key="data-docs", link_text="Data Docs of the manifest")
    for warning in dataset_warnings(run):
        print(readable(f"warning: {warning}"))


@task(name="check", **_steady)
def check(choices: Choices) -> None:
    """That the models agree with the benchmark, before one is trained."""
    from tasks.models.checks import check_label_order, check_models, some_ind_images

    run = current_run(**choices)
    models = check_models(run)
    images, labels = some_ind_images(run)
    for name in run.params.classifiers:
        if warning := check_label_order(run, name, models[name], images, labels):
            print(f"warning: {warning}")


TRAININGS = ("train-classifier", "train-denoiser")


@task(name="train", **_steady)
def train(choices: Choices) -> None:
    """The models of params.yaml, by DVC: side by side on a processor, else one after the other.

    A time budget means a number of steps that only a training by itself makes in it.
    """
    from diffguard.engine import core_count
    from tasks.common.devices import devices

    benchmark = current_run(**choices).benchmark
    has_budget = any(getattr(spec, "minutes", None) for spec in (benchmark.denoiser, *benchmark.classifiers.values()))
    if has_budget or devices() != ["cpu"] or core_count() < 2:
        run_dvc("repro", *TRAININGS)
        return
    with ThreadPoolExecutor(len(TRAININGS)) as pool:
        # What they depend on is there: `prepare` has run. To ask anew, each would lock it for the other.
        runs = [pool.submit(run_dvc, "--wait-for-lock", "repro", "--single-item", stage) for stage in TRAININGS]
        try:
            wait(runs)
        except BaseException:
            end_dvc()  # the pool waits for its threads
            raise
    for run in runs:
        run.result()


@task(name="train-other", task_run_name="train {model}, seed {seed}", **_steady)
def train_other(choices: Choices, model: str, seed: int) -> None:
    """A model that DVC does not have, unless it is there already."""
    from tasks.train.stage import train_if_missing

    train_if_missing(current_run(**choices), model, seed)


def _range_name() -> str:
    shards = task_run.parameters["shards"]
    return f"score shards {shards[0]} to {shards[-1]}"


@task(name="score", task_run_name=_range_name, **_steady)
def score(choices: Choices, shards: list[int]) -> int:
    """What lacks in a range of shards, on a device that no other task of this process uses."""
    from tasks.common.devices import leased_device
    from tasks.common.ending import interruptible
    from tasks.score.plan import plan
    from tasks.score.stage import score_shards

    run = current_run(**choices)
    total = sum(run.rows_of(shard) for shard in shards) * len(run.params.seeds)
    artifact = create_progress_artifact(progress=0.0, description=f"images of shards {shards[0]} to {shards[-1]}")
    done = 0

    def progress(images: int) -> None:
        nonlocal done
        done += images
        update_progress_artifact(artifact, progress=100 * done / total)
        print(f"shards {shards[0]} to {shards[-1]}: {done} of {total} images")

    with interruptible(), leased_device() as device:
        return score_shards(run, plan(run), shards, device, progress)


def with_precision(choices: Choices) -> Choices:
    """The choices with what ``precision: auto`` means in this run, the same for all of its tasks, wherever they run.

    Scores that are there stay as they are; whoever has to score does it in what is fast on this machine.
    """
    from tasks.config.precision import fast_precision
    from tasks.score.plan import missing as find
    from tasks.score.plan import plan

    run = current_run(**choices)
    if run.precision is None or choices.get("precision") is not None:
        return choices
    return {**choices, "precision": fast_precision() if find(run, plan(run)) else run.precision}


@task(name="missing", **_steady)
def missing(choices: Choices) -> list[int]:
    """The shards that lack scores."""
    from tasks.score.plan import missing as find
    from tasks.score.plan import plan

    run = current_run(**choices)
    return find(run, plan(run))


@task(name="share", **_steady)
def share(choices: Choices, url: str) -> None:
    """What scoring needs, to where every machine reads it."""
    from tasks.score.plan import plan
    from tasks.score.share import publish

    run = current_run(**choices)
    publish(run, plan(run), current_run(**choices, data=url))


@task(name="collect", **_steady)
def collect(choices: Choices, url: str) -> None:
    """The scores that other machines have written, to this one."""
    from tasks.score.plan import plan
    from tasks.score.share import collect as fetch

    run, shared = current_run(**choices), current_run(**choices, data=url)
    fetch(plan(run), plan(shared))


@task(name="validate-scores", **_steady)
def validate_scores(several: list[Choices]) -> None:
    """The score tables of runs against their rules; then DVC's folder holds its own run's scores and no others."""
    from tasks.score.plan import plan, read_items
    from tasks.score.stage import finish
    from tasks.validate import validate_scores as check

    opened = [(run, plan(run)) for run in (current_run(**choices) for choices in several)]
    # Runs of the same images are checked in one pass, which takes seconds however many tables there are.
    by_images: dict[str, list[tuple[Run, list[Item]]]] = {}
    for run, items in opened:
        by_images.setdefault(run.scored_hash, []).append((run, items))
    for number, of_images in enumerate(by_images.values()):
        titled = {
            item.title if len(several) == 1 else f"{item.title}, run {run.name}": table
            for run, items in of_images
            for item, table in zip(items, read_items(items).values(), strict=True)
        }
        run = of_images[0][0]
        check(titled, run.scored["id"], run.other / "docs" / ("scores" if not number else f"scores-{number}"))
    for run, items in opened:
        finish(run, items)


@task(name="calibrate", **_steady)
def calibrate(choices: Choices) -> dict[str, Any]:
    """Thresholds from InD calibration scores."""
    from tasks.calibrate import calibrate as set_thresholds
    from tasks.score.plan import plan

    run = current_run(**choices)
    return set_thresholds(run, plan(run))


@task(name="evaluate", **_steady)
def evaluate(choices: Choices) -> dict[str, Any]:
    """Metrics with intervals."""
    from tasks.evaluate.report import report
    from tasks.evaluate.stage import evaluate as measure
    from tasks.prepare.fairness import dataset_warnings
    from tasks.score.plan import plan

    run = current_run(**choices)
    metrics = measure(run, plan(run))
    text = report(metrics, dataset_warnings(run))
    create_markdown_artifact(text, key="results", description=f"{run.benchmark.name}: test split")
    return metrics


@task(name="bundle", **_steady)
def bundle(choices: Choices) -> bool:
    """The detector to deploy; False: none of the run's rows can be."""
    from tasks.bundle import bundle as write
    from tasks.bundle import deployed_row
    from tasks.score.plan import plan

    run = current_run(**choices)
    folder = write(run, plan(run))
    print("no row of this run can be deployed" if folder is None else f"{folder}: {deployed_row(run)}")
    return folder is not None


@task(name="record", **_steady)
def record(*, bundled: bool) -> None:
    """Tell DVC that the outputs of its last stages are made, as its own stages would have made them."""
    run_dvc("commit", "--force", "score", "calibrate", "evaluate", "log", *(["bundle"] if bundled else []))


@task(name="log", **_steady)
def log(choices: Choices, metrics: dict[str, Any], thresholds: dict[str, Any]) -> str:
    """The evaluation to MLflow."""
    from tasks.log import log as log_run
    from tasks.score.plan import plan

    run = current_run(**choices)
    return log_run(run, plan(run), metrics, thresholds)


@task(name="register", **_steady)
def register(choices: Choices, parent: str, metrics: dict[str, Any]) -> str:
    """The bundle as a model in MLflow, and which version is champion; returns its URI."""
    from tasks.register import register as register_model

    registered = register_model(current_run(**choices), parent, metrics)
    print(f"{registered.name}: {registered.why}")
    create_markdown_artifact(
        f"`{registered.uri}`: {registered.why}.", key="champion", description=f"Registered model {registered.name}"
    )
    return registered.uri


@task(name="conclude-study", **_steady)
def conclude_study(planned: "Planned") -> dict[str, Any]:
    """A study's measures, table, figures and page, of scores that are there; then all of it to MLflow."""
    from tasks.studies.log import log as log_study
    from tasks.studies.page import conclusion, table
    from tasks.studies.stage import conclude, results_folder

    results = conclude(planned)
    text = f"{conclusion(planned.study, results)}\n\n{table(planned.study, results)}"
    create_markdown_artifact(text, key="study", description=f"{planned.name} on {planned.benchmark}")
    log_study(planned, results, results_folder(planned))
    return results


@task(name="check-tracking", **_steady)
def check_tracking() -> None:
    """Before any work: that MLflow answers, and takes what will be logged."""
    from tasks.production.recalibrate import EXPERIMENT as CALIBRATION
    from tasks.production.report import EXPERIMENT as MONITORING
    from tasks.services.tracking import EXPERIMENT, STUDIES, check_experiment, open_tracking

    client = open_tracking()
    for name in (EXPERIMENT, MONITORING, CALIBRATION, STUDIES):
        check_experiment(client, name)


def _progress_artifact(description: str) -> Callable[[int, int], None]:
    """A progress artifact, and the function that updates it with how many of how many images are done."""
    artifact = create_progress_artifact(progress=0.0, description=description)

    def progress(done: int, total: int) -> None:
        update_progress_artifact(artifact, progress=100 * done / total)
        print(f"{done} of {total} images")

    return progress


@task(name="observe", **_steady)
def observe(choices: Choices) -> "Observed":
    """What the deployed detector says of production images."""
    from tasks.production.monitor import Monitoring
    from tasks.production.monitor import observe as observe_images

    return observe_images(Monitoring(**choices), _progress_artifact("production images"))


@task(name="log-monitoring", **_steady)
def log_monitoring(observed: "Observed") -> str:
    """What was observed, to MLflow and as artifacts; returns MLflow's id of the run."""
    from tasks.production.report import log as log_observed
    from tasks.production.report import most_ood, report, warnings

    print(f"detector: {observed.detector} ({observed.info.detector} of {observed.info.benchmark})")
    for each in warnings(observed):
        print(f"warning: {each}")
    create_markdown_artifact(report(observed), key="monitor", description="Production images")
    create_table_artifact(most_ood(observed), key="monitor-most-ood", description="The most OOD production images")
    return log_observed(observed)


@task(name="recalibrate", **_steady)
def recalibrate(choices: Choices) -> "Recalibrated":
    """The detector with new calibration images, as a bundle."""
    from tasks.production.recalibrate import Recalibration
    from tasks.production.recalibrate import recalibrate as recalibrate_detector

    return recalibrate_detector(Recalibration(**choices), _progress_artifact("calibration images"))


@task(name="register-recalibrated", **_steady)
def register_recalibrated(made: "Recalibrated") -> str:
    """The new bundle to MLflow, as a version of the registered model; returns its URI."""
    from tasks.production.recalibrate import register as register_model
    from tasks.production.recalibrate import report

    uri = register_model(made)
    create_markdown_artifact(f"`{uri}`\n\n{report(made)}", key="calibrate", description="A recalibrated detector")
    return uri
