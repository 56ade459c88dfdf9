"""A study as a flow: its points scored where they are not, measured, logged, and written to its page.

Run it by `python -m flows.study --study NAME`, or as the deployment `diffguard/study`.
"""

import argparse
from dataclasses import replace
from typing import Any

from prefect import flow

from flows.command import one_line, tell_watcher
from flows.evaluate import add_run_options, chosen_seeds, hold_home, make_scores
from flows.start import check_prefect
from tasks import workflow
from tasks.config import project
from tasks.studies.points import Planned, left_out_lines, plan_study


@flow(name="diffguard", log_prints=True)
def study(
    study: str,
    benchmark: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    seeds: int | None = None,
    runner: str = "threads",
    workers: int | None = None,
    address: str | None = None,
    share: str | None = None,
    root: str | None = None,
    precision: str | None = None,
    timeout_hours: float | None = None,
) -> dict[str, Any]:
    """Run a study of data/studies/ on a benchmark: only scores that are not there are made.

    Args:
        study: a file of data/studies/, without .yaml.
        benchmark: a file of data/benchmarks/, without .yaml; the study's first if not given.
        limit: the most images of each dataset of validation and test; the study's if not given.
        seed: the training seed, or the first of several.
        seeds: how many training seeds; their results are pooled.
        runner: where scoring runs: threads, one a device of this machine, or ray.
        workers: of ray, how many at a time; one a GPU, or one for four processors, if not given.
        address: of a Ray cluster; one on this machine if not given.
        share: fsspec URL where Ray's workers read data and write scores, if they do not mount the project.
        root: what {root} stands for in the paths of the benchmark's file.
        precision: what a variant's precision auto means, float32 or bfloat16.
        timeout_hours: the most hours that a scoring task may take; any if not given.
    """
    choices = {"limit": limit, "seeds": chosen_seeds(seed, seeds), "root": root, "precision": precision}
    planned = plan_study(study, benchmark, **choices)
    for line in left_out_lines(planned.left_out):
        print(line)
    first = next(iter(planned.runs))
    with hold_home(planned.open(first), timeout_hours):
        workflow.check_tracking()
        scored = make_scores(list(planned.runs.values()), runner, workers, address, share, timeout_hours)
        runs = dict(zip(planned.runs, scored, strict=True))
        results = workflow.conclude_study(replace(planned, runs=runs))
    tell_watcher(lambda: outcome(planned, results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.study", description="Run a study of data/studies/.")
    parser.add_argument("--study", required=True, help="a file of data/studies/, without .yaml")
    parser.add_argument("--benchmark", help="a file of data/benchmarks/; the study's first if not given")
    add_run_options(parser)
    options = vars(parser.parse_args())
    with one_line():
        # A wrong option, key or point is found before any server starts.
        chosen = {key: options[key] for key in ("limit", "root", "precision")}
        planned = plan_study(
            options["study"], options["benchmark"], **chosen, seeds=chosen_seeds(options["seed"], options["seeds"])
        )
        check_prefect()
        results = study(**options)
    print(outcome(planned, results))


def outcome(planned: Planned, results: dict[str, Any]) -> str:
    """What a study has found: its conclusion, its table, and where to look next."""
    from tasks.studies.page import conclusion, docs_folder, table
    from tasks.studies.stage import results_folder

    page = (docs_folder() / f"{planned.name}.md").relative_to(project.ROOT)
    folder = results_folder(planned).relative_to(project.ROOT)
    where = f"Where to look next: {page}, {folder}/results.json, `.venv/bin/mlflow ui` (experiment diffguard-studies)."
    return f"\n{conclusion(planned.study, results)}\n\n{table(planned.study, results)}\n\n{where}"


if __name__ == "__main__":
    main()
