"""A detector in a folder of its own: the same decisions wherever it is loaded, and nothing else is loaded."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from small_detector import Made

import diffguard.deploy.bundle
import diffguard.utils.atomic
from diffguard.deploy.bundle import check_new, hash_bundle, load_bundle, save_bundle
from diffguard.deploy.explanation import brightening
from diffguard.detectors.diffguard import DiffGuard
from diffguard.distances.functions import difference_map
from diffguard.engine import Request, score_batch
from diffguard.errors import DataError, DiffGuardError, ServiceError, SettingError
from diffguard.images import to_picture
from diffguard.loading import open_detector
from diffguard.settings import LabelGuidance, NoGuidance, Variant

FITTED = ["mahalanobis", "pixel-knn", "kl-matching", "react", "nac"]
ROWS = ["guided", "adaptive", *FITTED, "fused", "gated", "all", "gated-all", "best", "weighted"]


@pytest.fixture(scope="module")
def made(classifier, denoiser):
    return Made(classifier, denoiser)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "detector"
    save_bundle(made.detector("gated"), folder)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_scores_are_those_that_the_row_was_evaluated_with(made, tmp_path, name):
    save_bundle(made.detector(name), tmp_path / "detector")
    detector = load_bundle(tmp_path / "detector", "cpu", slots=5)
    decisions = detector.decide(made.new)
    expected = made.scores["new", ""][name]
    assert np.abs([each.score for each in decisions] - expected).max() < 1e-4
    # In other company an image's decision is the same.
    alone = [detector.decide(image[None])[0] for image in made.new[:4]]
    assert np.abs(np.array([each.score for each in alone]) - expected[:4]).max() < 1e-4


MORE = {
    "path-mixture": Variant(stop=3, guidance=NoGuidance(), distance="path", path_components=3),
    "gain": Variant(stop=2, guidance=LabelGuidance(scale=3), distance="l1", against="gain"),
    "features": Variant(stop=2, guidance=LabelGuidance(scale=1), distance="features-normalized"),
}


@pytest.mark.parametrize("name", MORE)
def test_what_a_variant_was_fitted_to_is_in_the_bundle(name, classifier, denoiser, tmp_path):
    made = Made(classifier, denoiser, {name: MORE[name]})
    save_bundle(made.detector(name), tmp_path / "detector")
    loaded = load_bundle(tmp_path / "detector", "cpu", slots=5)
    assert loaded.info.variants[name] == made.variants[name]
    assert not loaded.info.variants[name].needs_fit
    scores = [decision.score for decision in loaded.decide(made.new)]
    assert np.allclose(scores, made.scores["new", ""][name], rtol=1e-3, atol=1e-4)


def test_the_picture_of_a_gain_shows_where_the_label_leads_farther(classifier, denoiser):
    made = Made(classifier, denoiser, {"gain": MORE["gain"]})
    [scored] = score_batch(made.new[:1], denoiser, [Request(classifier, made.variants["gain"])])
    expected = difference_map(made.new[0], scored.reconstruction[0], scored.unconditional[0], "gain")
    assert 0 < float(expected.mean()) < 0.5
    picture = np.asarray(made.detector("gain").picture(made.new[0]))
    left = 8 + 3 * (128 + 8)
    cell = picture[22 : 22 + 128, left : left + 128, 0][::16, ::16]
    brightened = (brightening(expected) * expected[0]).clamp(max=1)
    assert np.allclose(cell, (brightened * 255).round(), atol=1)
    drawn = np.asarray(DiffGuard(classifier, denoiser, MORE["gain"]).picture(made.new[:1]))
    left = 4 + 3 * (128 + 4)
    cell = drawn[4 : 4 + 128, left : left + 128, 0][::16, ::16]
    assert np.allclose(cell, (expected[0] * 255).round(), atol=1)


def test_p_values_are_conformal_among_the_stored_calibration_scores(made):
    detector = made.detector("fused", alpha=0.1)
    calibration = made.scores["calibration", "ind"]["fused"]
    assert detector.conformal.pooled_classes(6) != []
    for each in detector.decide(made.new):
        own, predicted = list(detector.conformal.by_class), detector.calibration["predicted"]
        scores = calibration[predicted == each.label if each.label in own else ~predicted.isin(own)]
        assert each.p_value == pytest.approx((1 + (scores >= each.score).sum()) / (len(scores) + 1))
        assert each.is_ood == (each.p_value <= 0.1)
    assert {each.is_ood for each in detector.decide(made.new)} == {True, False}


def test_confidence_and_label_are_the_classifiers(made):
    expected = made.classifier(made.new).softmax(dim=1)
    for decision, each in zip(made.detector("knn").decide(made.new), expected, strict=True):
        assert (decision.label, decision.confidence) == (int(each.argmax()), pytest.approx(float(each.max())))
        assert decision.class_name == ("zero", "one", "two", "three", "four", "five")[decision.label]


def test_a_cascade_diffuses_what_its_gate_leaves_open_and_nothing_else(made):
    detector = made.detector("gated")
    open_ = made.combined["gated"].undecided(made.scores["new", ""]["pixel-knn"])
    assert 0 < open_.sum() < len(open_)
    decisions = detector.decide(made.new, reconstructions=True)
    assert [each.diffused for each in decisions] == open_.tolist()
    assert [each.reconstruction is not None for each in decisions] == open_.tolist()
    # On the way up the network is asked twice an image, without a label; on the way down with one as well.
    assert detector._scorer._engine.stats.evaluations == 6 * open_.sum()
    assert not any(each.diffused for each in made.detector("knn").decide(made.new))
    assert all(each.diffused for each in made.detector("guided").decide(made.new))


def test_of_a_best_fusion_nothing_is_kept_or_scored_that_was_not_chosen(made, tmp_path):
    chosen = made.combined["best"].members
    assert 0 < len(chosen) < 4
    save_bundle(made.detector("best"), tmp_path / "detector")
    detector = load_bundle(tmp_path / "detector", "cpu")
    assert detector.rows == [*chosen, "best"]
    assert set(detector._scorer.variants) | set(detector._scorer.baselines) == set(chosen)
    written = json.loads((tmp_path / "detector" / "detector.json").read_text())["info"]["combined"]["best"]
    assert written["members"] == list(chosen)
    assert written["validation"]["runner_up"]["members"] != list(chosen)
    assert set(detector.member_scores(made.new[:2])[1]) == set(chosen)


def test_reconstructions_come_when_they_are_asked_for(made):
    [plain] = made.detector("guided").decide(made.new[:1])
    [told] = made.detector("guided").decide(made.new[:1], reconstructions=True)
    assert plain.reconstruction is None
    assert told.reconstruction.shape == (1, 8, 8)
    assert (told.reconstruction - made.new[0]).abs().mean() == pytest.approx(told.score, abs=1e-4)


def test_threads_that_ask_at_once_get_their_own_answers(made):
    detector = made.detector("all")
    expected = made.scores["new", ""]["all"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: detector.decide(made.new[row : row + 3]), range(0, 24, 3)))
    assert np.abs(np.array([each.score for part in found for each in part]) - expected).max() < 1e-4


def test_after_an_error_at_work_the_next_images_are_decided_as_ever(made, monkeypatch):
    detector = made.detector("guided")
    detector.decide(made.new[:2])
    with monkeypatch.context() as patch:
        patch.setattr(made.denoiser, "eps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            detector.decide(made.new[:5])
    assert np.allclose([e.score for e in detector.decide(made.new)], made.scores["new", ""]["guided"], atol=1e-4)


@pytest.fixture
def shared(made, monkeypatch):
    """A detector that two processes share, and the processes."""
    monkeypatch.setattr("diffguard.engine.processes.core_count", lambda: 2)
    detector = made.detector("all")
    threads = torch.get_num_threads()
    detector.expect(None)
    yield detector
    torch.set_num_threads(threads)
    detector._scorer._processes.close()


def test_processes_that_share_the_images_of_a_stream_decide_alike(made, shared):
    expected = made.scores["new", ""]["all"]
    decisions = shared.decide(made.new, reconstructions=True)
    assert np.abs([each.score for each in decisions] - expected).max() < 1e-4
    assert all(each.reconstruction is not None for each in decisions)
    spent = shared._scorer._processes.stats.evaluations
    assert spent > 0
    [alone] = shared.decide(made.new[:1])  # in this process
    assert alone.score == pytest.approx(expected[0], abs=1e-4)
    assert shared._scorer._processes.stats.evaluations == spent


def test_a_stream_goes_on_after_a_process_was_killed(made, shared):
    before = shared._scorer._processes
    for child in psutil.Process().children(recursive=True):
        if "LokyProcess" in " ".join(child.cmdline()):
            child.kill()
    with pytest.raises(ServiceError, match="a process that scores was killed"):
        shared.decide(made.new)
    decisions = shared.decide(made.new)
    assert np.abs([each.score for each in decisions] - made.scores["new", ""]["all"]).max() < 1e-4
    assert shared._scorer._processes is not before


def test_few_images_are_decided_without_measuring_and_here(made, monkeypatch):
    monkeypatch.setattr("diffguard.engine.processes.core_count", lambda: 2)
    monkeypatch.setattr("diffguard.deploy.scorer.tune", lambda *_, **__: pytest.fail("measured"))
    detector = made.detector("guided")
    detector.expect(3)
    scores = [each.score for each in detector.decide(made.new[:3])]
    assert np.allclose(scores, made.scores["new", ""]["guided"][:3], atol=1e-4)


def test_it_works_from_another_place_and_without_the_pipeline(made, folder, tmp_path):
    """A fresh process that has the library alone, as where the wheel is installed."""
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, moved)
    to_picture(made.new[0]).save(tmp_path / "image.png")
    code = """if True:
        import json, sys
        class Absent:
            def find_spec(self, name, *_):
                if name.partition(".")[0] in ("tasks", "flows", "prefect", "dvc", "mlflow", "great_expectations"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Absent())
        from PIL import Image
        from diffguard.loading import open_detector
        detector = open_detector(sys.argv[1], "cpu")
        [decision] = detector.decide(detector.prepare(Image.open(sys.argv[2]))[None])
        print(json.dumps([decision.score, detector.picture(detector.prepare(Image.open(sys.argv[2]))).width]))
        """
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved), str(tmp_path / "image.png")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(diffguard.deploy.bundle.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    score, width = json.loads(done.stdout)
    assert score == pytest.approx(made.scores["new", ""]["gated"][0], abs=1e-4)
    assert width > 5 * 128


def change_info(folder, **changes):
    values = json.loads((folder / "detector.json").read_text())
    for key, value in changes.items():
        (values if key in values else values["info"])[key] = value
    (folder / "detector.json").write_text(json.dumps(values))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda f: flip(f / "classifier/model.safetensors"), r"classifier/model.safetensors: not as it was written"),
        (lambda f: flip(f / "calibration.parquet"), r"calibration.parquet: not as it was written"),
        (lambda f: flip(f / "fitted/pixels.safetensors"), r"fitted/pixels.safetensors: not as it was written"),
        (lambda f: (f / "denoiser/unet/config.json").unlink(), r"denoiser/unet/config.json: missing in the bundle"),
        (lambda f: (f / "denoiser/unet/model.bin").write_bytes(b"0"), r"denoiser/unet/model.bin: not a file of the"),
        (lambda f: (f / "detector.json").unlink(), r"no detector here \(detector.json is missing\).*dvc repro bundle"),
        (lambda f: (f / "detector.json").write_text("{"), r"detector.json: damaged"),
        (lambda f: change_info(f, format=1), r"a bundle of format 1, written by diffguard .*reads format 2.*anew"),
        (lambda f: change_info(f, method_version=2), r"method version 2 .*make the bundle anew"),
        (lambda f: change_info(f, alpha=0.5), r"detector.json: not as it was written; copy the bundle again, or"),
        (lambda f: change_info(f, combined={}), r"detector.json: not as it was written"),
        (lambda f: change_info(f, files={}), r"detector.json: not as it was written"),
        (lambda f: change_info(f, hash=None), r"detector.json: not as it was written"),
    ],
)
def test_a_bundle_that_is_not_as_it_was_written_is_refused_in_one_line(folder, tmp_path, breaking, message):
    shutil.copytree(folder, tmp_path / "detector")
    breaking(tmp_path / "detector")
    with pytest.raises(DiffGuardError, match=message) as error:
        open_detector(tmp_path / "detector")
    assert "\n" not in str(error.value)


def test_nothing_in_a_bundle_is_pickled_nor_of_this_machine(made, folder):
    names = {each.suffix for each in folder.rglob("*") if each.is_file()}
    assert names == {".json", ".safetensors", ".parquet", ".png"}
    for path in folder.rglob("*.json"):
        assert str(Path.cwd()) not in path.read_text()
        assert str(folder.parent) not in path.read_text()


def test_writing_that_fails_leaves_the_bundle_that_was_there(made, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "detector")
    before = (tmp_path / "detector/detector.json").read_bytes()
    detector = made.detector("guided")
    monkeypatch.setattr(detector, "example", None)
    with pytest.raises(AttributeError):
        save_bundle(detector, tmp_path / "detector")
    assert (tmp_path / "detector/detector.json").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["detector"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_bundle_is_replaced_whole(made, folder, tmp_path, monkeypatch, at_once):
    shutil.copytree(folder, tmp_path / "detector")
    if not at_once:  # a system that cannot exchange two folders
        monkeypatch.setattr(diffguard.utils.atomic.ctypes, "CDLL", lambda *_, **__: object())
    save_bundle(made.detector("knn"), tmp_path / "detector")
    assert load_bundle(tmp_path / "detector", "cpu").info.detector == "knn"
    assert [each.name for each in tmp_path.iterdir()] == ["detector"]


def test_what_is_no_bundle_is_not_replaced(made, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"0")
    with pytest.raises(DataError, match="photos: there is something that is no bundle"):
        save_bundle(made.detector("knn"), tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_bundle_must_be_the_one_that_was_recorded_elsewhere(folder):
    recorded = load_bundle(folder, "cpu").bundle_hash
    assert load_bundle(folder, "cpu", bundle_hash=recorded).bundle_hash == recorded == hash_bundle(folder)
    with pytest.raises(DataError, match=r"detector.json: not the one that was recorded with the model"):
        load_bundle(folder, "cpu", bundle_hash="0" * 64)


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/proc/new/detector", "No such file or directory"), ("{tmp}/file/detector", "Not a directory|File exists")],
)
def test_a_folder_that_cannot_be_written_is_named(made, tmp_path, folder, reason):
    (tmp_path / "file").write_text("")
    folder = folder.format(tmp=tmp_path)
    for write in (check_new, partial(save_bundle, made.detector("knn"))):
        with pytest.raises(DataError, match=rf"{folder}: cannot be written \({reason}\); name another folder"):
            write(folder)


def test_what_a_new_bundle_needs_is_checked_without_a_trace(folder, tmp_path):
    check_new(tmp_path / "deep" / "er" / "detector")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="is there already; name a new folder"):
        check_new(folder)


def test_a_detector_without_diffusion_takes_no_denoiser(made, tmp_path):
    detector = made.detector("knn")
    detector.denoiser = None
    save_bundle(detector, tmp_path / "detector")
    assert not (tmp_path / "detector" / "denoiser").exists()
    loaded = load_bundle(tmp_path / "detector", "cpu")
    assert loaded.denoiser is None
    assert np.allclose([e.score for e in loaded.decide(made.new)], made.scores["new", ""]["knn"], atol=1e-4)
    assert loaded.picture(made.new[0]).height > 128


def test_images_that_it_cannot_take_are_named(made):
    detector = made.detector("guided")
    with pytest.raises(DataError, match=r"images are \(2, 3, 8, 8\), the detector takes \[B, 1, 8, 8\]"):
        detector.decide(torch.zeros(2, 3, 8, 8))
    with pytest.raises(DataError, match="not a number in \\[0, 1\\]"):
        detector.decide(torch.full((1, 1, 8, 8), float("nan")))
    assert detector.decide(torch.zeros(0, 1, 8, 8)) == []


def test_pictures_of_any_kind_are_prepared_as_the_benchmarks(made):
    detector = made.detector("guided")
    image = detector.prepare(to_picture(made.new[0]))
    assert torch.equal(image, made.new[0])
    for mode in ("RGBA", "P", "I;16", "LA"):
        assert detector.prepare(Image.new(mode, (30, 20))).shape == (1, 8, 8)


def test_a_row_that_cannot_be_deployed_is_named(made):
    with pytest.raises(SettingError, match="detector nobody: neither a variant"):
        made.detector("nobody")
    with pytest.raises(SettingError, match="at least 99 calibration images"):
        made.detector("knn", alpha=0.01)


@pytest.mark.parametrize("name", ["guided", "adaptive", "gated", "gated-all"])
def test_the_picture_shows_input_reconstructions_difference_and_cam(made, name):
    detector = made.detector(name)
    for image in made.new[:2]:
        picture = detector.picture(image)
        assert picture.size[0] > 5 * 128
        cell = np.asarray(picture)[22 : 22 + 128, 8 : 8 + 128, 0]
        assert np.array_equal(cell[::16, ::16], (image[0] * 255).round().byte().numpy())
