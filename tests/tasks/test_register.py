"""The stages bundle and register: what is deployed decides as the pipeline did, and who is champion, and why."""

import re
import shutil

import mlflow
import numpy as np
import pandas as pd
import pytest
from small_project import write_params

import tasks.register
from diffguard.deploy.bundle import load_bundle, save_bundle
from diffguard.errors import DiffGuardError, SettingError
from diffguard.loading import open_detector
from tasks.bundle import bundle, deployed_row
from tasks.calibrate import calibrate
from tasks.combine import score_tables
from tasks.common.files import read_images
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.log import log
from tasks.production.recalibrate import Recalibration, recalibrate
from tasks.production.recalibrate import register as register_recalibrated
from tasks.register import compare, register
from tasks.score.plan import plan
from tasks.score.stage import score
from tasks.services.tracking import open_tracking

COMBINE = {
    "fused": {"kind": "z-sum", "of": ["cfg-w1", "knn"]},
    "gated": {"kind": "cascade", "of": ["pixel-knn", "paper-cg"], "loss": 0.9},
    "best": {"kind": "best", "of": ["paper-cg", "knn", "pixel-knn", "cfg-early-stop"]},
}


def deploy(project, detector):
    """params.yaml with combinations, and this row deployed."""

    def change(params):
        params["combine"] = COMBINE
        params["bundle"] = {"detector": detector}

    write_params(project, change)
    return open_run()


@pytest.fixture(scope="module")
def scored(project):
    run = deploy(project, None)
    score(run)
    return run


@pytest.mark.parametrize("name", ["cfg-w1", "cfg-early-stop", "mahalanobis", "fused", "gated", "best"])
def test_a_deployed_detector_scores_as_the_pipeline_did(project, scored, name):
    run = deploy(project, name)
    items = plan(run)
    detector = load_bundle(bundle(run, items), "cpu")
    assert (detector.info.detector, detector.info.classifier, detector.alpha) == (name, "ordinary", 0.05)
    table = score_tables(run, items)["ordinary", name, 0].set_index("id").loc[run.scored["id"]]
    test = (run.scored["split"] != "calibration").to_numpy()
    decisions = detector.decide(read_images(run.home, run.scored[test]))
    assert np.abs(np.array([each.score for each in decisions]) - table["score"][test].to_numpy()).max() < 1e-4
    assert [each.label for each in decisions] == table["predicted"][test].tolist()
    assert len(detector.calibration) == 24
    assert set(detector.validation["dataset"]) == {"digits-0-5", "digit-9", "symbols"}
    assert np.allclose(detector.calibration["score"], table["score"][~test])


def test_the_default_is_deployed_unless_another_row_is_named(project, scored):
    assert deployed_row(deploy(project, None)) == "cfg-w1"
    assert deployed_row(deploy(project, "fused")) == "fused"
    assert deployed_row(open_run(variants=["msp"])) == "msp"
    with pytest.raises(DiffGuardError, match=r"bundle.detector: 'nobody' is not one of"):
        deploy(project, "nobody")


def test_what_cannot_decide_on_a_new_image_is_not_deployed(project, scored):
    def change(params):
        params["score"]["imported"] = {"theirs": {"file": "theirs.parquet"}}
        params["score"]["variants"]["told"] = {**params["score"]["variants"]["cfg-w1"], "label": "oracle"}
        params["combine"] = {"with-theirs": {"kind": "z-sum", "of": ["cfg-w1", "theirs"]}}
        params["bundle"] = {"detector": row}
        params["evaluate"]["default"] = "theirs"

    for row, reason in {
        "theirs": "the scores of theirs are imported",
        "told": r"told is told the label \(label: oracle\)",
        "with-theirs": "the scores of theirs are imported",
    }.items():
        write_params(project, change)
        with pytest.raises(SettingError, match=f"bundle.detector: {row} cannot be deployed: {reason}"):
            deployed_row(open_run())
    row = None
    write_params(project, change)
    assert deployed_row(open_run()) == "cfg-w1"
    assert deployed_row(open_run(variants=["theirs"])) is None
    write_params(project)


@pytest.fixture(scope="module")
def few():
    """As many validation images as this project has make a champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.register, "FEWEST", 12)
        yield


@pytest.fixture(scope="module")
def registered(project, scored, few):
    """Three runs after one another: a first, one that is no better, one that is."""
    found = []
    # Under tiny models no row is better than another; scores of the validation table say which is.
    for quality in (1.5, 0.0, 6.0):
        run = deploy(project, "cfg-w1")
        items = plan(run)
        thresholds, metrics = calibrate(run, items), evaluate(run, items)
        detector = load_bundle(bundle(run, items), "cpu")
        detector.validation["score"] = told(detector.validation, quality)
        save_bundle(detector, run.results / "detector")
        parent = log(run, items, metrics, thresholds)
        found.append((register(run, parent, metrics), parent, metrics))
    return found


def told(table, quality, seed=0):
    """Scores that tell OOD from InD so well."""
    noise = np.random.default_rng(seed).normal(size=len(table))
    return noise + quality * (table["role"] != "ind")


def test_the_alias_moves_to_a_version_that_is_better_and_to_no_other(registered):
    (first, *_), (worse, *_), (better, *_) = registered
    assert [each.version for each, *_ in registered] == ["1", "2", "3"]
    assert (first.is_champion, worse.is_champion, better.is_champion) == (True, False, True)
    assert first.why.startswith("version 1 is champion: there was no champion; on 12 InD and 12 OOD validation images")
    assert first.why.endswith("which is above chance")
    assert worse.why.startswith("version 1 stays champion: on 12 InD and 12 OOD validation images (digit-9, symbols)")
    assert "which is not above 0" in worse.why
    assert better.why.startswith("version 3 is champion, in place of version 1: on 12 InD and 12 OOD validation images")
    client = open_tracking()
    assert str(client.get_model_version_by_alias("diffguard-digits", "champion").version) == "3"
    for each, *_ in registered:
        assert client.get_model_version("diffguard-digits", each.version).tags["champion_decision"] == each.why


def test_the_version_shows_signature_metrics_tags_and_a_picture(registered):
    found, parent, metrics = registered[-1]
    client = open_tracking()
    version = client.get_model_version("diffguard-digits", found.version)
    near = metrics["ordinary"]["cfg-w1"]["near"]["auroc"]
    assert version.run_id == parent
    assert version.tags["detector"] == "cfg-w1"
    assert version.tags["alpha"] == "0.05"
    assert version.tags["near_auroc"].startswith(f"{100 * near['value']:.1f} %")
    assert f"| near AUROC | {100 * near['value']:.1f} %" in version.description
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    logged = {each.key: each.value for each in model.metrics}
    assert logged["detector/near_auroc"] == pytest.approx(near["value"])
    assert logged["detector/near_auroc_low"] == pytest.approx(near["low"])
    info = mlflow.models.get_model_info(found.uri)
    assert info.signature.inputs.input_names() == ["image"]
    assert mlflow.artifacts.load_image(f"{found.uri}/extra_files/verdicts.png").height > 100
    assert client.get_run(parent).info.status == "FINISHED"


def test_one_that_is_calibrated_anew_shows_what_was_measured_before(project, registered):
    found, _, metrics = registered[-1]
    client = open_tracking()
    images = sorted((project / "data/digits/images/digits-0-5/test").glob("*.png"))[:12]
    images += sorted((project / "data/digits/images/digits-0-5/train").glob("*.png"))[:30]
    (project / "anew").mkdir()
    for number, image in enumerate(images):
        shutil.copy(image, project / "anew" / f"{number}.png")
    detector = found.uri
    for output in ("first", "second"):
        options = {"images": str(project / "anew"), "detector": detector, "output": str(project / output)}
        anew = recalibrate(Recalibration(**options, accept=0.9))
        version = client.get_model_version("diffguard-digits", register_recalibrated(anew).rpartition("/")[2])
        near = metrics["ordinary"]["cfg-w1"]["near"]["auroc"]["value"]
        assert version.tags["test_figures"] == f"of version {found.version}, before it was recalibrated"
        assert version.tags["near_auroc"].startswith(f"{100 * near:.1f} %")
        assert (version.tags["classifier"], version.tags["alpha"]) == ("ordinary", "0.1")
        assert f"These figures and the picture are of version {found.version}" in version.description
        assert f"| near AUROC | {100 * near:.1f} %" in version.description
        assert f"verdicts.png&name=diffguard-digits&version={version.version}" in version.description
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert {each.key: each.value for each in model.metrics}["detector/near_auroc"] == pytest.approx(near)
        assert "validation_auroc_after/digit-9" in {each.key for each in model.metrics}
        assert model.tags["test_figures"] == version.tags["test_figures"]
        uri = f"models:/diffguard-digits/{version.version}"
        assert mlflow.artifacts.load_image(f"{uri}/extra_files/verdicts.png").height > 100
        detector = str(project / output)  # a folder; by its hash the registry knows it


def test_registering_again_makes_no_second_version(project, registered):
    found, parent, metrics = registered[-1]
    again = register(deploy(project, "cfg-w1"), parent, metrics)
    assert again == found


def test_a_run_of_nothing_new_is_no_new_version(project, registered):
    """Another run of the flow that made the same bundle, to the byte."""
    found, _, metrics = registered[-1]
    before = len(open_tracking().search_model_versions("name = 'diffguard-digits'"))
    again = register(deploy(project, "cfg-w1"), "0" * 32, metrics)
    assert (again.version, again.is_champion) == (found.version, True)
    assert again.why == "the bundle is version 3 already, to the byte, and no new one; version 3 stays champion"
    assert len(open_tracking().search_model_versions("name = 'diffguard-digits'")) == before


@pytest.mark.parametrize(
    ("count", "quality", "is_champion", "why"),
    [
        (60, 2.0, True, "on 60 InD and 60 OOD validation images its AUROC is .*, which is above chance"),
        (60, 0.0, False, r"its AUROC is .* \(95 % interval .*\), which is not above chance"),
        (60, -2.0, False, "which is not above chance"),
        (30, 2.0, False, "it has 30 InD and 30 OOD validation images, and a first champion takes 50 of either"),
        (0, 2.0, False, "it has 0 InD and 0 OOD validation images, .*; move the alias by hand, or give the benchmark"),
    ],
)
def test_a_first_champion_has_evidence(count, quality, is_champion, why, monkeypatch):
    monkeypatch.setattr(tasks.register, "FEWEST", 50)
    found = tasks.register.first_champion(validation(count, quality), 200, 0)
    assert found.is_better is is_champion
    assert re.search(why, found.why)


def test_the_champion_is_loaded_by_its_alias(registered, scored):
    detector = open_detector("models:/diffguard-digits@champion", "cpu")
    images = read_images(scored.home, scored.scored[-5:])
    table = {item.name: item for item in plan(scored) if item.classifier == "ordinary"}["cfg-w1"].read()
    expected = table["score"].tolist()[-5:]
    assert [each.score for each in detector.decide(images)] == pytest.approx(expected, abs=1e-4)


def validation(count=100, quality=1.0, seed=0, prefix=""):
    table = pd.DataFrame({"content_hash": [f"{prefix}{row}" for row in range(2 * count)]})
    table["role"] = ["ind"] * count + ["near"] * count
    table["dataset"] = table["role"]
    return table.assign(score=told(table, quality, seed))


def test_a_challenger_must_be_better_by_the_paired_interval():
    champion = validation()
    assert compare(validation(quality=2.0), champion, 200, 0).is_better
    for challenger in (validation(quality=0.5), champion, champion.assign(score=2 * champion["score"] + 1)):
        assert not compare(challenger, champion, 200, 0).is_better
    same = compare(champion, champion, 200, 0)
    assert "+0.00 points, has the 95 % interval +0.00 to +0.00" in same.why
    # Better by luck: the interval knows.
    lucky = compare(validation(seed=1), validation(seed=2), 500, 0)
    flipped = compare(validation(seed=2), validation(seed=1), 500, 0)
    assert not lucky.is_better
    assert not flipped.is_better


def test_images_are_paired_by_their_content():
    """In another order, with others beside them: the difference is that of the images in common."""
    champion, challenger = validation(), validation(quality=2.0)
    mixed = pd.concat([challenger.sample(frac=1, random_state=0), validation(30, prefix="other ")])
    found = compare(mixed, champion, 200, 0)
    assert "on 100 InD and 100 OOD validation images (near) that both have" in found.why
    assert found.is_better


@pytest.mark.parametrize(
    ("challenger", "champion", "why"),
    [
        (validation(), None, "cannot be read; move the alias by hand"),
        (
            validation(),
            validation()[:0],
            "the champion has no validation images, so nothing says which is better; move",
        ),
        (validation()[:0], validation(), "the challenger has no validation images"),
        (validation(), validation(prefix="other "), "0 InD and 0 OOD validation images in common"),
        (validation(), validation()[:50], "50 InD and 0 OOD validation images in common"),
    ],
)
def test_where_nothing_can_be_compared_the_champion_stays_and_it_says_so(challenger, champion, why):
    found = compare(challenger, champion, 200, 0)
    assert not found.is_better
    assert why in found.why
