"""What a study's file may say: points and their names, and what is wrong in one line that names file and field."""

import pytest
import yaml
from own_project import own_benchmark, write_own

from diffguard.errors import SettingError
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.config.study import combinations, expand, load_study
from tasks.studies.points import plan_study

STUDY = {
    "title": "Scales",
    "question": "Which scale is best?",
    "claim": {"says": "2 beats 1", "source": "here", "measure": "near auroc", "of": "label scale=2", "above": "msp"},
    "benchmarks": ["mine"],
    "rows": ["msp"],
    "variants": {
        "label": {
            "base": {"stop": 2, "guidance": {"kind": "label"}, "distance": "l1"},
            "grid": {"guidance.scale": [1, 2]},
        }
    },
    "measure": ["near auroc", "evaluations"],
    "figure": {"x": "scale", "y": ["near auroc"]},
}


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Writes data/studies/mine.yaml, changed, in a project whose benchmark is `mine`."""
    write_own(monkeypatch, tmp_path, own_benchmark())

    def write_study(**changes):
        folder = tmp_path / "data" / "studies"
        folder.mkdir(exist_ok=True)
        (folder / "mine.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))

    return write_study


def variants(grid, **base):
    line = {"base": {"stop": 2, "guidance": {"kind": "label"}, "distance": "l1"} | base, "grid": grid}
    return {"variants": {"label": line}}


def test_a_grid_is_every_combination_of_values_and_named_choices(write):
    grid = {"stop": {"early": {"stop.max_level": 3, "stop.thresholds": {"psnr": 40}}, "at 2": {"stop": 2}}}
    write(**variants(grid | {"guidance.scale": [1, 2.5]}, stop={}), claim=STUDY["claim"] | {"of": "label"})
    points = expand(load_study("mine"), "mine")
    assert [point.name for point, _ in points] == [
        "label early scale=1",
        "label early scale=2.5",
        "label at 2 scale=1",
        "label at 2 scale=2.5",
    ]
    early, fixed = points[1][1], points[2][1]
    assert (early.stop.thresholds, early.guidance.scale, points[1][0].axes["stop"]) == ({"psnr": 40}, 2.5, "early")
    assert (fixed.stop, fixed.guidance.scale) == (2, 1)
    assert len(combinations({"a": [1, 2], "b": [1, 2, 3], "c": {"x": {}}})) == 6


def test_a_studys_rows_stand_in_place_of_params_yamls(write):
    write(limit=5)
    planned = plan_study("mine", root=str(ROOT))
    assert [point.name for point in planned.points] == ["msp", "label scale=1", "label scale=2"]
    run = planned.open(None)
    assert (run.params.names, run.limit, run.own, run.whole) == (
        ["label scale=1", "label scale=2", "msp"],
        5,
        False,
        False,
    )
    assert run.params.score.variants["label scale=2"].guidance.scale == 2
    # An edited study is seen by a process that has opened it before.
    write(limit=4)
    assert planned.open(None).limit == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": 1}, "data/studies/mine.yaml: grid: Extra inputs are not permitted"),
        (variants({"guidance.scale": []}), "data/studies/mine.yaml: variants.label.grid.guidance.scale"),
        (variants({"guidance.scale": ["high"]}), "mine.yaml: variants.label: label scale=high: guidance.label.scale: "),
        (variants({"guidance.sclae": [1, 2]}), "mine.yaml: variants.label: label sclae=1: guidance.label.sclae: Extra"),
        (variants({"stop.max_level": [3]}), "stop.max_level: stop is 2 in base, which has no max_level"),
        (variants({"stop": [2, 99]}), "label stop=99: value: Value error, stop: level 99 is not within 1..10"),
        (variants({"distance": ["l1", "l1"]}), "label distance=l1 and label distance=l1 have the same settings"),
        ({"rows": ["msq"]}, "data/studies/mine.yaml: rows: 'msq' is not one of"),
        ({"variants": {}, "rows": []}, "data/studies/mine.yaml: value: Value error, variants, rows: the study has no"),
        ({"measure": ["near auroch"]}, "measure: 'auroch' is not one of auroc, fpr95"),
        ({"measure": ["nera auroc", "near auroc"]}, "mine.yaml: measure 'nera auroc': 'nera' is not one of ind, near"),
        ({"classifiers": ["strong"]}, "data/studies/mine.yaml: classifiers: 'strong' is not one of mine"),
        ({"compare": {"to": "label scale=9"}}, "mine.yaml: compare.to: 'label scale=9' selects no point; there are"),
        ({"figure": {"x": "scael", "y": ["near auroc"]}}, "mine.yaml: figure.x: 'scael' is not one of scale"),
        ({"claim": STUDY["claim"] | {"above": "knn"}}, "mine.yaml: claim.above: 'knn' selects no point"),
        (
            variants({}, distance="vif") | {"rows": [], "figure": {"y": ["near auroc"]}},
            "no point can run on mine; label: vif takes images from 41 pixels up; these have",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_names_file_and_field(write, changes, message):
    write(**changes)
    with pytest.raises(SettingError) as error:
        plan_study("mine", root=str(ROOT))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_point_whose_images_are_too_small_is_left_out(write):
    write(
        **variants({"distance": ["l1", "vif"]}),
        claim=STUDY["claim"] | {"of": "label distance=l1"},
        figure={"y": ["near auroc"]},
    )
    planned = plan_study("mine", root=str(ROOT))
    assert [point.name for point in planned.points] == ["msp", "label distance=l1"]
    assert list(planned.left_out) == ["label distance=vif"]
    assert "vif takes images from 41 pixels up" in planned.left_out["label distance=vif"]
    assert planned.open(None).params.names == ["label distance=l1", "msp"]


def test_a_study_that_is_not_there_is_told(write):
    write()
    with pytest.raises(SettingError, match="study: 'yours' is not one of mine"):
        load_study("yours")
    with pytest.raises(SettingError, match="point: it is one of a study's"):
        open_run(benchmark="mine", root=str(ROOT), point="a")


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "data/studies").glob("*.yaml") if path.stem != "dvc")
)
def test_shipped_studies_are_planned_on_their_benchmarks(name):
    if name == "text":  # it asks for the folder of a model
        with pytest.raises(SettingError, match=r"data/studies/text.yaml: models: text: denoiser.path is empty"):
            load_study(name)
        return
    study = load_study(name)
    for benchmark in study.benchmarks:
        assert plan_study(name, benchmark).points
    stages = yaml.safe_load((ROOT / "data/studies/dvc.yaml").read_text())["stages"]
    assert name in stages["study"]["matrix"]["name"]
