"""The application under a real HTTP server in this process, where a test can make its model fail or wait."""

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from bad_requests import text
from threads import ask, half_sent, received, running, wait_for

from diffguard.deploy.scorer import BatchScores
from diffguard.errors import DataError
from diffguard.images import to_picture
from diffguard.serving.limits import REQUEST_BYTES, Limits
from diffguard.serving.requests import encode_image


def test_while_it_loads_it_says_so(own, body):
    may = threading.Event()

    def open_late():
        assert may.wait(60)
        return own

    with running(open_late) as port:
        for method, path, sent in (("GET", "/health", None), ("GET", "/version", None), ("POST", "/score", body)):
            status, answer, headers = ask(port, method, path, sent)
            assert status == 503
            assert "still being loaded" in answer["detail"]
            assert headers["retry-after"] == "1"
        may.set()
        wait_for(port, 200)
        assert ask(port, "POST", "/score", body)[0] == 200


def test_a_detector_that_cannot_be_opened_is_one_line_in_the_log(caplog, body):
    caplog.set_level(logging.INFO)
    failures = []

    def fail():
        raise DataError("detector: not as it was written")

    with running(fail, on_failure=failures.append) as port:
        until = time.monotonic() + 60
        while not failures and time.monotonic() < until:
            time.sleep(0.01)
        for method, path, sent in (("GET", "/health", None), ("POST", "/score", body)):
            status, answer, _ = ask(port, method, path, sent)
            assert (status, answer) == (503, {"detail": "the detector could not be loaded; see the server's log"})
    assert "detector: not as it was written" in caplog.text
    assert "Traceback" not in caplog.text


def test_an_unexpected_error_is_in_the_log_and_not_in_the_answer(own, body, monkeypatch, caplog):
    with running(own) as port:
        wait_for(port, 200)
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise RuntimeError("a secret of the inside")

            patch.setattr(own, "decide", fail)
            assert ask(port, "POST", "/score", body)[:2] == (500, {"detail": "internal error; see the server's log"})
            assert ask(port, "GET", "/health")[:2] == (503, {"detail": "the model failed; see the server's log"})
        assert "a secret of the inside" in caplog.text
        assert "Traceback" in caplog.text
        assert ask(port, "GET", "/health")[0] == 200
        assert ask(port, "POST", "/score", body)[0] == 200


def test_a_score_that_is_no_number_is_an_error(own, body, monkeypatch):
    with running(own) as port:
        wait_for(port, 200)
        monkeypatch.setattr(BatchScores, "_scores", lambda self, name, rows: np.full(len(rows), np.nan))
        assert ask(port, "POST", "/score", body)[0] == 500


def test_a_request_that_takes_too_long_is_given_up_and_a_full_queue_refuses(own, body, monkeypatch):
    with running(own, Limits(max_images=4), max_waiting=4, seconds=1.5) as port:
        wait_for(port, 200)
        may, decide, started = threading.Event(), own.decide, threading.Event()

        def slow(*arguments, **options):
            started.set()
            assert may.wait(60)
            return decide(*arguments, **options)

        monkeypatch.setattr(own, "decide", slow)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, port, "POST", "/score", body)
            assert started.wait(60)
            second = pool.submit(ask, port, "POST", "/score", body)
            time.sleep(0.3)
            status, answer, headers = ask(port, "POST", "/score", body)
            assert (status, answer["detail"]) == (503, "too many images wait; try again in a second")
            assert headers["retry-after"] == "1"
            assert ask(port, "GET", "/health")[0] == 200  # at work is not failed
            for each in (first, second):
                status, answer, _ = each.result()
                assert (status, answer["detail"]) == (503, "no decision within 1.5 seconds; send fewer images")
        status, answer, _ = ask(port, "GET", "/health")
        assert status == 503
        assert "has not answered" in answer["detail"]
        may.set()
        wait_for(port, 200)
        assert ask(port, "POST", "/score", body)[0] == 200


def test_limits_are_the_ones_that_were_set(own, made):
    image = encode_image(to_picture(made.new[0]).resize((20, 20)))
    with running(own, Limits(max_images=2, max_bytes=4_000, max_pixels=400)) as port:
        wait_for(port, 200)

        def score(*images):
            return ask(port, "POST", "/score", json.dumps({"images": images}).encode())[:2]

        assert score(image, image)[0] == 200
        assert score(image, image, image) == (413, {"detail": "images: 3 in one request; the limit is 2, send fewer"})
        larger = encode_image(to_picture(made.new[0]).resize((21, 20)))
        status, answer = score(image, larger)
        assert status == 422
        assert answer["detail"] == "images[1]: 21x20 pixels; the limit is 400 in all, make it smaller"
        status, answer = score(text(bytes(3_500)))
        assert status == 413
        assert "the limit is 4,000 bytes" in answer["detail"]


def test_a_body_that_comes_too_slowly_is_given_up(own):
    with running(own, body_seconds=0.5) as port, socket.create_connection(("127.0.0.1", port)) as client:
        wait_for(port, 200)
        client.settimeout(30)
        client.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
        )
        answer = b""
        while part := client.recv(10_000):
            answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'{"detail": "the body did not arrive within 0.5 seconds"}' in answer


def test_images_of_a_request_that_was_given_up_are_not_read(own, body, monkeypatch):
    with running(own, seconds=0.5) as port:
        wait_for(port, 200)
        may, prepare, read = threading.Event(), own.prepare, []

        def slow(picture, name):
            read.append(picture)
            assert may.wait(60)
            return prepare(picture, name)

        monkeypatch.setattr(own, "prepare", slow)
        status, answer, _ = ask(port, "POST", "/score", body)
        assert (status, answer["detail"]) == (503, "no decision within 0.5 seconds; send fewer images")
        may.set()
        time.sleep(0.5)
    assert len(read) == 1


def test_bodies_that_are_half_sent_keep_nobody_out(own, body):
    # What 20 clients have sent counts, a byte each; what they have declared does not.
    with running(own, max_open_bytes=len(body) + 20) as port:
        wait_for(port, 200)
        with half_sent(port, 20):
            assert ask(port, "POST", "/score", body)[0] == 200


def test_bytes_of_bodies_that_are_half_sent_are_limited(own, body):
    with running(own, Limits(max_bytes=40_000), max_open_bytes=40_000) as port:
        wait_for(port, 200)
        with half_sent(port, 1, 39_000, b" " * 38_500):
            status, answer, headers = ask(port, "POST", "/score", body + b" " * 1_500)
            assert (status, answer["detail"]) == (503, "too many requests at once; try again in a second")
            assert headers["retry-after"] == "1"
        until = time.monotonic() + 30
        while ask(port, "POST", "/score", body)[0] != 200:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_too_many_bytes_at_once_are_refused_before_they_are_read(own, body, monkeypatch):
    with running(own, max_open_bytes=2 * (len(body) + REQUEST_BYTES)) as port:
        wait_for(port, 200)
        may, decide = threading.Event(), own.decide

        def slow(*arguments, **options):
            assert may.wait(60)
            return decide(*arguments, **options)

        monkeypatch.setattr(own, "decide", slow)
        with ThreadPoolExecutor(2) as pool, half_sent(port, 1, len(body), body[:-1]) as [late]:
            at_work = [pool.submit(ask, port, "POST", "/score", body) for _ in range(2)]
            time.sleep(0.5)
            with half_sent(port, 1) as [client]:
                assert b"too many requests at once; try again in a second" in received(client)
            late.sendall(body[-1:])
            assert b"too many requests at once; try again in a second" in received(late)
            assert ask(port, "GET", "/health")[0] == 200
            may.set()
            assert [each.result()[0] for each in at_work] == [200, 200]
        assert ask(port, "POST", "/score", body)[0] == 200


def test_many_small_requests_at_once_are_all_answered(own, body, monkeypatch):
    decide = own.decide
    with running(own) as port:
        wait_for(port, 200)

        def slow(images, **options):
            time.sleep(0.05)
            return decide(images, **options)

        monkeypatch.setattr(own, "decide", slow)
        with ThreadPoolExecutor(100) as pool:
            statuses = list(pool.map(lambda _: ask(port, "POST", "/score", body)[0], range(300)))
    assert statuses == [200] * 300


def test_a_full_queue_refuses_before_images_are_read(own, body, monkeypatch):
    with running(own, Limits(max_images=4), max_waiting=4) as port:
        wait_for(port, 200)
        may, started, decide, prepare, read = threading.Event(), threading.Event(), own.decide, own.prepare, []

        def slow(*arguments, **options):
            started.set()
            assert may.wait(60)
            return decide(*arguments, **options)

        monkeypatch.setattr(own, "decide", slow)
        monkeypatch.setattr(own, "prepare", lambda *arguments: read.append(arguments) or prepare(*arguments))
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(ask, port, "POST", "/score", body)]
            assert started.wait(60)
            asked.append(pool.submit(ask, port, "POST", "/score", body))
            until = time.monotonic() + 30
            while len(read) < 6:
                assert time.monotonic() < until
                time.sleep(0.01)
            time.sleep(0.2)
            status, answer, headers = ask(port, "POST", "/score", body)
            assert (status, answer["detail"]) == (503, "too many images wait; try again in a second")
            assert headers["retry-after"] == "1"
            assert len(read) == 6
            may.set()
            assert [each.result()[0] for each in asked] == [200, 200]


def test_requests_at_the_same_time_share_calls(own, body, monkeypatch):
    sizes, decide = [], own.decide
    with running(own) as port:
        wait_for(port, 200)
        expected = ask(port, "POST", "/score", body)[1]

        def noted(images, **options):
            sizes.append(len(images))
            time.sleep(0.2)
            return decide(images, **options)

        monkeypatch.setattr(own, "decide", noted)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: ask(port, "POST", "/score", body)[1], range(8)))
    assert sum(sizes) == 24
    assert len(sizes) < 8
    for answer in answers:
        for given, alone in zip(answer["decisions"], expected["decisions"], strict=True):
            assert given["is_ood"] == alone["is_ood"]
            assert given["score"] == pytest.approx(alone["score"], abs=1e-4)
