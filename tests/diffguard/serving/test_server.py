"""The real server: decisions as in process, every bad request refused, still well afterwards, stopped in order."""

import base64
import http.client
import io
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from bad_requests import JSON, Bad, bad_requests, problem, send, text
from PIL import Image
from processes import free_port, started

import diffguard
from diffguard.cli.main import main
from diffguard.images import to_picture
from diffguard.utils.hashing import hash_file


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    port = free_port()
    command = [sys.executable, "-m", "diffguard.cli.main", "serve", "--detector", str(bundle), "--port", str(port)]
    with started(command, port, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def files(made):
    """Image files as people have them: PNG and JPEG of other sizes and modes, and data: URLs."""
    contents = []
    for number, image in enumerate(made.new):
        picture = to_picture(image)
        if number % 3 == 1:
            picture = picture.convert("RGB").resize((40, 32))
        stream = io.BytesIO()
        picture.save(stream, "JPEG" if number % 3 == 2 else "PNG")
        contents.append(stream.getvalue())
    return contents


@pytest.fixture(scope="module")
def expected(files, detector):
    images = [detector.prepare(Image.open(io.BytesIO(content))) for content in files]
    return detector.decide(torch.stack(images), reconstructions=True)


def same(given, decision):
    assert given["label"] == decision.label
    assert given["class_name"] == decision.class_name
    assert given["confidence"] == pytest.approx(decision.confidence, abs=1e-5)
    assert given["score"] == pytest.approx(decision.score, abs=1e-4)
    assert given["p_value"] == pytest.approx(decision.p_value, abs=1e-9)
    assert given["is_ood"] == decision.is_ood
    assert given["diffused"] == decision.diffused
    return True


def test_decisions_are_those_of_the_bundle_in_process(server, files, expected):
    status, answer = server.ask("POST", "/score", {"images": [text(content) for content in files]})
    assert status == 200, answer
    assert all(same(*pair) for pair in zip(answer["decisions"], expected, strict=True))
    assert {each["is_ood"] for each in answer["decisions"]} == {True, False}
    assert {each["diffused"] for each in answer["decisions"]} == {True, False}
    assert not any("reconstruction" in each for each in answer["decisions"])


def test_reconstructions_come_when_they_are_asked_for(server, files, expected):
    images = [f"data:image/png;base64,{text(content)}" for content in files]
    status, answer = server.ask("POST", "/score", {"images": images, "reconstruction": True})
    assert status == 200, answer
    for given, decision in zip(answer["decisions"], expected, strict=True):
        assert same(given, decision)
        assert ("reconstruction" in given) == decision.diffused
        if decision.diffused:
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(given["reconstruction"]))), int)
            assert np.abs(shown - np.asarray(to_picture(decision.reconstruction), int)).max() <= 1


def test_version_says_what_is_served(server, bundle, detector):
    status, answer = server.ask("GET", "/version")
    assert status == 200
    assert answer["diffguard"] == diffguard.version.__version__
    assert answer["method_version"] == diffguard.version.METHOD_VERSION
    assert answer["detector"] == {
        "name": "gated",
        "benchmark": "tiny",
        "alpha": detector.alpha,
        "bundle": hash_file(bundle / "detector.json"),
    }
    assert answer["limits"]["max_images"] == 64


def test_the_page_needs_no_network(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for path in ("/docs", "/openapi.json"):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        page = answer.read().decode()
        if path == "/docs":
            places = re.findall(r'(?:src|href)="([^"]+)"', page)
            assert len(places) >= 2
            assert not any(place.startswith(("http", "//")) for place in places)
            for place in places:
                connection.request("GET", place)
                asset = connection.getresponse()
                assert asset.status == 200
                assert len(asset.read()) > 1000
    schema = json.loads(page)
    assert set(schema["paths"]) == {"/score", "/health", "/version", "/metrics"}
    [content] = schema["paths"]["/score"]["post"]["requestBody"]["content"].values()
    example = content["schema"]["examples"][0]
    assert server.ask("POST", "/score", example)[0] == 200


def test_bad_requests_are_refused_and_good_ones_go_on(server, files, expected):
    bad = bad_requests()
    assert len(bad) >= 200
    images = [text(content) for content in files]
    stop = threading.Event()

    def ask_on(start):
        """Good requests until the bad ones are through."""
        rounds = 0
        while not stop.is_set():
            chosen = [(start + rounds + step) % len(images) for step in range(5)]
            status, answer = server.ask("POST", "/score", {"images": [images[each] for each in chosen]})
            assert status == 200, answer
            assert all(same(given, expected[each]) for given, each in zip(answer["decisions"], chosen, strict=True))
            rounds += 1
        return rounds

    slow = [_half_a_request(server.port) for _ in range(8)]
    memory = []
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(ask_on, start) for start in (0, 7, 13)]
        try:
            problems = []
            for _ in range(2):
                answers = [(each, *send("127.0.0.1", server.port, each)) for each in bad]
                problems += [found for each, *answer in answers if (found := problem(*answer, each))]
                memory.append(server.resident_mib)
        finally:
            stop.set()
        assert all(each.result() >= 3 for each in good)
    for each in slow:
        each.close()
    assert problems == []
    assert memory[1] - memory[0] < 40, memory
    assert server.ask("GET", "/health") == (200, {"status": "ok"})
    assert server.process.poll() is None
    assert "Traceback" not in server.log
    assert images[0][:40] not in server.log


def _half_a_request(port: int) -> socket.socket:
    """A client that goes to sleep in the middle of its body."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(
        b'POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"ima'
    )
    return client


def test_a_client_that_is_gone_does_no_harm(server, files):
    body = json.dumps({"images": [text(content) for content in files]}).encode()
    for length in (0, 10, len(body) // 2, len(body)):
        client = socket.create_connection(("127.0.0.1", server.port))
        head = (
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body[:length])
        client.close()
    for garbage in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"POST /score HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"\r\n" * 50,
    ):
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(garbage)
        client.close()
    assert server.ask("GET", "/health")[0] == 200
    assert "Traceback" not in server.log


def test_a_client_that_sends_nothing_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        start = time.monotonic()
        assert client.recv(1) == b""
        assert 5 < time.monotonic() - start < 30


def test_a_refusal_comes_before_the_body_is_sent(server):
    start = time.monotonic()
    status, answer = send("127.0.0.1", server.port, Bad("", 10**9, (413,)))
    assert status == 413
    assert b"1,000,000,000 bytes" in answer
    assert time.monotonic() - start < 5


# The last test: it stops the server.
def test_it_stops_when_it_is_told_and_finishes_what_is_in_flight(server, files, expected):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = json.dumps({"images": [text(content) for content in files]}).encode()
    connection.putrequest("POST", "/score")
    for name, value in {**JSON, "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders(body[:-10])
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    connection.send(body[-10:])
    answer = connection.getresponse()
    assert answer.status == 200
    decisions = json.loads(answer.read())["decisions"]
    assert all(same(*pair) for pair in zip(decisions, expected, strict=True))
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log
    with pytest.raises(OSError, match="refused"):
        server.ask("GET", "/health")


def test_a_bundle_that_was_changed_is_not_served(bundle, tmp_path):
    changed = shutil.copytree(bundle, tmp_path / "detector")
    table = changed / "calibration.parquet"
    table.write_bytes(table.read_bytes() + b"x")
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--detector", str(changed), "--port", "0"])
    assert stopped.value.code == f"error: {table}: not as it was written; copy the bundle again, or make it anew"


def test_a_port_that_is_taken_is_one_line(bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stopped:
            main(["serve", "--detector", str(bundle), "--port", str(port)])
    assert stopped.value.code.startswith(f"error: --host 127.0.0.1 --port {port}: cannot listen there (")
