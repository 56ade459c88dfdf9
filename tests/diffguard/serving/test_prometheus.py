"""GET /metrics of a real server: what it counts, what its labels may hold, and the board that shows it."""

import http.client
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import prometheus_client
import pytest
import yaml
from bad_requests import JSON
from prometheus_client.parser import text_string_to_metric_families
from threads import ask, half_sent, running, wait_for

import diffguard
from diffguard.serving.prometheus import PATHS

DOCS = Path(diffguard.__file__).parents[1] / "docs"
METRIC = re.compile(r"\b(?:diffguard|process)_\w+")
KEY = "a-secret-0123456789"


def text_of(port, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/metrics", headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.headers["content-type"], answer.read().decode()
    finally:
        connection.close()


def scrape(port):
    """The value of each sample, by its name and labels."""
    status, media_type, text = text_of(port)
    assert (status, media_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def total(found, name, **labels):
    return sum(value for (each, *at), value in found.items() if each == name and labels.items() <= dict(at).items())


def test_what_was_decided_is_counted(own, body):
    with running(own) as port:
        wait_for(port, 200)
        before = scrape(port)
        for name in ("diffguard_images_total", "diffguard_rejections_total"):  # each class begins at 0
            assert {dict(at)["class_name"] for each, *at in before if each == name} == set(own.classes)
            assert total(before, name) == 0  # /health has asked the model
        decisions = [each for _ in range(2) for each in ask(port, "POST", "/score", body)[1]["decisions"]]
        assert ask(port, "POST", "/score", b"{")[0] == 400
        found = scrape(port)
        for label, class_name in enumerate(own.classes):
            of_class = [each for each in decisions if each["label"] == label]
            at = {"label": str(label), "class_name": class_name}
            assert total(found, "diffguard_images_total", **at) == len(of_class)
            assert total(found, "diffguard_rejections_total", **at) == sum(each["is_ood"] for each in of_class)
        assert total(found, "diffguard_p_value_count") == len(decisions) == 6
        assert total(found, "diffguard_p_value_sum") == pytest.approx(sum(each["p_value"] for each in decisions))
        for bound in ("0.05", "0.5", "1.0"):
            below = sum(each["p_value"] <= float(bound) for each in decisions)
            assert total(found, "diffguard_p_value_bucket", le=bound) == below
        assert total(found, "diffguard_requests_total", path="/score", status="200") == 2
        assert total(found, "diffguard_requests_total", path="/score", status="400") == 1
        assert total(found, "diffguard_request_duration_seconds_count", status="200") == 2
        assert 0 < total(found, "diffguard_request_duration_seconds_sum", status="200") < 60
        assert total(found, "diffguard_alpha") == own.alpha
        [info] = [dict(at) for each, *at in found if each == "diffguard_detector_info"]
        assert info == {
            "name": own.info.detector,
            "benchmark": own.info.benchmark,
            "bundle": own.bundle_hash,
            "diffguard": diffguard.__version__,
            "method_version": str(diffguard.version.METHOD_VERSION),
        }


def test_labels_hold_nothing_of_a_request(own, body):
    with running(own, api_key=KEY) as port:
        wait_for(port, 200)
        allowed = {**JSON, "Authorization": f"Bearer {KEY}"}
        for number in range(20):
            ask(port, "GET", f"/secret-{number}?token=secret", b"", {"X-Secret": "secret"})
            ask(port, "POST", "/score", json.dumps({"images": [f"secret{number}"]}).encode(), allowed)
        assert ask(port, "POST", "/score", body)[0] == 401
        assert ask(port, "POST", "/score", body, allowed)[0] == 200
        assert text_of(port)[0] == 401
        status, _, text = text_of(port, {"Authorization": f"Bearer {KEY}"})
    assert status == 200
    assert "secret" not in text
    labels = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith("diffguard_") and family.name != "diffguard_detector_info":
            for sample in family.samples:
                for name, value in sample.labels.items():
                    labels.setdefault(name, set()).add(value)
    assert labels.keys() == {"path", "status", "label", "class_name", "le"}
    assert labels["path"] == {*PATHS} - {"/version"} | {"other"}
    assert labels["status"] - {"503"} == {"200", "401", "404", "422"}  # 503 while it loads
    assert labels["class_name"] == set(own.classes)
    assert labels["label"] == {str(label) for label in range(len(own.classes))}


def test_the_queue_is_as_long_as_it_is(own, body, monkeypatch):
    with running(own) as port:
        wait_for(port, 200)
        may, started, decide = threading.Event(), threading.Event(), own.decide

        def slow(*arguments, **options):
            started.set()
            assert may.wait(60)
            return decide(*arguments, **options)

        monkeypatch.setattr(own, "decide", slow)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask, port, "POST", "/score", body)]
            assert started.wait(60)
            asked += [pool.submit(ask, port, "POST", "/score", body) for _ in range(2)]
            until = time.monotonic() + 30
            while total(found := scrape(port), "diffguard_queue_images") != 6:
                assert time.monotonic() < until
                time.sleep(0.02)
            assert total(found, "diffguard_requests_in_progress") == 4  # and the scrape
            may.set()
            assert [each.result()[0] for each in asked] == [200] * 3
        found = scrape(port)
        assert total(found, "diffguard_queue_images") == 0
        assert total(found, "diffguard_requests_in_progress") == 1


def test_while_it_loads_it_says_so(own, body):
    may = threading.Event()

    def open_late():
        assert may.wait(60)
        return own

    with running(open_late) as port:
        assert ask(port, "POST", "/score", body)[0] == 503
        found = scrape(port)
        assert total(found, "diffguard_ready") == 0
        assert total(found, "diffguard_requests_total", path="/score", status="503") == 1
        assert not any(name in ("diffguard_detector_info", "diffguard_alpha") for name, *_ in found)
        may.set()
        wait_for(port, 200)
        assert total(scrape(port), "diffguard_ready") == 1


def test_faults_and_clients_that_are_gone_are_counted(own, body, monkeypatch):
    with running(own) as port:
        wait_for(port, 200)
        with half_sent(port, 2):
            pass
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise RuntimeError("a fault")

            patch.setattr(own, "decide", fail)
            assert ask(port, "POST", "/score", body)[0] == 500
        until = time.monotonic() + 30
        while total(found := scrape(port), "diffguard_requests_total", path="/score", status="disconnected") != 2:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert total(found, "diffguard_requests_total", path="/score", status="500") == 1
        assert total(found, "diffguard_images_total") == 0


def test_each_application_counts_for_itself(own, body):
    with running(own) as port, running(own) as other:
        wait_for(port, 200)
        wait_for(other, 200)
        ask(port, "POST", "/score", body)
        assert total(scrape(port), "diffguard_images_total") == 3
        assert total(scrape(other), "diffguard_images_total") == 0
    assert b"diffguard_" not in prometheus_client.generate_latest()


def test_the_board_and_the_alerts_ask_for_what_there_is(own, body):
    with running(own) as port:
        wait_for(port, 200)
        ask(port, "POST", "/score", body)
        there = {name for name, *_ in scrape(port)}
    board = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "monitoring.md").read_text(encoding="utf-8"), re.DOTALL)
    alerts = [rule for block in blocks for group in yaml.safe_load(block).get("groups", []) for rule in group["rules"]]
    assert len(alerts) >= 3
    queries += [rule["expr"] for rule in alerts]
    for query in queries:
        asked = METRIC.findall(query)
        assert asked, query
        assert set(asked) <= there, query
    # And nothing that is there for a reader is left out of both.
    own_names = {name.removesuffix("_sum").removesuffix("_count") for name in there if name.startswith("diffguard_")}
    shown = {name for query in queries for name in METRIC.findall(query)}
    assert {name for name in own_names if name not in shown and f"{name}_bucket" not in shown} == set()


def test_the_page_names_every_metric(own):
    with running(own) as port:
        wait_for(port, 200)
        _, _, text = text_of(port)
    names = set(re.findall(r"^# TYPE (diffguard_\w+)", text, re.MULTILINE))
    assert len(names) == 10
    page = (DOCS / "monitoring.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in page} == set()
