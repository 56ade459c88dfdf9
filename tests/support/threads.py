"""A real server as a thread of this process, where a test can make its model fail or wait, and plain clients."""

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn
from bad_requests import JSON

from diffguard.serving.app import create_app
from diffguard.serving.connections import Connection, listen


@contextmanager
def running(*arguments, connection=Connection, **options):
    """The port of an application that is served."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(*arguments, **options), http=connection, log_config=None))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()


def ask(port, method, path, body=None, headers=JSON):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers if body is not None else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.headers)
    finally:
        connection.close()


def wait_for(port, status):
    until = time.monotonic() + 60
    while ask(port, "GET", "/health")[0] != status:
        assert time.monotonic() < until
        time.sleep(0.02)


@contextmanager
def half_sent(port, count, length=90, sent=b"{"):
    """Clients that go to sleep in the middle of their bodies."""
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for client in clients:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        client.sendall(head.encode() + sent)
    time.sleep(0.3)
    yield clients
    for client in clients:
        client.close()


def received(client):
    """All that the server sends until it closes the connection."""
    client.settimeout(30)
    answer = b""
    try:
        while part := client.recv(10_000):
            answer += part
    except ConnectionResetError:
        pass
    return answer
