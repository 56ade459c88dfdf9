"""A scoring run that is killed at any moment goes on where it was."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from small_project import work_in, write_params

from tasks.config.run import open_run
from tasks.score.plan import missing, open_store, plan
from tasks.score.stage import score, score_shards


def score_in(root: Path, ready) -> None:
    """What a worker process runs."""
    import torch

    torch.set_num_threads(1)
    work_in(pytest.MonkeyPatch(), root)
    run = open_run()
    ready.set()
    score(run)


def shrink(root, change=lambda params: None):
    def all_of_it(params):
        params["classifiers"] = ["ordinary"]
        params["score"].update(shard_size=2, slots=8)
        change(params)

    write_params(root, all_of_it)


@pytest.fixture
def small(project, tmp_path, monkeypatch):
    """The project, with nothing scored and many small shards."""
    for name in ("benchmarks", "digits"):
        shutil.copytree(
            project / "data" / name, tmp_path / "data" / name, ignore=shutil.ignore_patterns("scores", "other")
        )
    shrink(tmp_path)
    work_in(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def processes():
    """Processes that have the libraries imported, and nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers", "pytorch_grad_cam", "pytorch_ood", "tasks.score.stage", "tasks.log"])
    return context


def written(root):
    return {path: path.stat().st_mtime_ns for path in (root / "data").rglob("shard-*.parquet")}


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_lose_no_row_and_repeat_no_finished_shard(small, processes, kills):
    items = score(open_run())
    expected = {item.title: item.read() for item in items}
    shutil.move(small / "data/digits/scores", small / "undisturbed")
    rng, kept, grew = random.Random(0), {}, 0
    for _ in range(kills):
        ready = processes.Event()
        process = processes.Process(target=score_in, args=(small, ready))
        process.start()
        assert ready.wait(60)
        # At a moment between starting to load models and a little after a few more tables.
        more, longest = rng.choice([0, 0, 1, 3]), time.monotonic() + 60
        while len(written(small)) < len(kept) + more and time.monotonic() < longest:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15 if more else 1.0))
        assert process.exitcode is None, "finished before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        now = written(small)
        assert kept.items() <= now.items(), "a finished shard was written again"
        grew += len(now) > len(kept)
        kept = now
    assert grew > kills // 4
    assert missing(open_run(), plan(open_run())), "nothing was left to resume"

    items = score(open_run())
    assert kept.items() <= written(small).items()
    flips = []
    for item in items:
        table, other = item.read(), expected[item.title]
        assert table["id"].tolist() == other["id"].tolist() == open_run().scored["id"].tolist()
        same = table["steps"] == other["steps"]
        flips += [(item.title, *row) for row in table[~same][["id", "steps"]].itertuples(index=False)]
        assert np.allclose(table["score"][same], other["score"][same], atol=1e-4), item.title
    assert not flips, f"stop indices that differ: {flips}"


def test_a_changed_setting_never_mixes_scores(small):
    run = open_run()
    score_shards(run, plan(run), [0, 1, 2], "cpu")
    half = written(small)
    shrink(small, lambda params: params["score"]["variants"]["cfg-w1"].update(stop=3))
    items = score(open_run())
    for item in items:
        item.read()  # refuses a shard that was made by anything else
        if item.name == "cfg-w1":
            assert not any(path.parent == item.folder.path for path in half)
    # What the change does not touch was not scored again; the rest was put away by its old name.
    now = {(path.parent.name, path.name): at for path, at in written(small).items()}
    assert all(now[path.parent.name, path.name] == at for path, at in half.items())


def test_a_shard_that_another_run_is_at_work_on_comes_last(small, capsys):
    run = open_run()
    items = plan(run)
    mine, holds = [item for item in items if item.name == "cfg-w1"], Event()

    def other_run():
        with open_store(run).lock([item.folder for item in mine], 1, wait=False):
            holds.set()
            # Until this run has nothing else to do, and a little longer.
            while missing(run, mine) != [1]:
                time.sleep(0.05)
            time.sleep(1)

    other = Thread(target=other_run)
    other.start()
    holds.wait()
    score_shards(run, mine, range(run.shards), "cpu")
    other.join()
    assert "waiting for another run that scores shard 1" in capsys.readouterr().out
    assert not missing(run, mine)
    times = {path.name: at for path, at in written(small).items()}
    assert max(times, key=times.get) == "shard-00001.parquet"
