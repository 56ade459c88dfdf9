"""The measurements of calibration, fusion and cascades, on data whose answer is known and on a small finished run."""

import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image

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
        assert rows.keys() == {"fused"}
        assert rows["fused"]["difference"].keys() == set(open_run().params.score.names)
        assert rows["fused"]["diffguard"] == ["cfg-w1"]
        each = rows["fused"]["difference"]["knn"]["near"]["auroc"]
        assert each["low"] <= each["value"] <= each["high"]
    assert "| strong | fused | cfg-w1 (DiffGuard alone) |" in capsys.readouterr().out


def known_tables():
    """A gate that mixes half of the InD with half of the near-OOD images, and a second detector that knows these.

    On far-OOD, of which there are many, the gate is right and the second detector always wrong.
    """
    rows = []
    for split in ("validation", "test"):
        rows += [(split, "ind", gate, gate) for gate in range(100)]
        rows += [(split, "near", 50 + number, 190) for number in range(100)]
        rows += [(split, "far", 180, -1) for _ in range(300)]
    rows += [("calibration", "ind", number + 0.5, number + 0.5) for number in range(200)]
    table = pd.DataFrame(rows, columns=["split", "role", "gate", "second"])
    return {
        ("ordinary", "knn", 0): table.assign(score=table["gate"].astype(float), steps=0),
        ("ordinary", "cfg-w1", 0): table.assign(score=table["second"].astype(float), steps=4),
    }


def test_a_cascade_whose_band_is_known(finished, script):
    """Half of InD and of near-OOD and no far-OOD goes on: (1/2 + (1/2 + 0) / 2) / 2 of the stream."""
    found = script("cascade")["measure"](open_run(), known_tables(), "ordinary", "knn", "cfg-w1")
    assert found["gate_alone"]["near"] == {"auroc": pytest.approx(0.875), "fpr95": 0.45}
    assert found["gate_alone"]["stream"] == {"auroc": pytest.approx(0.9375), "fpr95": 0.225}
    assert found["second_alone"]["far"] == {"auroc": 0.0, "fpr95": 1.0}
    assert found["second_alone"]["stream"] == {"auroc": 0.5, "fpr95": 0.5}
    chosen = {each["stated_loss"]: each for each in found["chosen_on_validation"]}
    exact = chosen[0.0]
    assert exact["share_of"] == {"ind": 0.5, "near": 0.5, "far": 0.0}
    assert (exact["share"], exact["evaluations"]) == (0.375, 3.0)  # 4 steps up and 4 down
    assert exact["near"]["loss"]["value"] == pytest.approx(0)
    assert exact["near"]["fpr95"]["value"] == exact["stream"]["fpr95"]["value"] == 0
    assert exact["far"]["loss"]["value"] == pytest.approx(-1)
    assert exact["stream"]["loss"]["value"] == pytest.approx(-0.5)
    shares = [each["share"] for each in chosen.values()]
    assert shares == sorted(shares, reverse=True)
    assert 0 < chosen[0.05]["share"] < chosen[0.01]["share"] < 0.375
    assert chosen[0.01]["near"]["loss"]["value"] == pytest.approx(0.01, abs=0.002)
    described = found["described_on_test"]
    # The second detector alone loses half of the stream's AUROC, so that no band is needed for that.
    assert described["share_needed"]["0.002"]["stream"]["best_of_all_bands"] == 0
    assert 0.3 < described["share_needed"]["0.01"]["near"]["best_of_all_bands"] < 0.375
    assert described["share_needed"]["0.01"]["near"]["about_the_middle"] < 0.8
    best = described["best_of_all_bands"][-1]
    assert (best["share"], best["evaluations"]) == (0.375, 3.0)
    assert {part: best[part]["auroc"] for part in ("near", "far", "stream")} == pytest.approx(
        {"near": 1, "far": 1, "stream": 1}
    )
    assert best["near"]["fpr95"] == 0


def test_a_finished_run_chooses_as_the_report_does(finished):
    run, tables = open_run(), known_tables()
    tables = {
        ("ordinary", "pixel-knn", 0): tables["ordinary", "knn", 0],
        ("ordinary", "fused", 0): tables["ordinary", "cfg-w1", 0],
    }
    goes_on = fitted(run, tables, "ordinary", "cascade", 0).undecided([49.0, 60.0, 80.0, 100.0, 180.0])
    assert goes_on.tolist() == [False, True, True, False, False]


def test_cascades_of_a_finished_run(finished, script, capsys, tmp_path):
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    script("cascade", "--output", output, "--plot", picture)
    found = json.loads(output.read_text())
    assert found["gates"].keys() == {"msp", "knn", "mahalanobis", "pixel-knn"}
    for gate in found["gates"].values():
        alone = gate["second_alone"]
        for each in gate["chosen_on_validation"]:
            assert each["evaluations"] == pytest.approx(8 * each["share"])
            for part in ("near", "far", "stream"):
                loss = each[part]["loss"]
                assert each[part]["auroc"]["value"] + loss["value"] == pytest.approx(alone[part]["auroc"])
                assert loss["low"] <= loss["value"] <= loss["high"]
        middle, best = (gate["described_on_test"][each] for each in ("about_the_middle", "best_of_all_bands"))
        for point in (*middle, *best):
            assert point["evaluations"] == pytest.approx(8 * point["share"])
            for metric in ("auroc", "fpr95", "loss"):
                both = (point["near"][metric] + point["far"][metric]) / 2
                assert point["stream"][metric] == pytest.approx(both)
        assert (middle[0]["share"], middle[-1]["share"]) == (0, 1)
        without = gate["gate_alone"]["stream"]["auroc"]
        assert middle[0]["stream"]["loss"] == pytest.approx(alone["stream"]["auroc"] - without, abs=0.03)
        assert all(one["stream"]["loss"] >= other["stream"]["loss"] - 1e-9 for one, other in pairwise(best))
    with Image.open(picture) as opened:
        assert opened.width > 500
    printed = capsys.readouterr().out
    assert "| pixel-knn | 0.002 |" in printed
    assert "| pixel-knn | near |" in printed


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
