"""From the command of each study to its page, on a fresh clone, one after the other: `python -m flows.study`.

    python experiments/studies.py [--benchmark digits] [--studies baseline guidance] [--output FILE]

Before them an evaluation of next to nothing prepares the images and trains the models that all of them use, in
`first_run_seconds`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processor import machine

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="digits")
    parser.add_argument("--studies", nargs="+", help="all of data/studies/ if not given")
    parser.add_argument("--output", type=Path, help="also write JSON")
    options = parser.parse_args()
    studies = options.studies or sorted({path.stem for path in (ROOT / "data" / "studies").glob("*.yaml")} - {"dvc"})
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        (clone / ".venv").symlink_to(Path(sys.prefix))
        of_benchmark = ("--benchmark", options.benchmark)
        first = seconds_of(clone, "flows.evaluate", *of_benchmark, "--variants", "msp", "--limit", "5")
        seconds: dict[str, float | str] = {}
        for study in studies:
            seconds[study] = seconds_of(clone, "flows.study", "--study", study, *of_benchmark)
            print(f"{study}: {seconds[study]}", flush=True)
    found = {
        "command": f"python experiments/studies.py --benchmark {options.benchmark}",
        "machine": machine(),
        "benchmark": options.benchmark,
        "first_run_seconds": first,
        "seconds": seconds,
    }
    print(json.dumps(found, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def seconds_of(clone: Path, *command: str) -> float | str:
    """Seconds of a flow; or the line that it ended with."""
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
    if done.returncode:
        return done.stdout.strip().splitlines()[-1]
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
