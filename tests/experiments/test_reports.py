"""The measurements of calibration, fusion and cascades, on data whose answer is known and on a small finished run."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tasks.combine import fitted
from tasks.config.run import open_run


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_calibration_realizes_what_it_promises(script, shift):
    """Scores that depend on the class: by class and all together the promise and its spread are as in theory."""
    measure, rng = script("calibration")["measure"], np.random.default_rng(0)
    splits = np.repeat(["calibration", "test"], [160, 300])
    predicted = rng.integers(2, size=460)
    scores = rng.normal(size=460) + shift * predicted

    def deal(anew):
        return pd.DataFrame({"split": anew, "predicted": predicted, "score": scores})

    found = {(each["alpha"], each["decision"]): each for each in measure(deal, splits, 200, rng)}
    ways = {"all together", "all together, random ties", "by class", "predicted 0", "predicted 1"}
    assert {way for _, way in found} == ways
    assert (0.01, "predicted 0") not in found  # too few images of each class
    for (alpha, way), each in found.items():
        if (alpha, way) != (0.01, "by class"):
            assert each["realized"] == pytest.approx(each["promised"], abs=4 * each["standard_error"]), (alpha, way)
        if alpha > 0.01 or way != "by class":
            assert each["spread"] == pytest.approx(each["spread_in_theory"], rel=0.2), (alpha, way)
    assert found[0.05, "all together"]["promised"] == pytest.approx(8 / 161)
    assert found[0.05, "all together, random ties"]["promised"] == pytest.approx(0.05)


def test_ties_make_a_plain_decision_conservative_and_a_random_one_exact(script):
    measure, rng = script("calibration")["measure"], np.random.default_rng(1)
    splits, scores = np.repeat(["calibration", "test"], [100, 200]), rng.integers(8, size=300)

    def deal(anew):
        return pd.DataFrame({"split": anew, "predicted": 0, "score": scores})

    found = {(each["alpha"], each["decision"]): each for each in measure(deal, splits, 200, rng)}
    assert found[0.1, "all together"]["realized"] < 0.05
    assert found[0.1, "all together, random ties"]["realized"] == pytest.approx(0.1, abs=0.008)


@pytest.mark.parametrize("detector", ["knn", "fused", "cascade"])
def test_calibration_of_a_finished_run(finished, script, capsys, tmp_path, detector):
    output = tmp_path / "found.json"
    script("calibration", "--detectors", detector, "--classifiers", "strong", "--splits", 40, "--output", output)
    [found] = json.loads(output.read_text())
    assert (found["n_calibration"], found["n_test"], found["splits"]) == (24, 18, 40)
    each = {(one["alpha"], one["decision"]): one for one in found["rejection"]}
    assert (0.01, "all together") not in each
    assert each[0.1, "all together"]["promised"] == pytest.approx(2 / 25)
    assert each[0.1, "all together"]["realized"] == pytest.approx(2 / 25, abs=0.05)
    assert f"{detector} on digits, classifier strong: 40 splits" in capsys.readouterr().out


def test_fusion_of_a_finished_run(finished, script, capsys, tmp_path):
    output = tmp_path / "found.json"
    script("fusion", "--output", output)
    found = json.loads(output.read_text())["classifiers"]
    assert found.keys() == {"ordinary", "strong"}
    for rows in found.values():
        assert rows.keys() == {"fused", "best"}
        assert rows["fused"]["difference"].keys() == set(open_run().params.score.names)
        assert rows["fused"]["diffguard"] == ["cfg-w1"]
        each = rows["fused"]["difference"]["knn"]["near"]["auroc"]
        assert each["low"] <= each["value"] <= each["high"]
    assert "| strong | fused | cfg-w1 (DiffGuard alone) |" in capsys.readouterr().out


def known_tables(times=1):
    """A gate that mixes half of the InD with half of the near-OOD images, and a second detector that knows these.

    On far-OOD, of which there are many, the gate is right and the second detector always wrong.
    """
    rows = []
    for split in ("validation", "test"):
        rows += times * [(split, "ind", gate, gate) for gate in range(100)]
        rows += times * [(split, "near", 50 + number, 190) for number in range(100)]
        rows += times * [(split, "far", 180, -1) for _ in range(300)]
    rows += [("calibration", "ind", number + 0.5, number + 0.5) for number in range(200)]
    table = pd.DataFrame(rows, columns=["split", "role", "gate", "second"])
    return {
        ("ordinary", "knn", 0): table.assign(score=table["gate"].astype(float), steps=0),
        ("ordinary", "cfg-w1", 0): table.assign(score=table["second"].astype(float), steps=4),
    }


def test_cascades_of_known_scores(finished, script):
    """Half of InD and of near-OOD has to go on, and no far-OOD: (1/2 + (1/2 + 0) / 2) / 2 of the stream."""
    found = script("cascade")["measure"](open_run(), known_tables(10), "ordinary", "knn", "cfg-w1", draws=10)
    assert found["auroc"]["knn"] == {"near": pytest.approx(0.875), "far": 1.0}
    assert found["auroc"]["cfg-w1"] == {"near": 1.0, "far": 0.0}
    ways = {each["drawn"] for each in found["results"]}
    assert len(ways) == 3
    results = {(each["drawn"], each["stated_loss"]): each for each in found["results"]}
    for way in ways:
        assert results[way, 0.002]["everything"] == results[way, 0.002]["share"]["mean"] == 1
        assert results[way, 0.02]["everything"] == 0
        assert 0.25 < results[way, 0.05]["share"]["least"] < 0.55
        for loss in (0.002, 0.01, 0.02, 0.05):
            assert results[way, loss]["exceeded"] == {"near": 0, "far": 0}
            assert results[way, loss]["loss"]["far"]["mean"] <= 0
    dealt = results["same kinds, 25% to validation", 0.02]
    assert dealt["validation_images"] == {"ind": 500, "near": 500, "far": 1500}
    assert results["other kinds", 0.02]["validation_images"] == {"ind": 1000, "near": 1000, "far": 3000}


def test_a_loss_that_is_exceeded_is_counted(script):
    summary = script("cascade")["_summary"]
    found = [
        {"share": share, "loss": {"near": loss, "far": -loss}} for share, loss in ((1, 0), (0.5, 0.03), (0.3, 0.01))
    ]
    says = summary(found, 0.02)
    assert says["exceeded"] == {"near": pytest.approx(1 / 3), "far": 0}
    assert (says["everything"], says["share"]) == (pytest.approx(1 / 3), {"mean": pytest.approx(0.6), "least": 0.3})
    assert says["loss"]["near"]["mean"] == pytest.approx(0.04 / 3)


def test_a_finished_run_chooses_its_band_on_validation(finished):
    run, tables = open_run(), known_tables(30)
    strict = {"cascade": run.params.combine["cascade"].model_copy(update={"loss": 0.01, "confidence": 0.95})}
    run = replace(run, params=run.params.model_copy(update={"combine": strict}))
    tables = {
        ("ordinary", "pixel-knn", 0): tables["ordinary", "knn", 0],
        ("ordinary", "fused", 0): tables["ordinary", "cfg-w1", 0],
    }
    goes_on = fitted(run, tables, "ordinary", "cascade", 0).undecided([45.0, 60.0, 80.0, 180.0])
    assert goes_on.tolist() == [False, True, True, False]


def test_cascades_of_a_finished_run(finished, script, capsys, tmp_path):
    output = tmp_path / "found.json"
    script("cascade", "--output", output, "--draws", 3)
    found = json.loads(output.read_text())
    assert found["gates"].keys() == {"msp", "knn", "mahalanobis", "pixel-knn"}
    for gate in found["gates"].values():
        for each in gate["results"]:
            assert 0 <= each["share"]["least"] <= each["share"]["mean"] <= 1
            # So few images show nothing.
            assert each["everything"] == 1
            assert each["loss"].keys() == each["exceeded"].keys() == {"near", "far"}
    assert "| pixel-knn | other kinds | 1 | 100 % | 100 % |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("calibration", ["--detectors", "cfg-w9"], "--detectors: 'cfg-w9' is not one of cfg-w1"),
        ("calibration", ["--splits", "1"], "--splits: 1 is not at least 2"),
        ("fusion", ["--combinations", "knn"], "--combinations: 'knn' is not one of fused"),
        ("cascade", ["--gates", "cfg-w1"], "--gates: 'cfg-w1' is not one of"),
        ("cascade", ["--classifier", "weak"], "--classifier: 'weak' is not one of ordinary, strong"),
        ("cascade", ["--draws", "0"], "--draws: 0 is not at least 1"),
    ],
)
def test_a_wrong_option_is_one_line(finished, script, name, options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        script(name, *options)
