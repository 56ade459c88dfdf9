"""The endpoint of `diffguard serve` under clients that ask without pause.

    python experiments/clients.py --detector data/digits/detector --images data/digits/images \
        [--clients 50] [--minutes 10] [--output experiments/results/clients.json]

Each client sends 1 to 8 images a request over a connection of its own, and the next request when it has the answer. In
every other minute /metrics is scraped and /health asked each second, as by a monitor. Measured: latencies, refusals,
images/s beside the model's own rate on the same images in one batch, in the same run before; the server's memory (RSS
of all of its processes, pages that they share counted in each); and whether each decision is the one that the detector
takes on that image alone.
"""

import argparse
import http.client
import json
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from bad_requests import JSON, text
from processor import machine
from serving import ask, image_files, is_well, serving

MOST = 8
"""Images of a request."""

MONITORED_SECONDS = 60.0
"""In turns with as many seconds without a monitor."""


@dataclass
class Seen:
    """What all clients have seen, and the monitor."""

    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    images: int = 0
    refused: int = 0
    other: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    scrapes: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="data/digits/detector", help="a bundle's folder, or an MLflow URI")
    parser.add_argument("--images", type=Path, default=Path("data/digits/images"), help="a folder with image files")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="also write JSON")
    options = parser.parse_args()
    files = image_files(options.images, 200)
    expected, own_rate = alone(options.detector, files)
    encoded = [text(path.read_bytes()) for path in files]
    with serving(options.detector) as (port, process):
        seen, wall = load(port, process.pid, encoded, expected, options.clients, 60 * options.minutes)
        healthy = is_well(port)
    found = {
        "command": f"python experiments/clients.py --clients {options.clients} --minutes {options.minutes:g}",
        "machine": machine(),
        "clients": options.clients,
        "minutes": options.minutes,
        "requests": len(seen.seconds[False]) + len(seen.seconds[True]),
        "images": seen.images,
        "refused": seen.refused,
        "other_statuses": seen.other[:20],
        "wrong_decisions": seen.wrong[:20],
        "images_per_second": seen.images / wall,
        "own_images_per_second": own_rate,
        "latency_seconds": {
            ("monitored" if is_monitored else "not monitored"): quantiles(seconds)
            for is_monitored, seconds in seen.seconds.items()
            if seconds
        },
        "scrape_seconds": quantiles(seen.scrapes) if seen.scrapes else None,
        "memory_mib": memory(seen.memory_mib),
        "healthy_afterwards": healthy,
    }
    print(json.dumps(found, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if seen.other or seen.wrong or not healthy:
        sys.exit("error: not every request was decided on as it should be")


def alone(detector: str, files: list[Path]) -> tuple[list[dict[str, Any]], float]:
    """Decisions on each image by itself, in this process, and images/s of all in one batch as an endpoint takes it."""
    import torch
    from PIL import Image

    from diffguard.cli.detector_option import find
    from diffguard.loading import open_detector

    opened = open_detector(find(detector))
    images = torch.stack([opened.prepare(Image.open(path)) for path in files])
    one_by_one = [decision for image in images for decision in opened.decide(image[None])]
    expected = [{"label": each.label, "score": each.score, "is_ood": each.is_ood} for each in one_by_one]
    opened.expect(None)
    opened.decide(images)
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        opened.decide(images)
        rates.append(len(images) / (time.perf_counter() - began))
    return expected, median(rates)


def load(
    port: int, pid: int, encoded: list[str], expected: list[dict[str, Any]], clients: int, seconds: float
) -> tuple[Seen, float]:
    """What clients saw, and for how many seconds they asked."""
    seen, ends = Seen(), threading.Event()
    began = time.perf_counter()
    threads = [
        threading.Thread(target=client, args=(port, encoded, expected, number, began, ends, seen))
        for number in range(clients)
    ]
    threads.append(threading.Thread(target=monitor, args=(port, began, ends, seen)))
    for thread in threads:
        thread.start()
    while time.perf_counter() - began < seconds:
        time.sleep(1)
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)]
        seen.memory_mib.append(sum(each.memory_info().rss for each in tree) / 2**20)
    wall = time.perf_counter() - began
    ends.set()
    for thread in threads:
        thread.join()
    return seen, wall


def is_monitored(began: float) -> bool:
    return int((time.perf_counter() - began) / MONITORED_SECONDS) % 2 == 1


def client(
    port: int,
    encoded: list[str],
    expected: list[dict[str, Any]],
    number: int,
    began: float,
    ends: threading.Event,
    seen: Seen,
) -> None:
    chance = random.Random(number)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    while not ends.is_set():
        rows = [chance.randrange(len(encoded)) for _ in range(chance.randint(1, MOST))]
        body = json.dumps({"images": [encoded[row] for row in rows]})
        monitored, start = is_monitored(began), time.perf_counter()
        connection.request("POST", "/score", body, JSON)
        answer = connection.getresponse()
        content = answer.read()
        taken = time.perf_counter() - start
        with seen.lock:
            if answer.status == 503:
                seen.refused += 1
            elif answer.status != 200:
                seen.other.append(f"{answer.status} {content[:200]!r}")
            elif not ends.is_set():
                seen.seconds[monitored].append(taken)
                seen.images += len(rows)
        if answer.status == 503:
            ends.wait(float(answer.headers["Retry-After"]))
        elif answer.status == 200:
            for row, decision in zip(rows, json.loads(content)["decisions"], strict=True):
                if not is_same(decision, expected[row]):
                    with seen.lock:
                        seen.wrong.append(f"image {row}: {decision}, alone {expected[row]}")
    connection.close()


def is_same(decision: dict[str, Any], alone: dict[str, Any]) -> bool:
    """Whether it is the decision on the image alone; batches of other sizes round otherwise."""
    is_close = abs(decision["score"] - alone["score"]) <= 1e-3 * max(1.0, abs(alone["score"]))
    return is_close and all(decision[key] == alone[key] for key in ("label", "is_ood"))


def monitor(port: int, began: float, ends: threading.Event, seen: Seen) -> None:
    while not ends.wait(1.0):
        if is_monitored(began):
            start = time.perf_counter()
            for path in ("/metrics", "/health"):
                status, _ = ask(port, "GET", path, None)
                if status != 200:
                    with seen.lock:
                        seen.other.append(f"{path}: {status}")
            seen.scrapes.append(time.perf_counter() - start)


def quantiles(seconds: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.quantile(seconds, (0.5, 0.95, 0.99))
    return {"p50": p50, "p95": p95, "p99": p99, "max": max(seconds)}


def memory(mib: list[float]) -> dict[str, float]:
    """After a tenth of the time, at the end, and the most."""
    return {"after_a_tenth": mib[len(mib) // 10], "at_the_end": mib[-1], "most": max(mib)}


if __name__ == "__main__":
    main()
