"""What the engine's own Python costs beside its networks, and in which part of it.

    OMP_NUM_THREADS=1 python experiments/python_share.py [--images 300] [--against FOLDER]
        [--output experiments/results/python_share.json]

One engine scores images of a benchmark under all variants of params.yaml, on one thread, with the trained models of a
finished run. What is not the denoiser's network, a classifier, a distance, encoding or decoding, or a gradient of
guidance is the engine's own, small tensor operations included. Its CPU time comes from runs in which nothing but these
calls is timed; its split by part from runs under cProfile, which makes small calls look dearer than they are: built-in
functions count where they are called. `--against` does the same with the code of another checkout, in turns with this
one; its `.venv` is used if it has one.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import diffguard
import diffguard.engine.admission as admission
import diffguard.engine.results as results
from diffguard.diffusion import sampler
from diffguard.diffusion.guidance import CleanGradient
from diffguard.engine import Engine, Request, Sample
from diffguard.models.denoisers.base import DenoiserWrapper
from tasks.common.files import read_images
from tasks.config.run import Run, open_run
from tasks.models.loaded import Models, load_models

NETWORKS = ("denoiser", "encode and decode", "classifiers", "distances", "gradients")
PARTS = {
    "engine/queue.py": "queue",
    "engine/stepper.py": "stepper",
    "engine/trajectory.py": "trajectory",
    "engine/arithmetic.py": "arithmetic",
    "diffusion/ddim.py": "arithmetic",
    "diffusion/early_stop.py": "arithmetic",
    "diffusion/path_statistics.py": "arithmetic",
    "diffusion/schedules.py": "arithmetic",
    "diffusion/sampler.py": "arithmetic",
    "engine/pool.py": "pool",
    "engine/admission.py": "admission",
    "engine/plan.py": "plan",
    "engine/results.py": "results",
    "engine/types.py": "results",
    "engine/engine.py": "engine",
    "utils/memory.py": "engine",
}
"""The engine's own, by the end of the file's path; anything else counts where it is called from."""

Function = tuple[str, int, str]
"""As pstats names one: file, line, name."""


class Stopwatch:
    """CPU seconds within network calls; a call inside another counts as the outer one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._is_running = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def network_call(*args: Any, **options: Any) -> Any:
            if self._is_running:
                return function(*args, **options)
            self._is_running, started = True, time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.process_time() - started
                self._is_running = False

        # cProfile tells functions apart by their code's name.
        network_call.__code__ = network_call.__code__.replace(co_name=f"network call: {name}")
        return network_call


class TimedDenoiser(DenoiserWrapper):
    """A denoiser whose calls are timed."""

    def __init__(self, denoiser: Any, stopwatch: Stopwatch) -> None:
        super().__init__(denoiser)
        self.eps = stopwatch.timed("denoiser", denoiser.eps)
        self.encode = stopwatch.timed("encode and decode", denoiser.encode)
        self.decode = stopwatch.timed("encode and decode", denoiser.decode)


@contextmanager
def network_calls_timed(stopwatch: Stopwatch) -> Iterator[None]:
    """Time classifiers, distances and gradients where the engine calls them."""

    def timed_distance(get_distance: Callable[[str], Any], name: str) -> Callable[..., Tensor]:
        return stopwatch.timed("distances", get_distance(name))

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (admission, "predict_logits", partial(stopwatch.timed, "classifiers")),
        (admission, "cam_mask", partial(stopwatch.timed, "classifiers")),
        (CleanGradient, "__call__", partial(stopwatch.timed, "gradients")),
        (results, "get_distance", lambda get_distance: partial(timed_distance, get_distance)),
        (sampler, "get_distance", lambda get_distance: partial(timed_distance, get_distance)),
    ]
    originals = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, wrap), original in zip(places, originals, strict=True):
        setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


class Workload:
    """Images of a finished run, and requests of all its classifiers and variants."""

    def __init__(self, run: Run, images: int, slots: int | None) -> None:
        models: Models = load_models(run, run.params.seeds[0], "cpu")
        step = max(1, len(run.scored) // images)
        self.images = read_images(run.home, run.scored.iloc[::step][:images])
        self.slots, self._denoiser = slots or models.tuning.slots, models.denoiser
        self._requests = [
            Request(models.classifiers[classifier], models.fitted(classifier, name))
            for classifier in run.params.classifiers
            for name in run.params.score.variants
        ]

    def score(self, stopwatch: Stopwatch, images: int | None = None) -> tuple[Engine, dict[Any, dict[int, Any]]]:
        """An engine that has scored so many of the images, and its results."""
        engine = Engine(TimedDenoiser(self._denoiser, stopwatch), self._requests, slots=self.slots)
        with network_calls_timed(stopwatch):
            return engine, dict(engine.run(Sample(row, image) for row, image in enumerate(self.images[:images])))


def measure(workload: Workload) -> dict[str, Any]:
    """CPU and wall time of one run in all, within network calls and in the engine itself, and what it gave."""
    workload.score(Stopwatch(), images=2 * workload.slots)
    stopwatch, wall, cpu = Stopwatch(), time.perf_counter(), time.process_time()
    engine, by_row = workload.score(stopwatch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    profiler = cProfile.Profile()
    profiler.runcall(workload.score, Stopwatch())
    scores = [result.score for _, by_request in sorted(by_row.items()) for _, result in sorted(by_request.items())]
    return {
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "network_seconds": {name: stopwatch.seconds[name] for name in NETWORKS},
        "own_seconds": cpu - sum(stopwatch.seconds.values()),
        "profiled_seconds": by_part(pstats.Stats(profiler)),
        "calls": engine.stats.calls,
        "evaluations": engine.stats.evaluations,
        "gradients": engine.stats.gradients,
        "scores": scores,
    }


def by_part(stats: pstats.Stats) -> dict[str, float]:
    """Seconds of the engine's own by part: of the functions there, and of all that is called from them alone."""
    table: dict[Function, Any] = stats.stats  # type: ignore[attr-defined]
    home = str(Path(diffguard.__file__).parent)
    shares: dict[Function, dict[str, float]] = {}

    def owner(function: Function) -> str | None:
        file, _, name = function
        if name.startswith("network call"):
            return "networks"
        return PARTS.get(file.removeprefix(home + os.sep)) if file.startswith(home) else None

    def shares_of(function: Function, path: frozenset[Function]) -> dict[str, float]:
        """Which part of a function's time belongs to each owner, by how long it ran for each caller."""
        if (own := owner(function)) is not None:
            return {own: 1.0}
        if function not in shares or path:
            weights = {
                caller: cost[3] for caller, cost in table[function][4].items() if caller not in path | {function}
            }
            total, share = sum(weights.values()), defaultdict[str, float](float)
            for caller, weight in weights.items() if total else ():
                known = shares[caller] if caller in shares else shares_of(caller, path | {function})
                for name, part in known.items():
                    share[name] += part * weight / total
            shares[function] = share
        return shares[function]

    seconds: dict[str, float] = dict.fromkeys(PARTS.values(), 0.0)
    for function, (_, _, own_time, _, callers) in table.items():
        parts = shares_of(function, frozenset()) if owner(function) is not None else {}
        # Of a function that several parts call directly, the time that it took for each is known.
        for caller, cost in callers.items() if not parts else ():
            for name, part in shares_of(caller, frozenset()).items():
                parts[name] = parts.get(name, 0.0) + part * cost[2] / max(own_time, 1e-12)
        for name, part in parts.items():
            if name in seconds:
                seconds[name] += part * own_time
    return seconds


def repeated(folder: Path, options: argparse.Namespace, slots: int) -> dict[str, Any]:
    """`measure` in a process of its own, with the code in a folder."""
    python = folder / ".venv" / "bin" / "python"
    command = [str(python) if python.is_file() else sys.executable, str(Path(__file__).resolve()), "--measure"]
    command += ["--images", str(options.images), "--slots", str(slots)]
    command += [] if options.data is None else ["--data", str(options.data.resolve())]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=folder)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several runs; what they scored is the same in each."""
    row: dict[str, Any] = {name: median(each[name] for each in rounds) for name in ("wall_seconds", "cpu_seconds")}
    for name in ("network_seconds", "profiled_seconds"):
        row[name] = {part: median(each[name][part] for each in rounds) for part in rounds[0][name]}
    row["own_seconds"] = median(each["own_seconds"] for each in rounds)
    row["own_seconds_of_each_run"] = [each["own_seconds"] for each in rounds]
    row["own_share_of_cpu"] = row["own_seconds"] / row["cpu_seconds"]
    return row | {name: rounds[0][name] for name in ("calls", "evaluations", "gradients")}


def compare(options: argparse.Namespace, slots: int) -> dict[str, Any]:
    """This checkout, and in turns with it the other one if one is given."""
    root = Path(diffguard.__file__).parents[1]
    folders = {"after": root} if options.against is None else {"before": options.against.resolve(), "after": root}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
    for number in range(options.rounds):
        for name, folder in folders.items():
            rounds[name].append(repeated(folder, options, slots))
            own = rounds[name][-1]["own_seconds"]
            print(f"round {number + 1}, {name}: {own:.2f} s of its own", file=sys.stderr, flush=True)
    report = {name: summary(measured) for name, measured in rounds.items()}
    if options.against is not None:
        before, after = (torch.tensor(rounds[name][0]["scores"]).double() for name in ("before", "after"))
        report["own_seconds_ratio"] = report["after"]["own_seconds"] / report["before"]["own_seconds"]
        report["largest_relative_score_difference"] = float(((after - before).abs() / before.abs()).max())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--slots", type=int, help="evaluations in a network call; measured if not given")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each checkout")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--data", type=Path, help="the data/ of another copy of this project")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # in this process
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = open_run(benchmark="digits", data=None if options.data is None else str(options.data.resolve()))
    workload = Workload(run, options.images, options.slots)
    if options.measure:
        print(json.dumps(measure(workload)))
        return
    report = {
        "command": "OMP_NUM_THREADS=1 python " + " ".join(["experiments/python_share.py", *_options_named(sys.argv)]),
        "machine": {
            "device": "CPU",
            "threads": 1,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "images": len(workload.images),
        "slots": workload.slots,
        **compare(options, workload.slots),
    }
    print(table(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _options_named(arguments: list[str]) -> list[str]:
    """The command's options, without this machine's folders."""
    named = arguments[1:]
    for option in ("--against", "--data"):
        if option in named:
            named[named.index(option) + 1] = option.removeprefix("--").upper()
    return named


def table(report: dict[str, Any]) -> str:
    """The report as Markdown, in CPU seconds."""
    columns = [name for name in ("before", "after") if name in report]
    lines = [f"| CPU seconds | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]

    def line(name: str, value: Callable[[dict[str, Any]], float]) -> str:
        return f"| {name} | {' | '.join(f'{value(report[column]):.2f}' for column in columns)} |"

    lines.append(line("in all", lambda row: row["cpu_seconds"]))
    lines += [line(name, lambda row, name=name: row["network_seconds"][name]) for name in NETWORKS]  # type: ignore[misc]
    lines.append(line("the engine's own", lambda row: row["own_seconds"]))
    for part in dict.fromkeys(PARTS.values()):
        lines.append(line(f"under cProfile: {part}", lambda row, part=part: row["profiled_seconds"][part]))  # type: ignore[misc]
    if len(columns) == 2:
        lines.append(f"\nOwn: {report['own_seconds_ratio']:.2f} of before.")
        lines.append(f"Largest relative difference of a score: {report['largest_relative_score_difference']:.1e}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
