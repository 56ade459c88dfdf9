"""The main flow: prepare, validate, check, train, score, calibrate, evaluate, bundle, log, register.

Run it by `python -m flows.evaluate`, or as the deployment `diffguard/evaluate`.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from diffguard.errors import SettingError
from flows.command import one_line, tell_watcher
from flows.resume import check_starts
from flows.runners import RUNNERS, scoring_runner
from flows.start import check_prefect
from tasks import workflow
from tasks.common.exclusive import exclusive
from tasks.config import project
from tasks.config.current import current_run
from tasks.config.precision import PRECISIONS
from tasks.config.run import EVALUATION_LOCK, Choices, Run


@flow(name="score", log_prints=True)
def score(jobs: list[tuple[dict[str, Any], list[int]]], timeout_hours: float | None = None) -> None:
    """Ranges of shards of runs, each a task that has a device to itself."""
    task = workflow.score.with_options(timeout_seconds=None if timeout_hours is None else 3600 * timeout_hours)
    task.map(choices=[choices for choices, _ in jobs], shards=[shards for _, shards in jobs]).result()


@flow(name="diffguard", log_prints=True)
def evaluate(
    benchmark: str = "digits",
    variants: list[str] | None = None,
    limit: int | None = None,
    classifier: str | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    runner: str = "threads",
    workers: int | None = None,
    address: str | None = None,
    share: str | None = None,
    root: str | None = None,
    registers: bool | None = None,
    precision: str | None = None,
    timeout_hours: float | None = None,
) -> dict[str, Any]:
    """Evaluate variants, baselines and combinations of them on a benchmark.

    With nothing chosen this is the run that params.yaml describes and DVC records. Any other
    choice writes beside it, under data/<benchmark>/other/.

    Args:
        benchmark: a file of data/benchmarks/, without .yaml.
        variants: names of rows in params.yaml: variants, baselines, and combinations, which bring along the
            rows that they are made of; the benchmark's if not given.
        limit: the most images of each dataset of validation and test.
        classifier: a classifier of the benchmark; all that are guarded if not given.
        seed: the training seed, or the first of several.
        seeds: how many training seeds; their results are pooled.
        runner: where scoring runs: threads, one a device of this machine, or ray.
        workers: of ray, how many at a time; one a GPU, or one for four processors, if not given.
        address: of a Ray cluster; one on this machine if not given.
        share: fsspec URL where Ray's workers read data and write scores, if they do not mount the project.
        root: what {root} stands for in the paths of the benchmark's file.
        registers: whether MLflow's model registry gets the detector; if not given, where nothing else was chosen
            than the benchmark.
        precision: what a variant's precision auto means, float32 or bfloat16; what is fast on this machine, which
            need not be the one that scores, if not given.
        timeout_hours: the most hours that a scoring task may take, which is a range of shards; any if not given.
            What it has scored stays.
    """
    choices = {
        "benchmark": benchmark,
        "variants": variants,
        "limit": limit,
        "classifier": classifier,
        "seeds": chosen_seeds(seed, seeds),
        "root": root,
        "precision": precision,
    }
    run = current_run(**choices)
    with hold_home(run, timeout_hours):
        metrics = _evaluate(choices, run, runner, workers, address, share, registers, timeout_hours)
    tell_watcher(lambda: results(run, metrics, registers))
    return metrics


@contextmanager
def hold_home(run: Run, timeout_hours: float | None) -> Iterator[None]:
    """Check what every start of a flow has to, and keep other flows out of data/<benchmark>/ until its end.

    Raises:
        SettingError: timeout_hours is out of range.
        ServiceError: the flow run was started too often; see `flows.resume`.
    """
    check_starts(flow_run.run_count)
    if timeout_hours is not None and timeout_hours <= 0:
        raise SettingError(f"timeout_hours: {timeout_hours} is not above 0")
    home = str(run.home.relative_to(project.ROOT))
    with exclusive(run.other / EVALUATION_LOCK, home, f"flow run {flow_run.name}"):
        yield


def _evaluate(
    choices: dict[str, Any],
    run: Run,
    runner: str,
    workers: int | None,
    address: str | None,
    share: str | None,
    registers: bool | None,
    timeout_hours: float | None,
) -> dict[str, Any]:
    """The tasks of an evaluation in their order; see `evaluate`."""
    workflow.check_tracking()
    [choices] = make_scores([choices], runner, workers, address, share, timeout_hours)
    thresholds = workflow.calibrate(choices)
    metrics = workflow.evaluate(choices)
    bundled = workflow.bundle(choices)
    parent = workflow.log(choices, metrics, thresholds)
    if run.own:
        workflow.record(bundled=bundled)
    if bundled and does_register(run, registers):
        workflow.register(choices, parent, metrics)
    return metrics


def make_scores(
    several: Sequence[Choices],
    runner: str,
    workers: int | None,
    address: str | None,
    share: str | None,
    timeout_hours: float | None,
) -> list[Choices]:
    """Prepare, validate, check, train and score what is missing of runs, each as a task of the flow that calls this.

    Args:
        several: the choices of runs of one benchmark, which differ in rows, models or a change of images.
        runner, workers, address, share, timeout_hours: see `evaluate`.

    Returns:
        The choices, with what ``precision: auto`` means.
    """
    workflow.prepare(several[0])
    workflow.validate(several[0])
    # Runs that differ in a change alone have the same models.
    is_trained = False
    for choices in {current_run(**each).unchanged.name: each for each in reversed(several)}.values():
        workflow.check(choices)
        run = current_run(**choices)
        models = [(model, seed) for seed in run.params.seeds for model in ("denoiser", *run.params.classifiers)]
        if not is_trained and any(run.is_recorded(seed, model) for model, seed in models):
            workflow.train(choices)
            is_trained = True
        for model, seed in models:
            if not run.is_recorded(seed, model):
                workflow.train_other(choices, model, seed)
    several = [workflow.with_precision(each) for each in several]
    missing = [(choices, shards) for choices in several if (shards := workflow.missing(choices))]
    if missing:
        with scoring_runner(runner, workers, address, mounted=share is None) as room:
            jobs = []
            for choices, shards in missing:
                if share is not None:
                    workflow.share(choices, share)
                there = choices if share is None else {**choices, "data": share}
                ranges = split_range(shards, room.places if room.places == 1 else 4 * room.places)
                jobs += [(there, each) for each in ranges]
            score.with_options(task_runner=room.task_runner)(jobs, timeout_hours)
            if share is not None:
                for choices, _ in missing:
                    workflow.collect(choices, share)
    workflow.validate_scores(several)
    return several


def does_register(run: Run, registers: bool | None) -> bool:
    """Whether a run's detector goes to MLflow's model registry; None: if it is the benchmark's, not a part's."""
    return run.whole if registers is None else registers


def split_range(shards: list[int], parts: int) -> list[list[int]]:
    """Shards in at most so many runs of neighbours, as even as can be.

    Example:
        >>> split_range([0, 1, 2, 3, 7], 2)
        [[0, 1], [2, 3, 7]]
    """
    parts = min(parts, len(shards))
    cuts = [round(part * len(shards) / parts) for part in range(parts + 1)]
    return [shards[first:last] for first, last in pairwise(cuts)]


def chosen_seeds(seed: int | None, seeds: int | None) -> list[int] | None:
    """The training seeds that two options choose; None for params.yaml's."""
    if seed is None and seeds is None:
        return None
    return list(range(seed or 0, (seed or 0) + (1 if seeds is None else seeds)))


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Declare what an evaluation and a study are told alike."""
    parser.add_argument("--root", help="what {root} stands for in the paths of the benchmark's file")
    parser.add_argument("--limit", type=int, help="the most images of each dataset of validation and test")
    parser.add_argument("--seed", type=int, help="the training seed, or the first of several")
    parser.add_argument("--seeds", type=int, help="how many training seeds; their results are pooled")
    parser.add_argument("--runner", choices=RUNNERS, default="threads", help="where scoring runs")
    parser.add_argument("--workers", type=int, help="of ray, how many at a time")
    parser.add_argument("--address", help="of a Ray cluster; one on this machine if not given")
    parser.add_argument("--share", help="fsspec URL where Ray's workers read data and write scores")
    parser.add_argument("--precision", choices=PRECISIONS, help="what a variant's precision auto means")
    parser.add_argument("--timeout-hours", type=float, help="the most that a scoring task may take; any if not given")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.evaluate", description="Evaluate a benchmark.")
    parser.add_argument("--benchmark", default="digits")
    parser.add_argument("--variants", nargs="+", help="names in params.yaml; the benchmark's if not given")
    parser.add_argument("--classifier", help="a classifier of the benchmark; all that are guarded if not given")
    add_run_options(parser)
    parser.add_argument(
        "--register",
        dest="registers",
        action=argparse.BooleanOptionalAction,
        help="the detector in MLflow's model registry; by default that of a run with no other choice than a benchmark",
    )
    options = vars(parser.parse_args())
    with one_line():
        # A wrong option is found before any server starts.
        chosen = {key: options[key] for key in ("benchmark", "variants", "limit", "classifier", "root", "precision")}
        run = current_run(**chosen, seeds=chosen_seeds(options["seed"], options["seeds"]))
        check_prefect()
        metrics = evaluate(**options)
    print(results(run, metrics, options["registers"]))


def results(run: Run, metrics: dict[str, Any], registers: bool | None) -> str:
    """The table of a finished run, and where to look next."""
    from tasks.evaluate.report import report
    from tasks.prepare.fairness import dataset_warnings

    head = "Test split, percent, with 95 % bootstrap intervals (higher AUROC, lower FPR@95 are better):"
    return f"\n{head}\n\n{report(metrics, dataset_warnings(run))}\n\n{where_next(run, registers)}"


def where_next(run: Run, registers: bool | None) -> str:
    """Where a finished run's results are, and how its detector is used."""
    from tasks.bundle import FOLDER
    from tasks.services.registry import ALIAS, model_name

    results = run.results.relative_to(project.ROOT)
    lines = [
        f"Where to look next: {results}/metrics.json (every dataset), "
        "`.venv/bin/mlflow ui` (pictures, scores, curves), docs/results.md."
    ]
    if (run.results / FOLDER).is_dir():
        lines.append(f"The detector: .venv/bin/diffguard score --detector {results / FOLDER} IMAGES")
        name = model_name(run.benchmark.name)
        if does_register(run, registers):
            lines.append(f"In MLflow it is a version of {name}; the champion is models:/{name}@{ALIAS}.")
        else:
            lines.append(f"It is no version of {name} in MLflow; with --register it becomes one.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
