"""The same bundle under `mlflow models serve`: the same decisions, and bad images refused in the same words."""

import json
import os
import signal
import sys

import pytest
from bad_requests import bad_requests, text
from processes import free_port, started

import diffguard.mlflow
from diffguard.errors import DataError
from diffguard.images import to_picture
from diffguard.serving.limits import Limits
from diffguard.serving.requests import decode_images, encode_image


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    model = tmp_path_factory.mktemp("mlflow") / "model"
    diffguard.mlflow.save_model(bundle, model)
    port = free_port()
    options = ["--env-manager", "local", "-m", str(model), "-h", "127.0.0.1", "-p", str(port)]
    command = [sys.executable, "-m", "mlflow", "models", "serve", *options]
    with started(command, port, tmp_path_factory.mktemp("log") / "log") as server:
        yield server
        # It has children, in its own session.
        os.killpg(server.process.pid, signal.SIGTERM)
        server.process.wait(60)


def invoke(server, images, **params):
    table = {"columns": ["image"], "data": [[image] for image in images]}
    return server.ask("POST", "/invocations", {"dataframe_split": table, "params": params})


def test_decisions_are_those_of_the_bundle_in_process(server, made, detector):
    images = [encode_image(to_picture(image)) for image in made.new]
    status, answer = invoke(server, images, reconstruction=True)
    assert status == 200, answer
    for given, decision in zip(answer["predictions"], detector.decide(made.new), strict=True):
        assert (given["label"], given["class_name"]) == (decision.label, decision.class_name)
        assert given["is_ood"] == decision.is_ood
        assert given["score"] == pytest.approx(decision.score, abs=1e-4)
        assert given["p_value"] == pytest.approx(decision.p_value, abs=1e-9)
        assert (given["reconstruction"] is not None) == decision.diffused
    status, plain = invoke(server, images)
    assert status == 200
    assert "reconstruction" not in plain["predictions"][0]


def test_bad_images_are_refused_in_the_same_words(server):
    bad = [each for each in bad_requests() if each.name.startswith("image: ")]
    assert len(bad) >= 100
    for each in bad:
        images = json.loads(each.body)["images"]
        with pytest.raises(DataError) as raised:
            list(decode_images(images, Limits()))
        status, answer = invoke(server, images)
        assert status == 400, (each.name, answer)
        assert str(raised.value) in answer["message"], each.name
        assert "Traceback" not in json.dumps(answer), each.name
    assert server.ask("GET", "/health")[0] == 200


def test_too_many_images_are_refused_in_the_same_words(server, made):
    image = encode_image(to_picture(made.new[0]))
    status, answer = invoke(server, [image] * 65)
    assert status == 400
    assert "images: 65 in one request; the limit is 64, send fewer" in answer["message"]
    status, answer = invoke(server, [text(bytes(10**6))] * 13)
    assert status == 400
    assert "the limit is 16,777,216 bytes" in answer["message"]
    assert invoke(server, [image])[0] == 200
