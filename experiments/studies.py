"""From the command of each study to its page, on a fresh clone, one after the other: `python -m flows.study`.

    python experiments/studies.py [--benchmark digits] [--studies baseline guidance] [--output FILE]

Before them an evaluation of next to nothing prepares the images and trains the models that all of them use, in
`first_run_seconds`.
"""

import argparse
import json
from pathlib import Path

from pipeline import ROOT, fresh_clone, run_flow
from processor import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="digits")
    parser.add_argument("--studies", nargs="+", help="all of data/studies/ if not given")
    parser.add_argument("--output", type=Path, help="also write JSON")
    options = parser.parse_args()
    studies = options.studies or sorted({path.stem for path in (ROOT / "data" / "studies").glob("*.yaml")} - {"dvc"})
    with fresh_clone() as clone:
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
    done, seconds = run_flow(clone, *command)
    return done.stdout.strip().splitlines()[-1] if done.returncode else seconds


if __name__ == "__main__":
    main()
