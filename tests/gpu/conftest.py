"""Tests of what only a GPU does. Elsewhere they are skipped; DIFFGUARD_TEST_DEVICE=cpu runs what a processor can."""

import os
from pathlib import Path

import pytest
import torch

OUTCOMES = {}


def pytest_runtest_logreport(report):
    """Of a run of experiments/gpu, what each test came to, as soon as it is over: the time may end before the last."""
    folder = os.environ.get("DIFFGUARD_RESULTS")
    if folder is None or not (report.when == "call" or report.skipped or report.failed):
        return
    from results import Results

    OUTCOMES[report.nodeid.rpartition("::")[2]] = [report.outcome, round(report.duration, 1)]
    Results(Path(folder)).add("tests", OUTCOMES)


@pytest.fixture(scope="session")
def device():
    name = os.environ.get("DIFFGUARD_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU with CUDA here")
    return torch.device(name)


@pytest.fixture
def gpu(device):
    if device.type != "cuda":
        pytest.skip("of CUDA alone")
    return device
