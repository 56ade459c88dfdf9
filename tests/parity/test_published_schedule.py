"""The schedule that the engine is measured against is the published one, call for call."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from published import FOLDER, images_of, variant_of

from diffguard.engine import Request, score_batch


def _load():
    path = Path(__file__).resolve().parents[2] / "experiments" / "published_schedule.py"
    spec = importlib.util.spec_from_file_location("published_schedule", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnlyInverting:
    """The captured model for whole batches, which only inversion asks for; otherwise quick zeros."""

    def __init__(self, denoiser, batch):
        self._denoiser, self._batch = denoiser, batch

    def __getattr__(self, name):
        return getattr(self._denoiser, name)

    def eps(self, x, timestep, label):
        return self._denoiser.eps(x, timestep, label) if len(x) == self._batch else torch.zeros_like(x)


def counted():
    path = FOLDER / "gdm_meta.json"
    counts = json.loads(path.read_text()).get("counts", {}) if path.is_file() else {}
    return [(run, kind) for run, each in counts.items() for kind in each if kind.startswith("full_call")]


@pytest.mark.parametrize(("run", "kind"), counted())
def test_calls_and_image_forwards_are_as_counted(run, kind, gdm, gdm_meta, gdm_expected, classifier):
    schedule, expected = _load(), gdm_meta["counts"][run]
    config = {**gdm_meta["configs"][run], "uncond_aux": kind == "full_call_uncond_aux"}
    variant = variant_of(config, gdm_meta["overrides_all"], gdm_meta["seed_cutouts"])
    size = config.get("input_size", gdm_meta["overrides_all"]["input_size"])
    images = (images_of(gdm_expected, size) + 1) / 2
    counting = schedule.Counting(OnlyInverting(gdm, len(images)))
    _, level = schedule.published_scores(images, counting, classifier, variant, expected["denoise_batch_size"])
    assert (level - 1).tolist() == expected["rev_t"]
    assert counting.counts.calls == expected[kind]["calls"]
    assert counting.counts.image_forwards == expected[kind]["image_forwards"]


def test_its_scores_are_the_engines(gdm, gdm_meta, gdm_expected, classifier):
    config = {"early_stop_metric": ["psnr"], "early_stop_thresh": [60.0], "cutouts_num": 2}
    variant = variant_of(config, gdm_meta["overrides_all"], gdm_meta["seed_cutouts"])
    images = (gdm_expected["in/x0"][:2] + 1) / 2
    scores, level = _load().published_scores(images, gdm, classifier, variant)
    [ours] = score_batch(images, gdm, [Request(classifier, variant)])
    assert torch.equal(level, ours.level)
    assert torch.allclose(scores, ours.score, rtol=1e-3)
