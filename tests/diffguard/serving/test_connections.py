"""Clients that are silent or slow, and too many of them, at real sockets."""

import http.client
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from threads import ask, half_sent, received, running, wait_for

from diffguard.serving import connections
from diffguard.serving.connections import Connection


def is_open(client):
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


class Hasty(Connection):
    header_seconds = 0.5


def test_a_client_that_sends_no_headers_is_cut_off(own):
    get = b"GET /version HTTP/1.1\r\nHost: x\r\n"
    with running(own, connection=Hasty) as port:
        wait_for(port, 200)
        for sent in (b"", b"GET", get):
            with socket.create_connection(("127.0.0.1", port)) as client:
                start = time.monotonic()
                client.sendall(sent)
                assert received(client) == b""
                assert time.monotonic() - start < 5
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(get + b"\r\n" + get)
            assert received(client).startswith(b"HTTP/1.1 200 ")


def test_each_request_of_a_connection_has_its_own_deadline(own):
    get = b"GET /version HTTP/1.1\r\nHost: x\r\n"
    with running(own, connection=Hasty) as port, socket.create_connection(("127.0.0.1", port), 30) as client:
        wait_for(port, 200)
        for _ in range(4):  # longer together than one deadline
            client.sendall(get)
            time.sleep(0.2)
            client.sendall(b"\r\n")
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert (answer.status, len(answer.read()) > 10) == (200, True)
        start = time.monotonic()
        while is_open(client):
            client.sendall(b"G")
            time.sleep(0.1)
            assert time.monotonic() - start < 5


def test_an_answer_may_take_longer_than_headers(own, body, monkeypatch):
    decide = own.decide

    def slow(*arguments, **options):
        time.sleep(1)
        return decide(*arguments, **options)

    with running(own, connection=Hasty) as port:
        wait_for(port, 200)
        monkeypatch.setattr(own, "decide", slow)
        assert ask(port, "POST", "/score", body)[0] == 200


def test_the_longest_silent_of_too_many_connections_gives_way(own, body, monkeypatch):
    class Few(Connection):
        max_connections = 4

    with running(own, connection=Few) as port:
        wait_for(port, 200)
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        time.sleep(0.3)
        with half_sent(port, 2) as slow:
            assert ask(port, "GET", "/health")[0] == 200
            assert [is_open(each) for each in (*silent, *slow)] == [False, True, True, True]
        may, decide = threading.Event(), own.decide

        def slowly(*arguments, **options):
            assert may.wait(60)
            return decide(*arguments, **options)

        monkeypatch.setattr(own, "decide", slowly)
        with ThreadPoolExecutor(4) as pool:
            at_work = [pool.submit(ask, port, "POST", "/score", body) for _ in range(4)]
            time.sleep(0.5)
            with socket.create_connection(("127.0.0.1", port)) as client:
                assert received(client) == b""
            may.set()
            assert [each.result()[0] for each in at_work] == [200] * 4
        for each in silent:
            each.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has it")
def test_a_client_that_takes_no_answer_is_cut_off(own, monkeypatch):
    monkeypatch.setattr(connections, "STALLED_SECONDS", 1)
    with running(own) as port, socket.socket() as client:
        wait_for(port, 200)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", port))
        client.sendall(b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(4)
        answer = received(client)
    length = int(re.search(rb"content-length: (\d+)", answer)[1])
    assert len(answer) < length / 2
