"""A lock that says who holds it, and ends with its process."""

import json
import os
import signal
import subprocess
import sys
import time

from tasks.common.ending import end_processes, interrupt_threads, interruptible
from tasks.common.exclusive import exclusive

HOLDER = """
import sys, time
from pathlib import Path
from tasks.common.exclusive import exclusive
with exclusive(Path(sys.argv[1]), "data/digits", "flow run blue-fox"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_who_waits_is_told_of_the_holder_and_goes_on_when_that_is_killed(tmp_path, capfd):
    lock = tmp_path / "evaluation.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    waiting = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE)
    told = waiting.stdout.readline().decode()
    assert told.startswith("data/digits is in use by flow run blue-fox (process ")
    assert f"(process {holder.pid} on " in told
    time.sleep(1)
    assert waiting.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert waiting.stdout.readline() == b"held\n"
    assert json.loads(lock.with_suffix(".json").read_text())["pid"] == waiting.pid
    waiting.kill()
    waiting.wait()
    with exclusive(lock, "data/digits", "me"):  # a note of the dead is no holder
        assert "in use" not in capfd.readouterr().out
    assert not lock.with_suffix(".json").exists()


def test_a_thread_at_work_is_interrupted_and_no_other():
    from concurrent.futures import ThreadPoolExecutor

    def work(can_be: bool) -> str:
        until = time.monotonic() + (60 if can_be else 3)
        try:
            if can_be:
                with interruptible():
                    while time.monotonic() < until:
                        time.sleep(0.01)
            else:
                while time.monotonic() < until:
                    time.sleep(0.01)
        except KeyboardInterrupt:
            return "interrupted"
        return "finished"

    with ThreadPoolExecutor(2) as pool:
        works = [pool.submit(work, can_be) for can_be in (True, False)]
        time.sleep(0.5)
        interrupt_threads()
        assert [work.result(timeout=30) for work in works] == ["interrupted", "finished"]


def test_a_process_that_does_not_end_when_asked_is_killed():
    import psutil

    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    process = psutil.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    process.stdout.readline()
    end_processes([process], seconds=0.5)
    assert not process.is_running()
