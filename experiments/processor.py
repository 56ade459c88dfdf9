"""Scoring on a processor: threads of one process against processes of one thread, on an idle machine and a busy one.

    python experiments/processor.py load [--output experiments/results/load.json]
    python experiments/processor.py networks [--images 1000] [--output experiments/results/networks.json]

`load`: all variants of params.yaml on the trained models of digits (its run made them), in float32, beside none, one
and two other programs that keep a core busy each. Single images come one after the other, as at an endpoint; 50 images
are one request there; 200 are a run's. What is compared is how each came out before (threads that spin while they wait,
as libgomp's do by default), and as it is done now: an endpoint's own choice of threads for one image, processes for the
others. Each way is a process of its own; the ways alternate, and the median of their repetitions counts. Starting a
process is not in the time.

`networks`: the variant cfg-w1 on images of 32x32 pixels by networks of random weights, which take the time that trained
ones do: cifar10-cfg in float32 in threads as before, in the same way in bfloat16 where there are units for it, in
processes in either precision, and a network on patches of as many parameters.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAYS = {
    "threads that spin": {},  # for a while, libgomp's default
    "now": {"OMP_WAIT_POLICY": "PASSIVE"},
}
COUNTS = (1, 50, 200)
SINGLE = 40
"""Single images, one after the other."""
PATCHED = {"patch": 4, "channels": (96, 224, 352)}
"""Of a network that sees 32x32 pixels as 8x8 patches, with more parameters than cifar10-cfg."""


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """So many other programs that keep a core busy each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def spawn(arguments: list[str], way: str) -> dict[str, Any]:
    """Run a part of this measurement in a process of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--way", way],
        env={**variables, **WAYS[way]},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def load(options: argparse.Namespace) -> dict[str, Any]:
    """{programs: {images: {way: median seconds}}}."""
    seconds: dict[str, Any] = {}
    for programs in (0, 1, 2):
        times: dict[str, dict[str, list[float]]] = {str(count): {way: [] for way in WAYS} for count in COUNTS}
        for _ in range(options.repeats):
            for way in WAYS:
                with busy(programs):
                    measured = spawn(["load"], way)
                for count, taken in measured.items():
                    times[count][way].append(taken)
        seconds[str(programs)] = {
            count: {way: statistics.median(taken) for way, taken in ways.items()} for count, ways in times.items()
        }
        print(load_table({"seconds": seconds}), file=sys.stderr, flush=True)
    return {"repeats": options.repeats, "seconds": seconds}


def load_once(way: str) -> dict[str, float]:
    """Seconds that each number of images takes in one way."""
    import torch

    from diffguard.engine import Engine, EngineProcesses, Request, Sample, core_count, pick_threads, tune
    from tasks.common.files import read_images
    from tasks.config.run import open_run
    from tasks.models.loaded import load_models

    run = open_run()
    models = load_models(run, run.params.seeds[0], "cpu")
    rows = run.scored[run.scored["split"] == "test"]
    images = read_images(run.home, rows)[: max(COUNTS)]
    full = {"precision": "float32"}
    requests = [
        Request(models.classifiers[classifier], models.fitted(classifier, name).model_copy(update=full))
        for classifier in run.params.classifiers
        for name in run.params.score.variants
    ]
    tuning = tune(models.denoiser, "float32")

    def samples(count: int) -> Iterator[Sample]:
        return (Sample(row, images[row]) for row in range(count))

    with ExitStack() as stack:
        many: Any = Engine(models.denoiser, requests, slots=tuning)
        if way == "now":
            many = stack.enter_context(EngineProcesses(models.denoiser, requests, tuning, core_count()))
            many.start()
            torch.set_num_threads(pick_threads(models.denoiser, tuning))
        few = Engine(models.denoiser, requests[:1], slots=tuning)
        list(few.run(samples(1)))
        seconds = {}
        for count in COUNTS:
            began = time.perf_counter()
            if count == 1:
                for _ in range(SINGLE):
                    list(few.run(samples(1)))
            else:
                list(many.run(samples(count)))
            seconds[str(count)] = (time.perf_counter() - began) / (SINGLE if count == 1 else 1)
    return seconds


def load_table(report: dict[str, Any]) -> str:
    """Milliseconds an image, and how many times as fast as threads that spin."""
    lines = ["| other programs | images | " + " | ".join(WAYS) + " |", "|---|---|" + "---|" * len(WAYS)]
    for programs, counts in report["seconds"].items():
        for count, ways in counts.items():
            spin = ways["threads that spin"]
            cells = [f"{1000 * taken / int(count):.3g} ms, {spin / taken:.2f}x" for taken in ways.values()]
            lines.append(f"| {programs} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


NETWORKS = {
    "before: float32, threads that spin": ("cifar10-cfg", "float32", "threads that spin"),
    "threads that spin, bfloat16": ("cifar10-cfg", "bfloat16", "threads that spin"),
    "processes, float32": ("cifar10-cfg", "float32", "now"),
    "processes, bfloat16": ("cifar10-cfg", "bfloat16", "now"),
    "patches, processes, float32": ("patched", "float32", "now"),
    "patches, processes, bfloat16": ("patched", "bfloat16", "now"),
}


def networks(options: argparse.Namespace) -> dict[str, Any]:
    """{what: {"images_per_second", "parameters", …}}; `images` of each are scored, a part of them to warm up."""
    rows = {}
    for name, (network, precision, way) in NETWORKS.items():
        arguments = ["networks", "--network", network, "--precision", precision, "--images", str(options.images)]
        rows[name] = spawn(arguments, way)
        print(name, rows[name], file=sys.stderr, flush=True)
    return {"images": options.images, "variant": "cfg-w1", "rows": rows}


def networks_once(options: argparse.Namespace) -> dict[str, float]:
    """Images a second of one network in one way."""
    import torch

    from diffguard.engine import Engine, EngineProcesses, Request, Sample, core_count, tune
    from diffguard.models.classifiers.small import ConvClassifier
    from diffguard.models.denoisers.base import with_channels_last
    from diffguard.settings import DEFAULT_VARIANT
    from diffguard.settings.training import RECIPES
    from diffguard.training.denoiser import untrained_denoiser

    recipe = RECIPES["cifar10-cfg"]
    if options.network == "patched":
        recipe = RECIPES["cifar10-patch"].model_copy(update=PATCHED)
    denoiser = untrained_denoiser((3, 32, 32), 10, recipe)
    denoiser.unet.eval().requires_grad_(False)
    classifier = ConvClassifier(num_classes=10, in_channels=3).eval().requires_grad_(False)
    requests = [Request(classifier, DEFAULT_VARIANT.model_copy(update={"precision": options.precision}))]
    images = torch.rand(options.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def samples(first: int, last: int) -> Iterator[Sample]:
        return (Sample(row, images[row]) for row in range(first, last))

    with ExitStack() as stack:
        if options.way == "now":
            tuning = tune(denoiser, options.precision)
            engine: Any = stack.enter_context(EngineProcesses(denoiser, requests, tuning, core_count()))
            engine.start()
        else:
            # As it was: channels-last, the size measured in all threads.
            tuning = best_size(with_channels_last(denoiser), options.precision)
            engine = Engine(denoiser, requests, slots=tuning.slots)
        warm = min(8, options.images // 4)
        list(engine.run(samples(0, warm)))
        began = time.perf_counter()
        count = len(list(engine.run(samples(warm, options.images))))
        taken = time.perf_counter() - began
    return {
        "images_per_second": count / taken,
        "parameters": sum(weight.numel() for weight in denoiser.unet.parameters()),
        "slots": tuning.slots,
        "channels_last": tuning.channels_last,
        "flushes_denormals": tuning.flushes_denormals,
    }


def best_size(denoiser: Any, precision: str) -> Any:
    """The fastest size of a call in all threads, as chosen before."""
    from diffguard.engine import Tuning
    from diffguard.engine.tuning import _Meter, _pick_size

    size, rate = _pick_size(_Meter(denoiser, precision), 256, 2.0)
    return Tuning(size, True, False, rate, precision)


def networks_table(report: dict[str, Any]) -> str:
    """Images a second, and how many times as many as before."""
    lines = ["| what | parameters | images/s | times before |", "|---|---|---|---|"]
    before = next(iter(report["rows"].values()))["images_per_second"]
    for name, row in report["rows"].items():
        rate = row["images_per_second"]
        lines.append(f"| {name} | {row['parameters'] / 1e6:.1f} M | {rate:.3g} | {rate / before:.2f} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What this was measured on."""
    import torch

    from diffguard.utils.precision import has_bfloat16_units

    return {
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_units": has_bfloat16_units("cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("load", "networks"))
    parser.add_argument("--images", type=int, default=1000, help="of networks (1000)")
    parser.add_argument("--repeats", type=int, default=3, help="of load (3)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(load_once(options.way) if options.part == "load" else networks_once(options)))
        return
    report = {
        "command": f"python experiments/processor.py {options.part}"
        + (f" --images {options.images}" if options.part == "networks" else ""),
        "machine": machine(),
        **(load(options) if options.part == "load" else networks(options)),
    }
    print(load_table(report) if options.part == "load" else networks_table(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
