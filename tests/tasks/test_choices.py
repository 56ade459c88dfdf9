"""params.yaml and a run's choices: what is wrong is named, in one line."""

import shutil

import pytest
import yaml

from diffguard.errors import SettingError
from diffguard.settings import PRESETS
from tasks.run import open_run
from tasks.settings import ROOT, load_benchmark, load_params


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
        (["score", "variants", "msp"], {"stop": 4, "guidance": {"kind": "none"}, "distance": "l1"}, "msp names"),
        (["train"], {}, "train"),
        (["evaluate", "default"], "cfg-w9", "evaluate.default: 'cfg-w9'"),
        (["calibrate", "accept"], 1.5, "calibrate.accept"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(tmp_path, keys, value, message):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    place = params
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
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
    monkeypatch.setattr("tasks.run.load_params", lambda: params.model_copy(update={"score": score}))
    with pytest.raises(SettingError, match="cfg-vif: vif takes images from 41 pixels up; those of digits have 8"):
        open_run()


def test_a_preset_is_a_variant_of_its_name(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["score"]["variants"] |= {"gdm": "gdm-imagenet", "ldm-w5": {"preset": "ldm-imagenet", "levels": 50}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    variants = load_params(tmp_path / "params.yaml").score.variants
    assert variants["gdm"] == PRESETS["gdm-imagenet"]
    assert variants["ldm-w5"] == PRESETS["ldm-imagenet"].model_copy(update={"levels": 50})


def test_params_yaml_survives_dvcs_own_writing(tmp_path):
    """What `dvc exp run -S` does to it."""
    from dvc.utils.hydra import apply_overrides
    from dvc.utils.serialize import load_yaml

    shutil.copy(ROOT / "params.yaml", tmp_path)
    apply_overrides(tmp_path / "params.yaml", ["score.variants.cfg-w2.guidance.scale=3"])
    load_yaml(tmp_path / "params.yaml")  # by a parser of its own
    before, after = load_params(), load_params(tmp_path / "params.yaml")
    assert after.score.variants["cfg-w2"].guidance.scale == 3
    assert after.score.variants["cfg-early-stop"] == before.score.variants["cfg-early-stop"]


def test_only_params_yamls_own_values_write_dvcs_outputs():
    own = open_run()
    every = [*own.params.score.variants, *own.params.score.baselines]
    assert own.own
    assert own.results == ROOT / "data" / "digits"
    assert open_run(variants=every, seeds=[0]).own
    for choices in ({"limit": 5}, {"variants": ["cfg-w1"]}, {"classifier": "strong"}, {"seeds": [1]}):
        run = open_run(**choices)
        assert not run.own
        assert run.results.parent == ROOT / "data" / "digits" / "other" / "runs"


def test_models_of_other_seeds_go_beside_dvcs(monkeypatch, tmp_path):
    """A clone has no manifest yet, so the test makes its own."""
    monkeypatch.setattr("tasks.run.ROOT", tmp_path)
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
