import runpy
import sys

import pytest
from small_project import make_project

from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.score.stage import score


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project folder with a finished run."""
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("project")
    make_project(patch, root)
    score(open_run())
    yield root
    patch.undo()


@pytest.fixture
def script(monkeypatch):
    """A script of experiments/ by name: its functions, or, with options, a run of it as from the command line."""

    def call(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        return runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__" if options else name)

    return call
