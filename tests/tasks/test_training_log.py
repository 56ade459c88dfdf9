"""A denoiser's training in MLflow: its samples as they come, and one run however often it is interrupted."""

import multiprocessing
import os
import signal
import time

import pytest
from own_project import own_benchmark, save_own, write_own
from small_project import work_in

import tasks.train
from diffguard.samples import sample_grid
from tasks.log import open_tracking
from tasks.prepare import prepare_if_changed
from tasks.run import open_run
from tasks.settings import DENOISER
from tasks.train import train

STEPS = 9


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A project whose denoiser is to be trained, with a checkpoint and samples at every step."""
    save_own(tmp_path / "own")
    benchmark = own_benchmark()
    small = {"channels": [8, 16], "norm_groups": 4, "iterations": STEPS, "batch_size": 4, "checkpoint_minutes": 1e-9}
    benchmark["denoiser"] = {"kind": "trained", **small}
    write_own(monkeypatch, tmp_path, benchmark)
    run = open_run(benchmark="mine", root=str(tmp_path / "own"))
    prepare_if_changed(run.benchmark, run.home, seed=0)
    return tmp_path


def train_in(root):
    """Train there, as a process of its own does too."""
    import torch

    torch.set_num_threads(1)
    work_in(pytest.MonkeyPatch(), root)
    return train(open_run(benchmark="mine", root=str(root / "own")), DENOISER, 0)


def logged():
    """Of each run of the experiment, oldest first: its id, its status, the steps that it has samples of."""
    client = open_tracking()
    experiment = client.get_experiment_by_name("diffguard")
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
    assert not list((begun / "data" / "mine" / "other" / "training").iterdir())


def test_a_failed_training_goes_on_in_its_run_if_that_is_there(begun, monkeypatch):
    def fail_at(number):
        calls = iter(range(number))
        monkeypatch.setattr(tasks.train, "sample_grid", lambda each: [next(calls), sample_grid(each, rows=1)][1])
        with pytest.raises(StopIteration):
            train_in(begun)

    fail_at(2)
    [(first, *rest)] = logged()
    assert rest == ["FAILED", [1, 2]]
    fail_at(1)
    assert logged() == [(first, "FAILED", [1, 2, 4])]
    open_tracking().delete_run(first)
    monkeypatch.setattr(tasks.train, "sample_grid", lambda each: sample_grid(each, rows=1))
    train_in(begun)
    [(second, *rest)] = logged()
    assert rest == ["FINISHED", list(range(6, STEPS + 1))]
    assert second != first
