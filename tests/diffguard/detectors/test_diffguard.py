import subprocess
import sys

import pytest
import torch
from PIL import Image
from pytorch_ood.api import Detector, RequiresFittingException
from pytorch_ood.metrics import OODMetrics

from diffguard.cli.main import main
from diffguard.detectors.diffguard import DiffGuard, verdicts
from diffguard.models.classifiers.files import save_classifier
from diffguard.models.denoisers.loading import save_denoiser
from diffguard.settings import AdaptiveStop, LabelGuidance, Variant


def test_it_works_where_pytorch_ood_takes_a_detector(classifier, denoiser, images):
    detector = DiffGuard(classifier, denoiser)
    assert isinstance(detector, Detector)
    metrics = OODMetrics()
    metrics.update(detector(images), torch.tensor([0, 1, 2, 3, 4, 5, -1, -1, -1, -1, -1, -1]))
    assert set(metrics.compute()) >= {"AUROC", "FPR95TPR"}


def test_fit_sets_both_thresholds_and_verdicts_follow(classifier, denoiser, images):
    variant = Variant(
        stop=AdaptiveStop(min_level=2, max_level=7, thresholds={"psnr": None}, median_at=4),
        guidance=LabelGuidance(scale=1),
        distance="l1",
    )
    detector = DiffGuard(classifier, denoiser, variant)
    with pytest.raises(RequiresFittingException):
        detector.predict(images)
    detector.fit([(images[:6], None), (images[6:], None)], accept=0.5)
    scores = detector.predict(images)
    assert detector.threshold == pytest.approx(float(scores.sort().values[6]), abs=1e-6)
    found = verdicts(detector, images)
    assert [each.is_ood for each in found] == (scores > detector.threshold).tolist()
    assert [each.label for each in found] == classifier(images).argmax(1).tolist()


@pytest.fixture
def files(tmp_path, classifier, denoiser, images):
    save_classifier(classifier, tmp_path / "c.safetensors")
    save_denoiser(denoiser, tmp_path / "d")
    Image.fromarray((images[0, 0] * 255).byte().numpy()).save(tmp_path / "one.png")
    return tmp_path, ["--classifier", str(tmp_path / "c.safetensors"), "--denoiser", str(tmp_path / "d")]


def test_command_prints_label_score_and_decision(files, capsys, classifier, denoiser, images):
    folder, models = files
    with pytest.raises(SystemExit) as exit_code:
        main(["score", str(folder / "one.png"), *models, "--threshold", "0"])
    assert exit_code.value.code == 3
    [line] = capsys.readouterr().out.splitlines()
    stored = (images[:1] * 255).byte().float() / 255
    expected = DiffGuard(classifier, denoiser).examine(stored)
    assert line == f"{folder / 'one.png'}\tlabel {int(expected.label)}\tscore {float(expected.score):.5g}\tOOD"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["one.png", "--variant", '{"levles": 10}'], "--variant: levles"),
        (["one.png", "--variant", "gdm"], "--variant: neither a preset (gdm-imagenet, ldm-imagenet, fast) nor JSON"),
        (["one.png", "--variant", '{"distance": "ssim"}'], "ssim takes images from 11x11 pixels up; these are 8x8"),
        (["one.png", "--variant", '{"stop": "four"}'], "--variant: stop"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(files, arguments, message, monkeypatch):
    folder, models = files
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(["score", *arguments, *models])
    assert end.value.code.startswith("error: ")
    assert message in end.value.code
    assert "\n" not in end.value.code


def test_a_bad_file_is_its_own_error_and_the_others_are_scored(files, monkeypatch, capsys):
    folder, models = files
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:40])
    Image.new("L", (9, 8)).save(folder / "large.png")
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        main(["score", "broken.png", "one.png", "large.png", *models])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert [line.partition("\t")[0] for line in printed.out.splitlines()] == ["one.png"]
    first, second = printed.err.splitlines()
    assert first.startswith("error: broken.png: the image cannot be read")
    assert second == "error: large.png: 9x8 pixels; the denoiser takes 8x8; give --resize and --crop"


def test_command_ends_without_a_traceback(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    command = [
        sys.executable,
        "-m",
        "diffguard.cli.main",
        "score",
        f"{tmp_path}/a.png",
        "--classifier",
        "c",
        "--denoiser",
        "d",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.strip() == "error: c: no classifier here; train one (dvc repro train-classifier), or name its file"
    )
