"""What is added to the method is one class or function, and one line that registers it."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffguard.detectors.combination import Combined, fit_combination
from diffguard.detectors.fusion import Fusion
from diffguard.distances.functions import check_distances, get_distance
from diffguard.errors import SettingError
from diffguard.models.denoisers.base import DiffusersDenoiser
from diffguard.models.denoisers.loading import FAMILIES, load_denoiser, save_denoiser
from diffguard.models.denoisers.pixel import PixelDenoiser, open_unet
from diffguard.settings import (
    COMBINATION_KINDS,
    DISTANCES,
    Combination,
    CombinationKind,
    DistanceKind,
    NoGuidance,
    Variant,
)


class Minimum(Fusion):
    """The smallest p-value's opposite: an image is as usual as its most usual score."""

    def fuse(self, log_p):
        return -log_p.max(axis=0)


def test_a_kind_of_combination(monkeypatch):
    with pytest.raises(ValidationError, match="'minimum' is not one of z-sum, fisher, maximum, residual, cascade"):
        Combination(kind="minimum", of=("a", "b"))
    monkeypatch.setitem(COMBINATION_KINDS, "minimum", CombinationKind(f"{__name__}:Minimum"))
    settings = Combination(kind="minimum", of=("a", "b"))
    calibration = {"a": np.arange(99.0), "b": np.arange(99.0)}
    combined = fit_combination(settings, calibration)
    low, high = combined.score({"a": np.array([10.0, 95.0]), "b": np.array([98.0, 96.0])})
    assert low < high
    restored = Combined.from_json(json.loads(json.dumps(combined.to_json())), calibration)
    assert restored.score_calibration() == pytest.approx(combined.score_calibration())


class Inverted(PixelDenoiser):
    """A family of its own kind of folder: pixels, black for white."""

    @classmethod
    def matches(cls, folder, options):
        return (folder / "inverted.txt").is_file()

    @classmethod
    def load(cls, folder, scheduler, options):
        return cls(open_unet(folder), scheduler)

    def encode(self, images):
        return 1 - 2 * images

    def save(self, folder):
        super().save(folder)
        (folder / "inverted.txt").write_text("black for white")


def test_a_family_of_denoisers(monkeypatch, denoiser, images, tmp_path):
    save_denoiser(Inverted(denoiser.unet, denoiser.scheduler), tmp_path / "inverted")
    save_denoiser(denoiser, tmp_path / "plain")
    monkeypatch.setattr("diffguard.models.denoisers.loading.FAMILIES", [Inverted, *FAMILIES])
    inverted, plain = load_denoiser(tmp_path / "inverted"), load_denoiser(tmp_path / "plain")
    assert (type(inverted), type(plain)) == (Inverted, PixelDenoiser)
    assert torch.equal(inverted.encode(images), -plain.encode(images))


def test_families_say_which_networks_they_have():
    assert all(issubclass(family, DiffusersDenoiser) and family.parts for family in FAMILIES)


def largest(images, others, classifier):
    """The largest difference of a pixel."""
    return (images - others).abs().flatten(1).amax(dim=1)


def test_a_distance(monkeypatch, images):
    settings = {"stop": 4, "guidance": NoGuidance(), "distance": "largest"}
    with pytest.raises(ValidationError, match="'largest' is not one of l1, l2"):
        Variant(**settings)
    monkeypatch.setitem(DISTANCES, "largest", DistanceKind(f"{__name__}:largest", min_size=8))
    assert Variant(**settings).distances == ["largest"]
    assert torch.allclose(get_distance("largest")(images, images + 0.5, None), torch.tensor(0.5))
    with pytest.raises(SettingError, match="largest takes images from 8x8 pixels up; these are 7x7"):
        check_distances(["largest"], 7)
