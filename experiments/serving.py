"""The endpoint of `diffguard serve`: how long 50 images in one request take, and what bad requests do to it.

    python experiments/serving.py --detector data/digits/detector --images data/digits/images --output serving.json

Starts the server as a process of its own, asks it over HTTP, also beside one and two programs that keep a core busy
each, and stops it.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bad_requests import JSON, bad_requests, problem, send, text
from processor import busy

ROOT = Path(__file__).parents[1]
IMAGES = 50


def main() -> None:
    """Measure, print a table, and write JSON if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="data/digits/detector", help="a bundle's folder, or an MLflow URI")
    parser.add_argument("--images", type=Path, default=ROOT / "data/digits/images", help="a folder with image files")
    parser.add_argument("--repeats", type=int, default=15, help="requests of 50 images after the first (15)")
    parser.add_argument("--output", type=Path, help="also write JSON")
    options = parser.parse_args()
    chosen = image_files(options.images, IMAGES)
    body = json.dumps({"images": [text(path.read_bytes()) for path in chosen]}).encode()
    start = time.perf_counter()
    with serving(options.detector) as (port, process):
        found = {"start_seconds": time.perf_counter() - start, **measure(port, process, body, options.repeats)}
    found = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine()},
        "images": IMAGES,
        **found,
    }
    print(table(found))
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if problems := found["bad_requests"]["problems"]:
        sys.exit("\n".join(["error: not refused as they should be:", *problems]))


def image_files(folder: Path, count: int) -> list[Path]:
    """So many image files from all over a folder: in-distribution and OOD."""
    files = sorted(itertools.chain(folder.rglob("*.png"), folder.rglob("*.jpg")))
    if not files:
        sys.exit(f"error: {folder}: no PNG or JPEG files; name a folder by --images")
    return [files[number * len(files) // count] for number in range(count)]


@contextlib.contextmanager
def serving(detector: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The port and process of a server that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffguard.cli.main", "serve", "--detector", detector, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not is_well(port):
            if process.poll() is not None:
                sys.exit("error: the server did not start")
            time.sleep(0.2)
        yield port, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def is_well(port: int) -> bool:
    """Whether /health says 200."""
    try:
        return ask(port, "GET", "/health", None)[0] == 200
    except OSError:
        return False


def ask(port: int, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
    """The status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, body, JSON if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def measure(port: int, process: "subprocess.Popen[bytes]", body: bytes, repeats: int) -> dict[str, object]:
    """Seconds of good requests, and answers to bad ones."""
    served = json.loads(ask(port, "GET", "/version", None)[1])["detector"]
    seconds, answer = timed(port, body, repeats + 1)
    beside = {}
    for programs in (1, 2):
        with busy(programs):
            beside[str(programs)] = statistics.median(timed(port, body, repeats)[0])
    decisions = json.loads(answer)["decisions"]
    before = resident_mib(process.pid)
    start = time.perf_counter()
    bad, problems, statuses = bad_requests(), [], dict[str, int]()
    for each in bad:
        status, answer = send("127.0.0.1", port, each)
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        problems += [found] if (found := problem(status, answer, each)) else []
    return {
        "detector": served,
        "first_seconds": seconds[0],
        "warm_seconds": {"median": statistics.median(seconds[1:]), "min": min(seconds[1:]), "max": max(seconds[1:])},
        "warm_seconds_beside": beside,
        "diffused": sum(each["diffused"] for each in decisions),
        "ood": sum(each["is_ood"] for each in decisions),
        "bad_requests": {
            "count": len(bad),
            "statuses": dict(sorted(statuses.items())),
            "problems": problems,
            "seconds": time.perf_counter() - start,
            "memory_mib": [before, resident_mib(process.pid)],
            "healthy_afterwards": is_well(port),
            "good_afterwards": json.loads(ask(port, "POST", "/score", body)[1])["decisions"] == decisions,
        },
    }


def timed(port: int, body: bytes, repeats: int) -> tuple[list[float], bytes]:
    """Seconds of one request, again and again, and its last answer."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        status, answer = ask(port, "POST", "/score", body)
        seconds.append(time.perf_counter() - start)
        if status != 200:
            sys.exit(f"error: {status} {answer[:300]!r}")
    return seconds, answer


def resident_mib(pid: int) -> float:
    """Memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def table(found: dict) -> str:
    """The figures as Markdown."""
    warm, bad = found["warm_seconds"], found["bad_requests"]
    statuses = ", ".join(f"{count} x {status}" for status, count in bad["statuses"].items())
    rows = [
        ("detector", f"{found['detector']['name']} of {found['detector']['benchmark']}"),
        ("start until ready", f"{found['start_seconds']:.1f} s"),
        (f"{found['images']} images in one request, first", f"{found['first_seconds']:.2f} s"),
        (
            f"{found['images']} images in one request, warm",
            f"{warm['median']:.2f} s ({warm['min']:.2f}–{warm['max']:.2f})",
        ),
        ("of them diffused; OOD", f"{found['diffused']}; {found['ood']}"),
        (
            f"{bad['count']} bad requests",
            f"{statuses}; {len(bad['problems'])} answered wrongly; {bad['seconds']:.1f} s",
        ),
        ("memory before and after them", f"{bad['memory_mib'][0]:.0f} MiB, {bad['memory_mib'][1]:.0f} MiB"),
        ("healthy afterwards; same decisions", f"{bad['healthy_afterwards']}; {bad['good_afterwards']}"),
    ]
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


if __name__ == "__main__":
    main()
