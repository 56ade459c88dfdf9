import runpy
import sys

import pytest
from small_project import make_project

from tasks.run import open_run
from tasks.score import score
from tasks.settings import ROOT


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
    """A script of benchmarks/ by name: its functions, or, with options, a run of it as from the command line."""

    def call(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        return runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__" if options else name)

    return call
