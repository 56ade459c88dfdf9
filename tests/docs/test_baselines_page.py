"""The page of baselines: its example is a detector, and its tables name all that there are."""

import re

import pytorch_ood.detector
import torch
import yaml
from small_detector import tiny_classifier

from diffguard.detectors.baselines import detect, fit_baseline
from diffguard.settings import Baseline, parse_settings
from tasks.config.project import ROOT

TEXT = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_its_own_detector_scores_by_its_entry(tmp_path, monkeypatch):
    [code] = blocks("python")
    (tmp_path / "my_detectors.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    classifier, images = tiny_classifier(), torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = {}
    for block in blocks("yaml"):
        for name, values in yaml.safe_load(block)["score"]["baselines"].items():
            row = parse_settings(Baseline, values, name)
            detector = fit_baseline(name, row, classifier, [(images, torch.arange(4))], torch.device("cpu"))
            scores[name] = detect(detector, images, classifier(images))
    assert scores.keys() == {"react", "margin"}
    ordered = classifier(images).sort(dim=1).values
    assert torch.allclose(scores["margin"], 2 * (ordered[:, -2] - ordered[:, -1]), atol=1e-5)


def test_it_names_every_row_and_every_detector():
    rows = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["score"]["baselines"]
    detectors = {name for name in pytorch_ood.detector.__all__ if isinstance(getattr(pytorch_ood.detector, name), type)}
    assert {*rows, *detectors} - set(re.findall(r"`([\w-]+)`", TEXT)) == set()
