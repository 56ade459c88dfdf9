"""DVC as flows call it."""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import tasks.config.project
import tasks.services.dvc
from diffguard.errors import DataError
from tasks.config.project import ROOT


def test_a_copy_that_is_no_repository_is_told_what_to_do(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text((ROOT / ".dvc" / "config").read_text())
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.setattr(tasks.config.project, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(DataError, match=r"DVC works in a git repository, which this copy is not; run there: git init$"):
        tasks.services.dvc.run_dvc("status")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    tasks.services.dvc.run_dvc("status")


def test_a_stage_ends_when_it_is_told_to_and_dvc_is_free_again(tmp_path, monkeypatch):
    """As when a flow is cancelled while it trains: in the main thread and, by `end_dvc`, in others."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text((ROOT / ".dvc" / "config").read_text())
    (tmp_path / "dvc.yaml").write_text("stages:\n  long:\n    cmd: touch begun; exec sleep 600\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(tasks.config.project, "ROOT", tmp_path)
    before = set(psutil.Process().children(recursive=True))  # of tests that ran in this process

    def in_stage():
        until = time.monotonic() + 120
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        return set(psutil.Process().children(recursive=True)) - before

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(tasks.services.dvc.run_dvc, "repro", "long")
        below = in_stage()
        assert "sleep" in {process.name() for process in below}
        tasks.services.dvc.end_dvc()
        assert psutil.wait_procs(list(below), timeout=10)[1] == []
        assert run.exception(timeout=10) is None or isinstance(run.exception(), DataError)
    tasks.services.dvc.run_dvc("status")  # no lock is left
