"""A key that the server asks for: without it nothing is decided, and no body is read."""

import sys

import pytest
from bad_requests import JSON
from processes import free_port, started
from threads import ask, half_sent, received, running, wait_for

from diffguard.cli.main import main

KEY = "a-secret-0123456789"
RIGHT = [
    {"Authorization": f"Bearer {KEY}"},
    {"authorization": f"bearer   {KEY}"},
    {"X-API-Key": KEY},
    {"Authorization": "Bearer wrong", "X-API-Key": KEY},
]
WRONG = [
    {},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": KEY},
    {"X-API-Key": KEY[:-1]},
    {"X-API-Key": KEY + "0"},
    {"X-API-Key": ""},
    {"Cookie": f"X-API-Key={KEY}"},
]


def test_who_has_the_key_is_answered_and_nobody_else(own, body):
    with running(own, api_key=KEY) as port:
        wait_for(port, 200)  # whether it is well needs none
        for headers in RIGHT:
            assert ask(port, "POST", "/score", body, {**JSON, **headers})[0] == 200
        for headers in WRONG:
            for method, path in (("POST", "/score"), ("GET", "/version"), ("POST", "/score/")):
                status, answer, got = ask(port, method, path, body, {**JSON, **headers})
                assert status == 401
                assert answer == {
                    "detail": "the key is missing or wrong; send it as Authorization: Bearer KEY, or X-API-Key: KEY"
                }
                assert got["www-authenticate"] == "Bearer"
        # The body does not have to come for that.
        with half_sent(port, 1) as [client]:
            assert received(client).startswith(b"HTTP/1.1 401")
        status, page, _ = ask(port, "GET", "/openapi.json")
        assert status == 200
        assert page["paths"]["/score"]["post"]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
        assert set(page["components"]["securitySchemes"]) == {"HTTPBearer", "APIKeyHeader"}
        assert "401" in page["paths"]["/score"]["post"]["responses"]


def test_without_a_key_the_interface_speaks_of_none(own):
    with running(own) as port:
        _, page, _ = ask(port, "GET", "/openapi.json")
        assert "securitySchemes" not in page["components"]
        assert "401" not in page["paths"]["/score"]["post"]["responses"]


@pytest.mark.parametrize(
    ("key", "message"), [("", "set and empty"), ("  ", "set and empty"), ("a b", "printable ASCII")]
)
def test_a_key_that_is_none_is_refused_at_the_start(bundle, key, message, monkeypatch):
    monkeypatch.setenv("DIFFGUARD_API_KEY", key)
    with pytest.raises(SystemExit, match=f"error: DIFFGUARD_API_KEY: .*{message}"):
        main(["serve", "--detector", str(bundle), "--port", "0"])


def test_the_command_takes_the_key_and_warns_where_there_is_none(bundle, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "diffguard.cli.main", "serve", "--detector", str(bundle), "--device", "cpu"]
    monkeypatch.setenv("DIFFGUARD_API_KEY", KEY)
    port = free_port()
    with started([*command, "--host", "0.0.0.0", "--port", str(port)], port, tmp_path / "log") as server:
        assert server.ask("GET", "/version")[0] == 401
        assert ask(port, "GET", "/version", b"", {"X-API-Key": KEY})[0] == 200
        assert "no key is required" not in server.log
        assert KEY not in server.log
    monkeypatch.delenv("DIFFGUARD_API_KEY")
    port = free_port()
    with started([*command, "--host", "0.0.0.0", "--port", str(port)], port, tmp_path / "log") as server:
        assert server.ask("GET", "/version")[0] == 200
        [line] = [line for line in server.log.splitlines() if "no key is required" in line]
        assert "0.0.0.0 can be reached by others" in line
        assert "DIFFGUARD_API_KEY" in line
