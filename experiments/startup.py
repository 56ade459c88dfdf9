"""Start-up: how long `diffguard --help` and `diffguard score` of one image take, on one thread.

    python experiments/startup.py [--detector data/digits/detector] [--against FOLDER]
        [--output experiments/results/startup.json]

Each run is a process of its own, after one that is not counted, which fills the file cache and Python's cache of
bytecode. With --against, the folder of another checkout with a .venv of its own, its runs alternate with this one's,
so that a ratio is of the same minutes. Besides elapsed seconds, those of the processor are recorded (user and system),
which other work on the machine changes less.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DECIDED = (0, 3)
"""Exit codes of `diffguard score`: the image is in-distribution, or OOD."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path, default=ROOT / "data/digits/detector", help="a bundle's folder")
    parser.add_argument("--image", type=Path, help="an image file; the bundle's example if not given")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, with its .venv")
    parser.add_argument("--repeats", type=int, default=7, help="of each command (7)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    detector = options.detector.resolve()
    image = (options.image or detector / "example.png").resolve()
    commands = {"help": ["--help"], "score": ["score", str(image), "--detector", str(detector), "--device", "cpu"]}
    checkouts = {"this": (Path(sys.executable), ROOT)}
    if options.against is not None:
        checkouts["against"] = (options.against.absolute() / ".venv/bin/python", options.against.absolute())
    report = {
        "command": f"python experiments/startup.py --repeats {options.repeats}"
        + (" --against CHECKOUT" if options.against else ""),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": platform.machine(),
            "threads": 1,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "diffusers")},
        },
        "commands": {name: measure(words, checkouts, options.repeats) for name, words in commands.items()},
    }
    print(table(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(words: list[str], checkouts: dict[str, tuple[Path, Path]], repeats: int) -> dict[str, Any]:
    """A command's seconds in each checkout, one run after the other in turn, and what the medians' ratios are."""
    runs: dict[str, dict[str, list[float]]] = {name: {"elapsed": [], "processor": []} for name in checkouts}
    for number in range(repeats + 1):
        for name, (python, folder) in checkouts.items():
            seconds = run(python, folder, words)
            if number:  # the first one fills the caches
                for kind, value in seconds.items():
                    runs[name][kind].append(value)
    measured: dict[str, Any] = {
        name: {"median": {kind: statistics.median(values) for kind, values in seconds.items()}, "runs": seconds}
        for name, seconds in runs.items()
    }
    if "against" in measured:
        this, other = measured["this"]["median"], measured["against"]["median"]
        measured["times_faster"] = {kind: round(other[kind] / this[kind], 2) for kind in this}
    return measured


def run(python: Path, folder: Path, words: list[str]) -> dict[str, float]:
    """Seconds of one process that runs the command of a checkout on one thread."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # The working folder is no project, whose code or settings a command could take up.
    with tempfile.TemporaryDirectory() as empty:
        before, start = os.times(), time.perf_counter()
        done = subprocess.run(
            [python, "-m", "diffguard.cli.main", *words], cwd=empty, env=environment, capture_output=True, text=True
        )
        elapsed, after = time.perf_counter() - start, os.times()
    if done.returncode not in DECIDED:
        sys.exit(f"error: {folder.name}: diffguard {words[0]} ended with {done.returncode}: {done.stderr[-300:]}")
    processor = after.children_user - before.children_user + after.children_system - before.children_system
    return {"elapsed": round(elapsed, 3), "processor": round(processor, 3)}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| command | checkout | seconds | of the processor |", "|---|---|---|---|"]
    for name, measured in report["commands"].items():
        for checkout in ("this", "against"):
            if checkout in measured:
                median = measured[checkout]["median"]
                lines.append(f"| {name} | {checkout} | {median['elapsed']:.2f} | {median['processor']:.2f} |")
        if ratio := measured.get("times_faster"):
            lines.append(f"| {name} | times faster | {ratio['elapsed']:.2f} | {ratio['processor']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
