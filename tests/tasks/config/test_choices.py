"""params.yaml and a run's choices: what is wrong is named, in one line."""

import shutil

import pytest
import yaml

from diffguard.errors import SettingError
from diffguard.settings import PRESETS, Combination, parse_settings
from tasks.config.benchmark import load_benchmark
from tasks.config.params import Params, load_params
from tasks.config.project import ROOT
from tasks.config.run import open_run


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["score", "variants", "cfg-w1", "stop"], "four", "score.variants.cfg-w1.stop"),
        (["score", "variants", "cfg-w1", "stpo"], 4, "score.variants.cfg-w1.stpo"),
        (["score", "variants", "cfg-w1", "stop"], 11, "level 11 is not within 1..10"),
        (["score", "variants", "cfg-w1", "distance"], "l7", "score.variants.cfg-w1.distance"),
        (
            ["score", "variants", "cfg-w1"],
            "gdm-imagenot",
            "'gdm-imagenot' is not one of gdm-imagenet, ldm",
        ),
        (["score", "variants", "cfg-w1"], {"preset": "ldm-imagenet", "stop": 26}, "level 26 is not within 1..25"),
        (["score", "variants", "path", "guidance"], {"kind": "label"}, "score.variants.path: Value error, guidance: "),
        (["score", "variants", "cfg-w1", "guidance"], {"kind": "telepathy"}, "score.variants.cfg-w1.guidance"),
        (["score", "variants", "unconditional", "against"], "gain", "against: gain compares guidance with none"),
        (["score", "variants", "cfg-w1-gain", "guidance", "scale"], 0, "against: gain compares guidance with none"),
        (["score", "variants", "path", "against"], "gain", "against: distance path makes no reconstruction"),
        (["score", "variants", "cfg-w1", "path_components"], 2, "path_components: it belongs to distance path alone"),
        (["score", "variants", "msp"], {"stop": 4, "guidance": {"kind": "none"}, "distance": "l1"}, "msp names"),
        (["train"], {}, "train"),
        (["evaluate", "default"], "cfg-w9", "evaluate.default: 'cfg-w9'"),
        (["calibrate", "accept"], 1.5, "calibrate.accept"),
        (["combine", "fused-cfg-w1", "of"], ["cfg-w1", "knm"], "combine.fused-cfg-w1.of: 'knm' is not one of cfg-w1"),
        (["combine", "fused-cfg-w1", "of"], ["cfg-w1", "fisher-cfg-w1"], "combine.fused-cfg-w1.of: 'fisher-cfg-w1'"),
        (["combine", "msp"], {"kind": "fisher", "of": ["knn", "energy"]}, "combine.msp: a variant, baseline or imp"),
        (["combine", "x"], {"kind": "cascade", "of": ["knn", "energy"]}, "combine.x: Value error, loss is needed"),
        (["combine", "x"], {"kind": "z-sum", "of": ["knn"]}, "combine.x.of"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(tmp_path, keys, value, message):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    place = params
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.raises(SettingError) as error:
        load_params(tmp_path / "params.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("params.yaml: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"variants": ["cfg-w1", "cfg-w9"]}, "variants: 'cfg-w9' is not one of cfg-w1"),
        ({"variants": []}, "variants: the list is empty"),
        ({"classifier": "weak"}, "classifier: 'weak' is not one of ordinary, strong"),
        ({"benchmark": "didgits"}, "benchmark: 'didgits'"),
        ({"limit": 0}, "limit: 0"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
    ],
)
def test_a_wrong_choice_is_named(choices, message):
    with pytest.raises(SettingError, match=message):
        open_run(**choices)


def test_a_distance_that_needs_larger_images_is_refused(monkeypatch):
    params = load_params()
    vif = params.score.variants["cfg-w1"].model_copy(update={"distance": "vif"})
    score = params.score.model_copy(update={"variants": {**params.score.variants, "cfg-vif": vif}})
    monkeypatch.setattr("tasks.config.run.load_params", lambda: params.model_copy(update={"score": score}))
    with pytest.raises(SettingError, match="cfg-vif: vif takes images from 41 pixels up; those of digits have 8"):
        open_run()


def test_a_preset_is_a_variant_of_its_name(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["score"]["variants"] |= {"gdm": "gdm-imagenet", "ldm-w5": {"preset": "ldm-imagenet", "levels": 50}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    variants = load_params(tmp_path / "params.yaml").score.variants
    assert variants["gdm"] == PRESETS["gdm-imagenet"]
    assert variants["ldm-w5"] == PRESETS["ldm-imagenet"].model_copy(update={"levels": 50})


def test_params_yaml_survives_dvcs_own_writing(tmp_path):
    """What `dvc exp run -S` does to it."""
    from dvc.utils.hydra import apply_overrides
    from dvc.utils.serialize import load_yaml

    shutil.copy(ROOT / "params.yaml", tmp_path)
    changes = ["score.variants.cfg-w2.guidance.scale=3", "combine.pixel-knn-then-cfg-w1.loss=0.01"]
    apply_overrides(tmp_path / "params.yaml", changes)
    load_yaml(tmp_path / "params.yaml")  # by a parser of its own
    before, after = load_params(), load_params(tmp_path / "params.yaml")
    assert after.score.variants["cfg-w2"].guidance.scale == 3
    assert after.score.variants["cfg-early-stop"] == before.score.variants["cfg-early-stop"]
    assert after.combine["pixel-knn-then-cfg-w1"].loss == 0.01
    assert after.combine["fused-cfg-w1"] == before.combine["fused-cfg-w1"]
    assert list(after.combine) == list(before.combine)


def test_only_params_yamls_own_values_write_dvcs_outputs():
    own = open_run()
    every = own.params.names
    assert own.own
    assert own.results == ROOT / "data" / "digits"
    assert open_run(variants=every, seeds=[0]).own
    without_combinations = {"variants": own.params.score.names}
    for choices in (
        {"limit": 5},
        {"variants": ["cfg-w1"]},
        without_combinations,
        {"classifier": "strong"},
        {"seeds": [1]},
    ):
        run = open_run(**choices)
        assert not run.own
        assert run.results.parent == ROOT / "data" / "digits" / "other" / "runs"


def test_a_combination_brings_along_what_it_is_made_of():
    params = open_run(variants=["pixel-knn-then-cfg-w1", "energy"]).params
    assert params.names == ["cfg-w1", "energy", "pixel-knn", "pixel-knn-then-cfg-w1"]
    assert open_run(variants=["cfg-w1", "knn"]).params.combine == {}


def in_digits(monkeypatch, change):
    """A benchmark of another name that is digits but for a change."""
    changed = change(load_benchmark("digits").model_copy(update={"name": "other"}))
    monkeypatch.setattr("tasks.config.run.load_benchmark", lambda name: changed)


def without_split(benchmark, split):
    """The benchmark without the InD images of a split."""
    [(name, dataset)] = benchmark.ind.items()
    parts = [
        part.model_copy(update={"splits": {key: count for key, count in part.splits.items() if key != split}})
        for part in dataset.parts
    ]
    return benchmark.model_copy(update={"ind": {name: dataset.model_copy(update={"parts": tuple(parts)})}})


def test_a_benchmark_that_lacks_a_member_drops_the_combination_too(monkeypatch):
    in_digits(monkeypatch, lambda digits: without_split(digits, "train"))
    params = open_run(benchmark="other").params
    assert list(params.score.baselines) == ["msp", "maxlogit", "energy", "gen", "ash", "scale", "complexity"]
    assert list(params.combine) == ["residual-unconditional"]
    in_digits(monkeypatch, lambda digits: without_split(digits, "validation"))
    params = open_run(benchmark="other").params
    assert "fused-cfg-w1" in params.combine
    assert "pixel-knn-then-cfg-w1" not in params.combine
    assert "fused-best" not in params.combine
    assert "pixel-knn" in params.score.baselines
    with pytest.raises(
        SettingError, match=r"combine\.pixel-knn-then-cfg-w1: a cascade is chosen on a split validation of InD"
    ):
        open_run(benchmark="other", variants=["pixel-knn-then-cfg-w1"])


def test_a_benchmark_file_may_name_combinations(monkeypatch):
    named = {"detectors": ["fisher-cfg-w1", "msp"], "default": "fisher-cfg-w1"}
    in_digits(monkeypatch, lambda digits: digits.model_copy(update=named))
    run = open_run(benchmark="other")
    assert run.params.names == ["cfg-w1", "msp", "maxlogit", "knn", "fisher-cfg-w1"]
    assert run.default == "fisher-cfg-w1"
    in_digits(monkeypatch, lambda digits: digits.model_copy(update={**named, "default": "energy"}))
    with pytest.raises(SettingError, match=r"other.yaml: default: 'energy' is not one of cfg-w1, msp, maxlogit, knn"):
        open_run(benchmark="other")
    variant = load_params().score.variants["cfg-w1"]
    in_digits(monkeypatch, lambda digits: digits.model_copy(update={"variants": {"fused-cfg-w1": variant}}))
    with pytest.raises(SettingError, match="variants: fused-cfg-w1 is the name of another kind of row"):
        open_run(benchmark="other")


def test_a_benchmark_file_may_have_combinations_of_its_own(monkeypatch):
    own = {
        "mine": Combination(kind="z-sum", of=("cfg-w1", "msp")),
        "both": Combination(kind="fisher", of=("mine", "knn")),
    }

    def changed(**changes):
        in_digits(monkeypatch, lambda digits: digits.model_copy(update={"combine": own, **changes}))
        return open_run(benchmark="other").params

    assert list(changed().combine) == [*load_params().combine, "mine", "both"]
    assert changed(detectors=["both"]).names == ["cfg-w1", "msp", "knn", "mine", "both"]
    with pytest.raises(SettingError, match=r"other.yaml: combine.both.of: 'mine' is not one of cfg-w1, "):
        changed(combine={"both": own["both"]})
    with pytest.raises(SettingError, match=r"other.yaml: combine: fused-cfg-w1 is the name of another row; choose"):
        changed(combine={"fused-cfg-w1": own["mine"]})


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "data" / "benchmarks").glob("*.yaml")))
def test_every_benchmark_has_a_combination_of_its_default_with_another_kind_of_detector(name):
    run = open_run(benchmark=name, root="/somewhere" if name != "digits" else None)
    assert any(
        each.kind == "z-sum" and run.default in each.of and "maxlogit" in each.of
        for each in run.params.combine.values()
    )


def test_a_combination_may_be_the_default():
    params = load_params()
    evaluate = params.evaluate.model_copy(update={"default": "fused-cfg-w1"})
    assert parse_settings(Params, {**params.model_dump(), "evaluate": evaluate}, "params.yaml").evaluate == evaluate


def test_models_of_other_seeds_go_beside_dvcs(monkeypatch, tmp_path):
    """A clone has no manifest yet, so the test makes its own."""
    shutil.copytree(ROOT / "data" / "benchmarks", tmp_path / "data" / "benchmarks")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr("tasks.config.project.ROOT", tmp_path)
    (tmp_path / "data" / "digits").mkdir(parents=True)
    (tmp_path / "data" / "digits" / "manifest.parquet").write_bytes(b"made by prepare")
    run = open_run(seeds=[0, 1])
    assert run.model(0, "strong") == tmp_path / "data" / "digits" / "models" / "seed-0" / "strong"
    assert run.model(1, "strong").is_relative_to(tmp_path / "data" / "digits" / "other")
    assert len({run.model(seed, name) for seed in (0, 1) for name in ("strong", "ordinary", "denoiser")}) == 6


def test_the_benchmark_file_is_the_documented_one():
    digits = load_benchmark("digits")
    assert digits.ind["digits-0-5"].splits == {"train": 560, "calibration": 160, "validation": 63, "test": 300}
    assert {**digits.near, **digits.far}.keys() == {"digits-6-8", "digit-9", "letters", "patches", "noise", "symbols"}
