"""From start to table: `python -m flows.evaluate` on a fresh clone, of this revision and, in turns, of another.

    python experiments/pipeline.py [--against REVISION] [--repeats 1] [--output experiments/results/pipeline.json]

Each run is on a clone of its own, with nothing prepared or trained, with this environment's packages and each
revision's own code. The seconds of training and scoring are those between the ends of the flow's tasks.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from processor import machine

ROOT = Path(__file__).parents[1]
FINISHED = re.compile(r"^(\d\d:\d\d:\d\d\.\d+) .*Task run '(check|train|score|log)[^']*' - Finished in state Completed")


@contextmanager
def fresh_clone(revision: str = "HEAD") -> Iterator[Path]:
    """A clone of this repository with nothing prepared or trained, and this environment's packages."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        subprocess.run(["git", "checkout", "-q", revision], cwd=clone, check=True)
        (clone / ".venv").symlink_to(Path(sys.prefix))
        yield clone


def run_flow(clone: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a module of a clone's with the clone's own code; returns what it printed, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=clone,
        env={**os.environ, "DO_NOT_TRACK": "1", "PYTHONPATH": str(clone)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done, time.perf_counter() - began


def seconds_of(revision: str) -> dict[str, float]:
    """Seconds in all, of training, of scoring and of the rest, of one run on a fresh clone."""
    with fresh_clone(revision) as clone:
        done, whole = run_flow(clone, "flows.evaluate")
    if done.returncode:
        sys.exit(f"error: the run of {revision} failed:\n{done.stdout[-2000:]}")
    ends: dict[str, datetime] = {}
    for line in done.stdout.splitlines():
        if found := FINISHED.match(line):
            ends[found[2]] = datetime.strptime(found[1], "%H:%M:%S.%f")
    training = (ends["train"] - ends["check"]).total_seconds()
    scoring = (ends["score"] - ends["train"]).total_seconds()
    return {"whole": whole, "training": training, "scoring": scoring, "rest": whole - training - scoring}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="another revision of this repository")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    revisions = {"now": "HEAD"} if options.against is None else {"before": options.against, "now": "HEAD"}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in revisions}
    for _ in range(options.repeats):
        for name, revision in revisions.items():
            times[name].append(seconds_of(revision))
            print(name, times[name][-1], file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        "command": "python experiments/pipeline.py" + ("" if options.against is None else " --against REVISION"),
        "machine": machine(),
        "revisions": {
            name: subprocess.run(
                ["git", "rev-parse", "--short", revision], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
            ).stdout.strip()
            for name, revision in revisions.items()
        },
        "seconds": {
            name: {part: median(run[part] for run in runs) for part in runs[0]} for name, runs in times.items()
        },
    }
    print(json.dumps(report["seconds"], indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
