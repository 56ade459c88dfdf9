"""The command `diffguard train`, and the DVC stage."""

import argparse
import signal
import sys
from collections.abc import Sequence

from tasks.config.run import open_run
from tasks.prepare.stage import make_ready
from tasks.train.stage import train


def command(arguments: Sequence[str] | None = None) -> int:
    """`diffguard train`, and the DVC stage; returns the exit code."""
    parser = argparse.ArgumentParser(prog="diffguard train", description=__doc__)
    parser.add_argument("model", help="denoiser, or a classifier's name in the benchmark")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--benchmark", help="a file of data/benchmarks/; params.yaml's if not given")
    parser.add_argument("--root", help="what {root} stands for in its paths")
    parser.add_argument("--minutes", type=float, help="a time budget, in place of the benchmark file's")
    parser.add_argument("--from", dest="start", help="folder of a denoiser of the same network, whose weights it takes")
    parser.add_argument("--finish", type=float, help="end a denoiser's training in so many minutes from where it is")
    options = parser.parse_args(arguments)
    run = open_run(benchmark=options.benchmark, root=options.root)
    if run.recorded_seeds is None:
        make_ready(run.benchmark, run.home, run.params.prepare.seed)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        folder = train(
            run, options.model, options.seed, minutes=options.minutes, start=options.start, finish=options.finish
        )
    except KeyboardInterrupt:
        print(f"interrupted; {options.model} is saved as it is: the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    print(folder)
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
