"""How OpenMP's threads wait: what programs set, in processes of their own, where torch is not imported yet."""

import os
import subprocess
import sys

import pytest
from PIL import Image

WATCHED = """if True:
    import sys

    def tell(event, arguments):
        if event == "os.putenv" and arguments[0] == b"OMP_WAIT_POLICY":
            print("set:", arguments[1].decode(), "torch" in sys.modules, flush=True)

    sys.addaudithook(tell)
"""
"""Prints each change of the variable, and whether torch was there."""

COMMAND_LINE = "from diffguard.cli.main import main; main(['score', 'no.png', '--detector', 'no'])"
SERVER = "from diffguard.cli.main import main; main(['serve', '--port', '0', '--detector', 'no', '--device', 'cpu'])"
STAGE = "import runpy; sys.argv = ['score', '--help']; runpy.run_module('tasks.score', run_name='__main__')"


def printed(code, **variables):
    """Lines of a process without the two variables of this one."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", f"{WATCHED}\n{code}"]
    done = subprocess.run(command, env={**inherited, **variables}, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    "program",
    [COMMAND_LINE, SERVER, STAGE, "import tasks.workflow", "import flows.evaluate", "import diffguard.mlflow"],
    ids=["command line", "server", "stage", "workflow", "flow", "flavor"],
)
def test_programs_let_threads_sleep_before_torch_is_imported(program):
    lines, errors = printed(program)
    assert lines[:1] == ["set: passive False"], errors


@pytest.mark.parametrize("variables", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "100"}])
@pytest.mark.parametrize("program", [COMMAND_LINE, "import tasks", "import flows"])
def test_what_the_user_has_set_stays(program, variables):
    held = "import atexit, os; atexit.register(lambda: print('at the end:', os.environ.get('OMP_WAIT_POLICY')))"
    lines, errors = printed(f"{held}\n{program}", **variables)
    assert lines == [f"at the end: {variables.get('OMP_WAIT_POLICY')}"], errors


def test_the_library_leaves_the_environment_as_it_is():
    lines, errors = printed("from diffguard import Engine, open_detector; print('torch' in sys.modules)")
    assert lines == ["True"], errors


def test_openmp_is_told(tmp_path):
    """By the settings that GNU's library prints when it is loaded: no turns of a loop before a thread sleeps."""
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    program = f"from diffguard.cli.main import main; main(['score', {str(tmp_path)!r}, '--detector', 'no'])"
    _, errors = printed(program, OMP_DISPLAY_ENV="verbose")
    if "GOMP_SPINCOUNT" not in errors:
        pytest.skip("torch is built with another OpenMP library")
    assert "GOMP_SPINCOUNT = '0'" in errors
