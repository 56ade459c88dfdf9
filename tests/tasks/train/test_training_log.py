"""A denoiser's training in MLflow: its samples as they come, and one run however often it is interrupted."""

import math
import multiprocessing
import os
import signal
import sys
import time

import pytest
from own_project import own_benchmark, save_own, write_own
from small_project import work_in

import tasks.train.command
import tasks.train.stage
from diffguard.errors import DiffGuardError
from diffguard.training import loop
from diffguard.training.previews import sample_grid
from tasks.common.console import run_stage
from tasks.config.benchmark import DENOISER
from tasks.config.run import open_run
from tasks.prepare.stage import prepare_if_changed
from tasks.services.tracking import open_tracking
from tasks.train.stage import train

STEPS = 9


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A project whose denoiser is to be trained, with a checkpoint and samples at every step."""
    save_own(tmp_path / "own")
    benchmark = own_benchmark()
    small = {"channels": [8, 16], "norm_groups": 4, "iterations": STEPS, "batch_size": 4, "checkpoint_minutes": 1e-9}
    benchmark["denoiser"] = {"kind": "trained", **small}
    benchmark["classifiers"]["small"] = {"kind": "trained", "width": 4, "epochs": STEPS, "batch_size": 16}
    write_own(monkeypatch, tmp_path, benchmark)
    run = open_run(benchmark="mine", root=str(tmp_path / "own"))
    prepare_if_changed(run.benchmark, run.home, seed=0)
    return tmp_path


def train_in(root, model=DENOISER):
    """Train there, as a process of its own does too."""
    import torch

    torch.set_num_threads(1)
    loop.PREVIEW_SHARE = math.inf  # samples at every checkpoint
    work_in(pytest.MonkeyPatch(), root)
    return train(open_run(benchmark="mine", root=str(root / "own")), model, 0)


def logged():
    """Of each run of the experiment, oldest first: its id, its status, the steps that it has samples of."""
    client = open_tracking()
    experiment = client.get_experiment_by_name("diffguard-training")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [
        (
            each.info.run_id,
            each.info.status,
            [int(f.path[-11:-4]) for f in client.list_artifacts(each.info.run_id, "samples")],
        )
        for each in found
    ]


def test_a_killed_training_goes_on_in_its_run(begun):
    process = multiprocessing.get_context("spawn").Process(target=train_in, args=(begun,))
    process.start()
    deadline = time.monotonic() + 180
    while len(list((begun / "mlruns").rglob("samples/*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    [(run_id, status, steps)] = logged()
    assert status == "RUNNING"
    assert 2 <= len(steps) < STEPS

    folder = train_in(begun)
    assert logged() == [(run_id, "FINISHED", list(range(1, STEPS + 1)))]
    client = open_tracking()
    assert client.get_run(run_id).data.params["denoiser.iterations"] == str(STEPS)
    assert (folder / "unet").is_dir()
    assert {each.suffix for each in (begun / "data" / "mine" / "other" / "training").iterdir()} == {".lock"}


def test_a_failed_training_goes_on_in_its_run_if_that_is_there(begun, monkeypatch):
    def fail_at(number):
        calls = iter(range(number))
        monkeypatch.setattr(tasks.train.stage, "sample_grid", lambda each: [next(calls), sample_grid(each, rows=1)][1])
        with pytest.raises(StopIteration):
            train_in(begun)

    fail_at(2)
    [(first, *rest)] = logged()
    assert rest == ["FAILED", [1, 2]]
    fail_at(1)
    assert logged() == [(first, "FAILED", [1, 2, 4])]
    open_tracking().delete_run(first)
    monkeypatch.setattr(tasks.train.stage, "sample_grid", lambda each: sample_grid(each, rows=1))
    train_in(begun)
    [(second, *rest)] = logged()
    assert rest == ["FINISHED", list(range(6, STEPS + 1))]
    assert second != first


CURVES = ("loss", "gradient_norm", "learning_rate", "images_per_second", "images_seen")


def test_curves_of_every_training(begun, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    train_in(begun)
    train_in(begun, "small")
    client = open_tracking()
    for (run_id, status, _), name in zip(logged(), (DENOISER, "small"), strict=True):
        assert status == "FINISHED"
        assert client.get_run(run_id).info.run_name == f"{name} of mine, seed 0"
        curves = {each: client.get_metric_history(run_id, each) for each in CURVES}
        for points in curves.values():
            assert points[-1].step == STEPS
            assert [point.step for point in points] == sorted({point.step for point in points})
        assert len(curves["loss"]) > 1
        assert all(point.value > 0 for point in curves["images_per_second"])
        images = 4 if name == DENOISER else 16
        assert curves["images_seen"][-1].value == STEPS * images
        if name == DENOISER:  # the classifier's is over sooner than a metric is taken
            assert any(key.startswith("system/") for key in client.get_run(run_id).data.metrics)


def command_in(root, pace, text):
    """`diffguard train denoiser` there, with some seconds a step; what it says goes to a file."""
    work_in(pytest.MonkeyPatch(), root)
    was = loop.Trainer._step

    def slowly(self):
        time.sleep(pace)
        return was(self)

    loop.Trainer._step = slowly
    sys.stderr = text.open("w", buffering=1)
    run_stage(lambda: tasks.train.command.command(["denoiser", "--benchmark", "mine", "--root", str(root / "own")]))


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_saves_and_says_how_to_go_on(begun):
    context = multiprocessing.get_context("spawn")
    first = context.Process(target=command_in, args=(begun, 0.5, begun / "first.txt"))
    first.start()
    training = begun / "data" / "mine" / "other" / "training"
    wait_for(lambda: list(training.glob("*.pt")))
    second = context.Process(target=command_in, args=(begun, 0, begun / "second.txt"))
    second.start()
    os.kill(first.pid, signal.SIGSTOP)  # it must not be done before the second has come
    second.join()
    assert second.exitcode == 1
    assert ".pt: another process is at this training; wait for it, or end it" in (begun / "second.txt").read_text()
    os.kill(first.pid, signal.SIGINT)
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 130
    said = (begun / "first.txt").read_text().strip().splitlines()[-1]
    assert said == "interrupted; denoiser is saved as it is: the same command goes on from there"
    assert not list((begun / "data" / "mine" / "other" / "models").iterdir())
    [(run_id, status, steps)] = logged()
    assert status == "KILLED"
    train_in(begun)
    [(again, status, more)] = logged()
    assert (again, status) == (run_id, "FINISHED")
    assert more[: len(steps)] == steps
    assert more[-1] == STEPS
    recorded = open_tracking().get_metric_history(run_id, "learning_rate")
    assert sorted(point.step for point in recorded) == sorted({point.step for point in recorded})


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("mine", {"minutes": 1.0}, "minutes: mine of mine is not trained here"),
        ("small", {"finish": 1.0}, "finish: for denoisers alone; small is a classifier"),
        ("small", {"start": "."}, "from: for denoisers alone; small is a classifier"),
        (DENOISER, {"finish": 0.0}, "finish: 0 is not more than 0"),
        (DENOISER, {"minutes": -1.0}, "minutes: -1 is not more than 0"),
        (DENOISER, {"start": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_options_are_named(begun, model, options, message):
    with pytest.raises(DiffGuardError, match=message):
        train(open_run(benchmark="mine", root=str(begun / "own")), model, 0, **options)


def test_a_tracking_store_that_loses_the_run_does_not_end_the_training(begun, monkeypatch, capsys):
    """The run is deleted for good under the training, as a store that was put back from a copy would."""
    opened = tasks.train.stage.open_training

    def lost(*arguments):
        log = opened(*arguments)
        log.client.delete_run(log.run_id)
        gone = f"sqlite:///{begun / 'another.db'}"
        log.client = type(log.client)(tracking_uri=gone, registry_uri=gone)
        return log

    monkeypatch.setattr(tasks.train.stage, "open_training", lost)
    folder = train_in(begun)
    assert (folder / "unet").is_dir()
    out = capsys.readouterr().out
    assert out.count("warning: MLflow does not take the training's figures (") == 1
