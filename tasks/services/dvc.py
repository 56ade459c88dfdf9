"""Running DVC from a flow, with this interpreter, in the project's folder."""

import os
import subprocess
import sys
from pathlib import Path
from threading import Lock

from diffguard.errors import DataError, ServiceError
from tasks.common.ending import end_tree
from tasks.config import project

END_SECONDS = 2.0
"""For a DVC command and its stage to end when they are told to."""

_running: set[int] = set()
_lock = Lock()


def run_dvc(*arguments: str) -> None:
    """Run a DVC command and pass its output through.

    Raises:
        ServiceError: another DVC process holds the lock.
        DataError: the command failed; the message is the failed stage's own.
    """
    environment = {
        **os.environ,
        "DVC_NO_ANALYTICS": "1",
        "DVC_IGNORE_ISATTY": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    command = [sys.executable, "-m", "dvc", *arguments]
    tail = ""
    with subprocess.Popen(
        command, cwd=project.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            with _lock:
                _running.add(process.pid)
            assert process.stdout is not None
            while chunk := os.read(process.stdout.fileno(), 4096):
                text = chunk.decode(errors="replace")
                sys.stderr.write(text)
                sys.stderr.flush()
                tail = (tail + text)[-8000:]
        except BaseException:
            end_tree(process.pid, END_SECONDS)
            raise
        finally:
            with _lock:
                _running.discard(process.pid)
    if process.returncode == 0:
        return
    lines = [line.strip() for line in tail.replace("\r", "\n").splitlines() if line.strip()]
    if any("Unable to acquire lock" in line or "is busy, it is being blocked by" in line for line in lines):
        raise ServiceError("DVC is busy: another dvc command is at work in this project; wait for it, or end it")
    reasons = [line for line in lines if line.lower().startswith("error: ")]
    reason = reasons[0][len("error: ") :] if reasons else (lines[-1] if lines else "no output")
    if "is not a git repository" in reason:
        raise DataError(f"{project.ROOT}: DVC works in a git repository, which this copy is not; run there: git init")
    raise DataError(f"dvc {' '.join(arguments)} failed: {reason}")


def end_dvc() -> None:
    """End the DVC commands that threads of this process run, and their stages."""
    with _lock:
        running = sorted(_running)
    for pid in running:
        end_tree(pid, END_SECONDS)
