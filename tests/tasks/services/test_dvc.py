"""DVC as flows call it."""

import subprocess

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
