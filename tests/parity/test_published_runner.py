"""Distances, scores and metrics, against the published runner's (METHOD, section 3)."""

import json
import math
import re

import pytest
import torch
from published import AMPLIFYING, STAND_IN, configs, images_of, latent_variant_of, variant_of

from diffguard.distances.functions import get_distance
from diffguard.engine import Request, score_batch
from diffguard.metrics import published_metrics

RUNS = configs("runner_meta.json")
SIMILARITIES = {"dists", "fsim", "ssim", "vif"}
"""Published as 1 - distance; the others as -distance."""


def outlier(name, published):
    """Our sign of a published score."""
    if name.endswith("NOT_OFFICIAL"):  # captured as a distance
        return published
    return 1 - published if name in SIMILARITIES else -published


def distance_of(name):
    return {"dists": STAND_IN, "l1_mean_NOT_OFFICIAL": "l1"}.get(name, name)


def test_distances(runner_expected, gdm_expected, classifier):
    pairs = {key.split("/")[1] for key in runner_expected if key.startswith("distance/")}
    if not pairs:
        pytest.skip("this folder holds no distances")
    wrong = {
        key: _wrong_distances(gdm_expected[key], gdm_expected["in/x0"], pairs, runner_expected, classifier)
        for key in gdm_expected
        if re.fullmatch("run/.*/recon_uncond_aux", key)
        and gdm_expected[key].shape[-1] == gdm_expected["in/x0"].shape[-1]
    }
    # They are of one of the captured runs, which the folder does not name.
    assert min(wrong.values(), key=len) == []


def _wrong_distances(run, images, pairs, runner_expected, classifier):
    """The stored distances that are not those of a run's reconstructions."""
    shown, wrong = {"cond": run[:, 0], "uncond": run[:, 1], "image": images}, []
    for pair in pairs:
        one, other = (((shown[side] + 1) / 2).clamp(0, 1) for side in pair.split("_vs_"))
        for key, published in runner_expected.items():
            if key.startswith(f"distance/{pair}/"):
                name = key.rsplit("/", 1)[1]
                found = get_distance(distance_of(name))(one, other, classifier)
                if not torch.allclose(found, outlier(name, published), rtol=1e-4, atol=1e-6):
                    wrong.append(key)
    return wrong


def sets_of(name, runner_expected):
    return sorted({key.split("/")[1] for key in runner_expected if key.startswith(f"{name}/")})


@pytest.mark.parametrize("name", RUNS)
def test_scores_and_metrics_of_a_run(name, gdm, ldm, gdm_meta, ldm_meta, runner_meta, runner_expected, classifier):
    """Scores of long guided chains, which amplify rounding, are not compared; the metrics of them are."""
    config = {key: value for key, value in RUNS[name].items() if key != "model"}
    denoiser = ldm if RUNS[name].get("model") == "ldm" else gdm

    def variant(distance):
        if denoiser is ldm:
            return latent_variant_of(config, ldm_meta["config"], ldm.alphas_cumprod, distance_of(distance))
        return variant_of(config, gdm_meta["overrides_all"], gdm_meta["seed_cutouts"], distance_of(distance))

    scores = {}
    for dataset in sets_of(name, runner_expected):
        published = {
            key.rsplit("/", 1)[1]: value
            for key, value in runner_expected.items()
            if key.startswith(f"{name}/{dataset}/score/")
        }
        stored = f"in/{dataset}_u8"
        size = RUNS[name].get("input_size", runner_expected[stored].shape[-1])
        images = images_of(runner_expected, size, stored).float() / 255
        variants = {each: variant(each) for each in published}
        found = score_batch(images, denoiser, [Request(classifier, each) for each in variants.values()])
        assert torch.equal(found[0].label.float(), runner_expected[f"{name}/{dataset}/pred"])
        for each, scored in zip(variants, found, strict=True):
            expected = outlier(each, published[each])
            late = (scored.level - 1 >= AMPLIFYING) & (denoiser is gdm)
            score = torch.where(late, expected.to(scored.score.dtype), scored.score)
            scores[dataset, each] = score
            assert torch.allclose(score, expected, rtol=1e-4, atol=1e-5), (
                dataset,
                each,
                (score - expected).abs().max(),
            )
    for dataset, per_distance in runner_meta[name]["per_distance"].items():
        for each, expected in per_distance.items():
            made = published_metrics(scores["ind", each], scores[dataset, each])
            for metric, value in expected.items():
                assert math.isclose(made[metric], value, abs_tol=1e-12), (dataset, each, metric)


def test_metrics(runner_expected, runner_meta):
    """Continuous scores, and scores with ties; published signs in, higher = InD."""
    for case, expected in runner_meta["metrics"].items():
        ind, ood = (runner_expected[f"metrics/{case}/{side}"].numpy() for side in ("ind", "ood"))
        made = published_metrics(-ind, -ood)
        for metric, value in expected.items():
            assert math.isclose(made[metric.removesuffix("_exact")], value, abs_tol=1e-12), (case, metric)


def test_the_table_is_of_the_best_distance(runner_meta):
    """Why we never report it: by test labels, the published table takes each metric's best distance."""
    for name in RUNS:
        for row in runner_meta[name]["csv"]:
            per_distance = runner_meta[name]["per_distance"].get(row["dataset"])
            if per_distance:
                best = max(each["AUROC"] for each in per_distance.values())
                assert f"{100 * best:.2f}" == row["AUROC"], json.dumps(row)
