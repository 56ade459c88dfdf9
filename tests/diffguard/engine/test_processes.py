"""Engines in several processes: the scores of one, and what happens when something ends too early."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from copy import deepcopy
from pathlib import Path
from threading import Lock

import psutil
import pytest
import torch
from engine_variants import VARIANTS

from diffguard.engine import (
    Engine,
    EngineProcesses,
    Request,
    Sample,
    Tuning,
    core_count,
    engine_for,
    open_processes,
)
from diffguard.engine.processes import CHUNK
from diffguard.errors import DataError, ServiceError, SettingError
from diffguard.settings import LabelGuidance, Variant

TUNING = Tuning(slots=4, channels_last=False, flushes_denormals=False, rate=1.0, precision="float32")
"""So slow a rate that anything is worth processes."""


@pytest.fixture(scope="module")
def many():
    return torch.rand(37, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def requests(classifier):
    return [Request(classifier, variant) for variant in VARIANTS.values()]


def samples(images):
    return (Sample(("row", row), image, unconditional=row == 3) for row, image in enumerate(images))


@pytest.fixture(scope="module")
def alone(many, denoiser, requests):
    engine = Engine(denoiser, requests, slots=4)
    return dict(engine.run(samples(many))), engine.stats


@pytest.fixture(scope="module")
def processes(denoiser, requests):
    with EngineProcesses(denoiser, requests, TUNING, processes=2) as engine:
        engine.start()
        yield engine


def workers():
    children = psutil.Process().children(recursive=True)
    return {child for child in children if "LokyProcess" in " ".join(child.cmdline())}


@pytest.fixture
def own_workers():
    """The processes that a test has started and that are not ended."""
    before = workers()
    return lambda: workers() - before


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr("diffguard.engine.processes.core_count", lambda: 2)


def test_they_score_as_one_engine_does(many, alone, processes):
    results, stats = alone
    shared = dict(processes.run(samples(many)))
    assert shared.keys() == results.keys()
    for key, by_request in results.items():
        for index, result in by_request.items():
            other = shared[key][index]
            assert other.score == pytest.approx(result.score, rel=1e-4, abs=1e-7)  # of differences of L1 distances too
            assert (other.label, other.level) == (result.label, result.level)
            if result.reconstruction is not None:
                assert torch.allclose(other.reconstruction, result.reconstruction, atol=1e-4)
    assert shared["row", 3][0].unconditional is not None
    assert processes.stats.evaluations == stats.evaluations
    assert processes.stats.gradients == stats.gradients


@pytest.mark.parametrize("count", [0, 1, 3, 2 * CHUNK + 1])
def test_any_number_of_images_comes_back_once(count, many, processes):
    images = many[torch.arange(count) % len(many)]
    assert sorted(key for key, _ in processes.run(samples(images))) == [("row", row) for row in range(count)]


def test_images_are_taken_as_they_are_needed(many, denoiser, requests):
    taken = []

    def source():
        for row in range(1000):
            taken.append(row)
            yield Sample(row, many[row % len(many)])

    with EngineProcesses(denoiser, requests, TUNING, processes=2) as engine:
        next(engine.run(source()))
    assert len(taken) <= 2 * 2 * 2 * TUNING.slots  # two chunks for each of two processes, and the next ones


def test_an_error_there_is_an_error_here(many, denoiser, requests, own_workers):
    with EngineProcesses(denoiser, requests, TUNING, processes=2) as engine:
        with pytest.raises(DataError, match=r"image wrong is \(1, 9, 9\)"):
            list(engine.run([*samples(many[:3]), Sample("wrong", torch.rand(1, 9, 9))]))
        assert not own_workers()


def test_a_wrong_request_is_refused_before_a_process_starts(denoiser, classifier):
    unfitted = VARIANTS["cfg-w1"].model_copy(update={"label": "predicted", "distance": "path", "path": None})
    with pytest.raises(SettingError):
        EngineProcesses(denoiser, [Request(classifier, unfitted)], TUNING, processes=2)


def test_a_killed_process_is_one_clear_error_that_may_pass(many, denoiser, requests, own_workers):
    with EngineProcesses(denoiser, requests, TUNING, processes=2) as engine:
        run = engine.run(samples(many.repeat(20, 1, 1, 1)))
        next(run)
        own_workers().pop().kill()
        with pytest.raises(ServiceError, match="a process that scores was killed"):
            list(run)
        assert not own_workers()


def test_a_model_that_cannot_be_sent_is_scored_here(many, denoiser, classifier, caplog, two_cores):
    held = deepcopy(classifier)
    held.lock = Lock()  # which belongs to one process
    requests = [Request(held, VARIANTS["cfg-w1"])]
    assert open_processes(denoiser, requests, TUNING, images=100) is None
    assert "cannot be sent to others" in caplog.text
    with engine_for(denoiser, requests, TUNING, images=100) as engine:
        assert len(list(engine.run(samples(many[:3])))) == 3


def test_little_work_and_one_core_are_not_worth_processes(denoiser, requests, two_cores):
    quick = Tuning(4, False, False, rate=1e9, precision="float32")
    assert open_processes(denoiser, requests, quick, images=1000) is None
    assert open_processes(denoiser, requests, TUNING, images=1000, most=1) is None
    assert open_processes(denoiser, requests, TUNING, images=1) is None
    assert open_processes(denoiser, [], TUNING, images=1000) is None
    with open_processes(denoiser, requests, TUNING, images=1000) as engine:
        assert engine.processes == 2


def test_cores_are_those_that_torch_was_given(monkeypatch):
    code = "from diffguard.engine import core_count; print(core_count())"
    for threads, cores in (("1", 1), ("2", min(2, len(os.sched_getaffinity(0))))):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) == cores
    assert core_count() >= 1


SCRIPT = """
    import sys, time
    from pathlib import Path
    import torch
    from diffguard.engine import EngineProcesses, Request, Sample, Tuning
    from diffguard.models.classifiers.small import ConvClassifier
    from diffguard.settings import LabelGuidance, Variant
    sys.path.insert(0, {support!r})
    from small_detector import tiny_denoiser

    print("main", flush=True)

    class Mine(ConvClassifier):
        "Defined here, in a program without a guard of its main part."

    variant = Variant(stop=2, guidance=LabelGuidance(), distance="l1")
    classifier = Mine(num_classes=6, width=4).eval().requires_grad_(False)
    tuning = Tuning(4, False, False, 1.0, "float32")
    engine = EngineProcesses(tiny_denoiser(), [Request(classifier, variant)], tuning, processes=2)
    samples = (Sample(row, torch.rand(1, 8, 8)) for row in range({count}))
    for done, _ in enumerate(engine.run(samples), 1):
        print(done, flush=True)
"""


@pytest.fixture
def script(tmp_path):
    def begin(count):
        support = str(Path(__file__).parents[2] / "support")
        (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT).format(support=support, count=count))
        return subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def test_a_program_without_a_guard_runs_once_and_its_classes_go_along(script, tmp_path):
    process = script(count=5)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.split() == ["main", "1", "2", "3", "4", "5"]
    assert not list(tmp_path.glob("diffguard-*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_program_and_leave_nothing(number, script, tmp_path):
    process = script(count=100_000)
    for line in process.stdout:
        if line.strip() == "1":
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(number)
    process.stdout.read()
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    deadline = time.monotonic() + 20
    while list(tmp_path.glob("diffguard-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(tmp_path.glob("diffguard-*"))


def test_weights_are_shared_not_copied(denoiser, classifier, own_workers):
    """Each process maps the one file."""
    request = Request(classifier, Variant(stop=2, guidance=LabelGuidance(), distance="l1"))
    with EngineProcesses(denoiser, [request], TUNING, processes=2) as engine:
        engine.start()
        list(engine.run(Sample(row, torch.rand(1, 8, 8)) for row in range(40)))
        mapped = [any("engine.pt" in each.path for each in worker.memory_maps()) for worker in own_workers()]
    assert mapped == [True, True]
