"""A score that is no number is no decision, wherever it comes from and whoever asks."""

import base64
import io
import json

import mlflow.exceptions
import pandas as pd
import pytest
import torch
from small_detector import VARIANTS, Made

import diffguard.mlflow
from diffguard.cli.main import main
from diffguard.deploy.bundle import save_bundle
from diffguard.deploy.recalibration import CalibrationScores
from diffguard.detectors.diffguard import DiffGuard, verdicts
from diffguard.detectors.fitting import fit_variant
from diffguard.errors import DataError, NotFiniteError, SettingError
from diffguard.images import to_picture
from diffguard.models.classifiers.small import ConvClassifier
from diffguard.models.denoisers.pixel import PixelDenoiser
from diffguard.settings import NoGuidance, Variant


class Failing:
    """A denoiser whose network fails on dark images, as one in too low a precision does on some."""

    def __init__(self, denoiser):
        self._denoiser = denoiser

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def eps(self, x, timestep, label):
        noise = self._denoiser.eps(x, timestep, label)
        dark = x.mean(dim=(1, 2, 3), keepdim=True) < -0.9
        return torch.where(dark | x.isnan().any(dim=3, keepdim=True).any(dim=2, keepdim=True), torch.nan, noise)


@pytest.fixture(scope="module")
def made(classifier, denoiser):
    return Made(classifier, denoiser)


@pytest.fixture
def failing(made):
    """A detector that fails on dark images, and three images of which the second is dark."""
    detector = made.detector("guided")
    detector._scorer.denoiser = detector.denoiser = Failing(made.denoiser)
    return detector, torch.cat([made.new[:1], torch.zeros(1, 1, 8, 8), made.new[1:2]])


def test_the_librarys_detector(classifier, denoiser):
    detector = DiffGuard(classifier, Failing(denoiser), VARIANTS["guided"])
    images = torch.cat([torch.full((2, 1, 8, 8), 0.5), torch.zeros(1, 1, 8, 8)])
    for ask in (detector.predict, detector.examine, lambda x: verdicts(detector, x)):
        with pytest.raises(NotFiniteError, match="distance l1: the score of image 2 is nan, which is no decision") as e:
            ask(images)
        assert e.value.rows == (2,)
    assert detector.predict(images[:2]).isfinite().all()
    with pytest.raises(NotFiniteError, match="score of image 1 is nan"):
        detector.predict(torch.stack([images[0], torch.full((1, 8, 8), torch.nan)]))
    with pytest.raises(NotFiniteError):
        detector.fit([(images.repeat(10, 1, 1, 1), None)])


def test_a_threshold_is_of_numbers(classifier, denoiser):
    images = torch.stack([torch.full((1, 8, 8), 0.5), torch.zeros(1, 8, 8)])
    with pytest.raises(NotFiniteError, match=r"stop\.thresholds\.psnr: the score of image 1 is nan"):
        fit_variant(VARIANTS["adaptive"], Failing(denoiser), classifier, [images])


@pytest.mark.parametrize("components", [1, 2])
def test_a_path_is_fitted_to_numbers(components, classifier, denoiser):
    variant = Variant(stop=3, guidance=NoGuidance(), distance="path", path_components=components)
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[7] = 0
    with pytest.raises(NotFiniteError, match="distance path: the score of image 7 is nan"):
        fit_variant(variant, Failing(denoiser), classifier, [], [images])


def test_a_deployed_detector_decides_on_the_others(failing, made):
    detector, images = failing
    with pytest.raises(NotFiniteError, match="detector guided: the score of image 1 is nan"):
        detector.decide(images)
    first, second, third = detector.decide_each(images)
    assert isinstance(second, NotFiniteError)
    assert [first.score, third.score] == pytest.approx(made.scores["new", ""]["guided"][:2], abs=1e-4)
    gathered = CalibrationScores(detector)
    for name, image in zip("abc", images, strict=True):
        gathered.add(name, image)
    with pytest.raises(DataError, match=r"^b: detector guided: the score of image 1 is nan"):
        gathered.table()


def test_a_classifier_that_fails(made, monkeypatch):
    detector = made.detector("knn")
    monkeypatch.setattr(type(detector.classifier), "forward", lambda self, x: self.head(self.features(x)) / 0 * 0)
    with pytest.raises(NotFiniteError, match="classifier: the score of image 0 is nan, and of 1 more"):
        detector.decide(made.new[:2])


def test_the_command_line_writes_the_others_and_ends_with_1(made, tmp_path, monkeypatch, capsys):
    save_bundle(made.detector("guided"), tmp_path / "bundle")
    failed = PixelDenoiser.eps
    monkeypatch.setattr(PixelDenoiser, "eps", lambda self, *x: Failing.eps(Plainly(self, failed), *x))
    for name, image in {"a": made.new[0], "b": torch.zeros(1, 8, 8), "c": made.new[1]}.items():
        to_picture(image).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in "abc"]
    with pytest.raises(SystemExit) as stopped:
        main(["score", *files, "--detector", str(tmp_path / "bundle"), "--output", str(tmp_path / "o.json"), "--json"])
    assert stopped.value.code == 1
    found = json.loads((tmp_path / "o.json").read_text())
    assert [each["error"] is None for each in found] == [True, False, True]
    assert found[1]["error"].startswith(f"{files[1]}: detector guided: the score of image")
    assert "nan" not in json.dumps([found[0], found[2]]).lower()
    capsys.readouterr()
    for command in (
        ["explain", files[1], "--output", str(tmp_path / "why.png")],
        ["calibrate", *files, "--output", str(tmp_path / "new")],
    ):
        with pytest.raises(SystemExit, match=r"the score of .* is nan, which is no decision"):
            main([*command, "--detector", str(tmp_path / "bundle")])
    assert not (tmp_path / "new").exists()
    # As a function of MLflow's it is no fault of the request.
    diffguard.mlflow.save_model(tmp_path / "bundle", tmp_path / "model")
    model = diffguard.mlflow._load_pyfunc(str(tmp_path / "model" / "detector"))
    stream = io.BytesIO()
    to_picture(torch.zeros(1, 8, 8)).save(stream, "PNG")
    with pytest.raises(mlflow.exceptions.MlflowException, match="is nan, which is no decision") as error:
        model.predict(pd.DataFrame({"image": [base64.b64encode(stream.getvalue()).decode()]}))
    assert error.value.error_code == "INTERNAL_ERROR"


class Plainly:
    """A denoiser by its own arithmetic, whatever was put in its place."""

    def __init__(self, denoiser, eps):
        self._denoiser = self
        self._one, self._eps = denoiser, eps

    def eps(self, *arguments):
        return self._eps(self._one, *arguments)


def test_a_classifier_of_no_numbers_has_no_label(denoiser):
    """Of logits that are NaN argmax makes label 0, and a score of that would be finite."""

    class Broken(ConvClassifier):
        def forward(self, images):
            logits = super().forward(images)
            return torch.where(images.mean(dim=(1, 2, 3))[:, None] < 0.1, torch.nan, logits)

    detector = DiffGuard(Broken(6, width=4).eval().requires_grad_(False), denoiser, VARIANTS["guided"])
    with pytest.raises(NotFiniteError, match="the score of image 1 is nan") as error:
        verdicts(detector, torch.stack([torch.full((1, 8, 8), 0.5), torch.zeros(1, 8, 8)]))
    assert error.value.rows == (1,)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
def test_a_threshold_that_is_no_number_decides_nothing(threshold, classifier, denoiser):
    detector = DiffGuard(classifier, denoiser, VARIANTS["guided"])
    detector.threshold = threshold
    with pytest.raises(SettingError, match=f"threshold: {threshold} is not a finite number"):
        verdicts(detector, torch.zeros(1, 1, 8, 8))
