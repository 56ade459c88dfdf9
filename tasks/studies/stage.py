"""A study's results, once its scores are there: results.json, table, figures and page; all of it is a stage of DVC."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tasks.common.files import write_json, write_whole
from tasks.config.benchmark import DENOISER
from tasks.config.study import where
from tasks.score.stage import score
from tasks.studies.cams import draw_cams
from tasks.studies.curves import curve
from tasks.studies.figure import draw, draw_curve
from tasks.studies.log import log
from tasks.studies.page import conclusion, difference_table, table, write_page
from tasks.studies.points import Planned, left_out_lines, plan_study
from tasks.studies.results import results as measure
from tasks.train.stage import train_if_missing


def results_folder(planned: Planned) -> Path:
    """data/<benchmark>/studies/<study>/."""
    return planned.open(planned.points[0].run).home / "studies" / planned.name


def conclude(planned: Planned) -> dict[str, Any]:
    """Measure a study whose scores are all there, and write its results and page.

    Returns:
        See `tasks.studies.results.results`; with ``curve``, if the study has one, see `tasks.studies.curves.curve`.
    """
    study, found = planned.study, measure(planned)
    if study.curve is not None:
        found["curve"] = curve(planned.open(planned.points[0].run), study.curve, where(planned.name))
    folder = results_folder(planned)
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / "results.json", found)
    tables = "\n\n".join([conclusion(study, found), table(study, found), difference_table(study, found)])
    write_whole(folder / "table.md", lambda target: target.write_text(f"{tables}\n", encoding="utf-8"))
    figures = _figures(planned, found)
    for name, content in figures.items():
        write_whole(folder / name, lambda target, content=content: target.write_bytes(content))  # type: ignore[misc]
    write_page(study, found, figures)
    return found


def _figures(planned: Planned, found: dict[str, Any]) -> dict[str, bytes]:
    """PNG files by their names."""
    names = [f"{planned.name}-{planned.benchmark}.png"]
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary) / names[0]]
        draw(paths[0], found, planned.study.figure)
        if "curve" in found:
            paths.append(Path(temporary) / f"{planned.name}-{planned.benchmark}-curve.png")
            draw_curve(paths[1], found["curve"])
        if planned.study.cams is not None:
            paths.append(Path(temporary) / f"{planned.name}-{planned.benchmark}-gradcam.png")
            draw_cams(paths[-1], planned, planned.study.cams)
        return {path.name: path.read_bytes() for path in paths}


def run_study(planned: Planned) -> dict[str, Any]:
    """Train and score what is missing, conclude and log, in this process; images and DVC's models are there."""
    for line in left_out_lines(planned.left_out):
        print(line)
    make_scores(planned)
    found = conclude(planned)
    print(f"logged to MLflow as run {log(planned, found, results_folder(planned))}")
    return found


def make_scores(planned: Planned) -> None:
    """Train the models that DVC does not have, and score what is missing."""
    for key in planned.runs:
        run = planned.open(key)
        for seed in run.params.seeds:
            for model in (DENOISER, *run.params.classifiers):
                if not run.is_recorded(seed, model):
                    train_if_missing(run, model, seed)
        score(run)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.studies", description="Run a study on params.yaml's benchmark."
    )
    parser.add_argument("study")
    from tasks.config.params import load_params

    planned = plan_study(parser.parse_args().study, load_params().benchmark)
    found = run_study(planned)
    print(f"\n{conclusion(planned.study, found)}\n\n{table(planned.study, found)}")
