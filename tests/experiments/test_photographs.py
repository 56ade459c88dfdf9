"""What is asked of a run on photographs, on a small finished run of digits and on scores whose answer is known."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score
from small_project import make_project, write_params

from diffguard.engine import Request, score_batch
from diffguard.models.denoisers.loading import load_denoiser
from diffguard.settings import TrainedDenoiser
from diffguard.training import TrainingStep
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.models.checks import open_model
from tasks.score.stage import score
from tasks.services.training_log import open_training
from tasks.train.meter import open_meter


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A project folder with a finished run that has the rows which are asked for."""
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text())["score"]["baselines"]

    def change(params):
        params["score"]["baselines"] |= {name: shipped[name] for name in ("maxlogit", "complexity")}
        params["combine"]["fused"]["of"] = ["cfg-w1", "knn", "maxlogit"]
        params["classifiers"] = ["ordinary"]

    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("project")
        make_project(patch, root)
        write_params(root, change)
        score(open_run())
        yield root


def test_a_finished_run_is_asked(scored, script, capsys, tmp_path):
    script("photographs", "--benchmark", "digits", "--output", tmp_path / "out.json", "--pictures", tmp_path / "shown")
    found = json.loads((tmp_path / "out.json").read_text())["classifiers"]["ordinary"]
    rows, best = found["rows"], found["best"]
    near = {name: row["metrics"]["near"]["auroc"]["value"] for name, row in rows.items()}
    singles = ("msp", "maxlogit", "knn", "mahalanobis", "pixel-knn", "complexity")
    assert near[best["single"]] == max(near[name] for name in singles)
    assert best["semantic"] in {"cfg-w1", "cfg-early-stop", "paper-cg"}
    assert not rows[best["fusion"]]["diffusion"]
    assert rows["base + cfg-w1"]["diffusion"]
    for name, row in rows.items():
        assert row["diffusion"] == bool(row["minus"]), name
        for kind, differences in row["minus"].items():
            other = best.get(kind, kind)
            assert differences["near"]["auroc"]["value"] == pytest.approx(near[name] - near[other], abs=1e-5)
    # These images have no class of their own.
    assert {name: each["images"] for name, each in found["near_classes"].items()} == {"digits-6-8": 6}
    assert found["near_classes"]["digits-6-8"]["auroc"]["knn"] == pytest.approx(near["knn"], abs=1e-5)
    assert found["gate"].keys() == {"0.005", "0.01", "0.02", "0.05"}
    assert 0 <= found["decision"]["rejected"]["ind"]["value"] <= 1
    knows = json.loads((tmp_path / "out.json").read_text())["denoiser"]
    assert knows["images"] > 0
    assert 0 <= knows["accuracy"] <= 1
    printed = capsys.readouterr().out
    assert f"near, minus {best['single']}" in printed
    assert "| **cfg-w1** |" in printed
    for name in ("knn", "weighted"):
        picture = Image.open(tmp_path / "shown" / f"digits-ordinary-wrong-{name}.png")
        assert min(picture.size) > 100


def test_a_row_that_is_missing_is_named(scored, script):
    params = yaml.safe_load((scored / "params.yaml").read_text())
    without = {**params, "score": {**params["score"], "baselines": dict(params["score"]["baselines"])}}
    del without["score"]["baselines"]["complexity"]
    (scored / "params.yaml").write_text(yaml.safe_dump(without, sort_keys=False))
    try:
        with pytest.raises(SystemExit, match="error: digits: detectors: complexity is not among its rows"):
            script("photographs", "--benchmark", "digits")
    finally:
        (scored / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def test_alarms_are_rare_without_drift_and_sure_with_it(script, scored):
    rng = np.random.default_rng(0)

    def rows(split, role, count, shift):
        scores = rng.normal(size=count) + shift
        return pd.DataFrame({"split": split, "role": role, "predicted": 0, "score": scores})

    table = pd.concat(
        [rows("calibration", "ind", 1000, 0), rows("test", "ind", 2000, 0), rows("test", "near", 2000, 3)],
        ignore_index=True,
    )
    found = script("photographs")["drift"](open_run(), table)
    assert max(found["0"].values()) < 0.15
    # Nine in ten of these images are rejected: at 30 % of them a rate of .3 where .05 is promised.
    assert found["0.3"]["50"] > 0.9
    for window in ("50", "200", "1000"):
        shares = [found[part][window] for part in ("0", "0.05", "0.1", "0.2", "0.3")]
        assert shares == sorted(shares)


def test_terms_of_the_loss_are_tried_from_the_same_weights(scored, script, tmp_path):
    start, output = open_run().model(0, "denoiser"), tmp_path / "terms.json"
    options = ("--benchmark", "digits", "--from", start, "--images", 64, "--output", output)
    script("label_terms", *options, "--terms", "start", "none", "wrong_label")
    script("label_terms", *options, "--terms", "contrastive", "aligned")
    terms = json.loads(output.read_text())["terms"]
    assert list(terms) == ["start", "none", "wrong_label", "contrastive", "aligned"]
    assert [each["images"] for each in terms.values()] == [0, 64, 64, 64, 64]
    for each in terms.values():
        assert 0 <= each["validation"]["accuracy_as_classifier"] <= 1


def test_alignment_is_with_the_similarities_of_the_classifiers_features(scored, script):
    label_terms = script("label_terms")
    run = open_run()
    denoiser, classifier = load_denoiser(run.model(0, "denoiser")), open_model(run, run.model(0, "ordinary"))
    loss = label_terms["aligned"](classifier)(denoiser)
    images = torch.rand(6, *denoiser.image_shape, generator=torch.manual_seed(0))

    def of(maps):
        in_its_place = denoiser.unet.mid_block.register_forward_hook(lambda *_: maps, prepend=True)
        denoiser.predict(images * 2 - 1, torch.full((6,), 500), torch.zeros(6, dtype=torch.int64))
        in_its_place.remove()
        return float(loss(images))

    features = classifier.features(images)[:, :, None, None].expand(-1, -1, 1, 1)
    channels = denoiser.unet.mid_block.resnets[-1].conv2.out_channels
    padded = torch.zeros(6, channels, 1, 1)
    assert features.shape[1] <= channels
    padded[:, : features.shape[1]] = features - features.mean(dim=0)
    assert of(padded.expand(-1, -1, 4, 4)) == pytest.approx(0, abs=1e-10)
    assert of(padded.roll(1, 0).expand(-1, -1, 4, 4)) > 1e-3


def test_rows_of_the_label_by_levels_and_draws(scored, script, tmp_path):
    output = tmp_path / "rows.json"
    script("label_rows", "--benchmark", "digits", "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert {name: row["evaluations"] for name, row in rows.items()}.items() >= {
        "gain, level 3": 2,
        "gain, levels 1 to 7, draws: 4": 56,
        "gain, levels 5 to 7, draws: 4": 24,
        "posterior, levels 3 to 7": 30,
    }.items()
    assert all(0 <= row["near_auroc"] <= 1 for row in rows.values())
    run = open_run()
    meter = open_meter(run, 0)
    request = Request(meter.classifier, script("label_rows")["gain"](draws=2))
    images = torch.cat([meter.images, meter.near]).float() / 255
    [found] = score_batch(images, open_model(run, run.model(0, "denoiser")), [request])
    is_ood = [0] * len(meter.images) + [1] * len(meter.near)
    assert rows["gain, levels 1 to 7, draws: 2"]["near_auroc"] == pytest.approx(roc_auc_score(is_ood, found.score))


def test_growth_is_that_of_the_full_rate(script):
    growth = script("photographs")["growth"]
    curve = [[1000.0 * 2**doubling, 0.4 + 0.05 * doubling, 1.0] for doubling in range(5)]
    found = growth([*curve, [32000.0, 0.9, 0.1]], 0.75)
    assert found["per_doubling"] == pytest.approx(0.05)
    assert found["images_for_target"] == pytest.approx(128_000)
    assert found["deviation"] == pytest.approx(0, abs=1e-9)
    assert growth(curve[:3], 0.75) is None
    assert growth([[images, -value, rate] for images, value, rate in curve], 0.75) is None


def test_curves_are_of_the_newest_training_over_images_seen(scored, script, tmp_path):
    run = open_run()
    for training, (batch, accuracy) in enumerate(((100, 0.2), (10, 0.5))):
        log = open_training(run, "denoiser", TrainedDenoiser(kind="trained"), 0, tmp_path / f"{training}.mlflow")
        for step, rate in ((1, 1e-3), (3, 1e-3), (4, 1e-4)):
            log.logged = -math.inf  # so that each step is a point
            log.step(TrainingStep(step, 4, step * batch, 1.0, 1.0, rate, 50.0))
            log.value(step, "validation/accuracy_as_classifier", accuracy + step / 100)
        log.close("FINISHED")
    assert script("photographs")["curves"](run, 1000) == {
        "accuracy_as_classifier": [
            [1010.0, pytest.approx(0.51), 1.0],
            [1030.0, pytest.approx(0.53), 1.0],
            [1040.0, pytest.approx(0.54), pytest.approx(0.1)],
        ]
    }
