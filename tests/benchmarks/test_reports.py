"""The measurements of calibration, fusion and cascades, on data whose answer is known and on a small finished run."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.run import open_run


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
        assert rows.keys() == {"fused"}
        assert rows["fused"]["difference"].keys() == set(open_run().params.score.names)
        assert rows["fused"]["diffguard"] == ["cfg-w1"]
        each = rows["fused"]["difference"]["knn"]["near"]["auroc"]
        assert each["low"] <= each["value"] <= each["high"]
    assert "| strong | fused | cfg-w1 (DiffGuard alone) |" in capsys.readouterr().out


def test_cascades_of_a_finished_run(finished, script, capsys, tmp_path):
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    script("cascade", "--output", output, "--plot", picture)
    found = json.loads(output.read_text())
    assert found["gates"].keys() == {"msp", "knn", "mahalanobis", "pixel-knn"}
    for gate in found["gates"].values():
        shares = [each["share"] for each in gate["chosen_on_validation"]]
        assert shares == sorted(shares, reverse=True)
        for each in gate["chosen_on_validation"]:
            assert each["evaluations"] == pytest.approx(8 * each["share"])
            assert each["auroc"]["value"] + each["loss"]["value"] == pytest.approx(gate["second_alone"])
        middle = gate["described_on_test"]["about_the_middle"]
        assert (middle[0]["share"], middle[-1]["share"]) == (0, 1)
        assert middle[0]["loss"] == pytest.approx(gate["second_alone"] - gate["gate_alone"], abs=0.03)
        best = gate["described_on_test"]["best_of_all_bands"]
        assert all(one["loss"] >= other["loss"] - 1e-12 for one, other in pairwise(best))
    with Image.open(picture) as opened:
        assert opened.width > 500
    assert "| pixel-knn | 0.002 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("calibration", ["--detectors", "cfg-w9"], "--detectors: 'cfg-w9' is not one of cfg-w1"),
        ("calibration", ["--splits", "1"], "--splits: 1 is not at least 2"),
        ("fusion", ["--combinations", "knn"], "--combinations: 'knn' is not one of fused"),
        ("cascade", ["--gates", "cfg-w1"], "--gates: 'cfg-w1' is not one of"),
        ("cascade", ["--classifier", "weak"], "--classifier: 'weak' is not one of ordinary, strong"),
    ],
)
def test_a_wrong_option_is_one_line(finished, script, name, options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        script(name, *options)
