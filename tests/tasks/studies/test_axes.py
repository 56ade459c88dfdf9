"""A study's rows under changed images, other models and groups: names of scores and models, and runs end to end."""

import json

import pytest
from own_project import own_benchmark, save_own, write_own
from sklearn.metrics import roc_auc_score
from small_studies import APPEARANCE, CLAIM, CLOSE, MODELS, write_study
from tiny_models import save_stable_diffusion

from diffguard.metrics import resample_scores
from tasks.config.run import open_run
from tasks.prepare.stage import prepare_if_changed
from tasks.score.plan import missing, plan
from tasks.studies.failures import fails_from, failure_table
from tasks.studies.points import plan_study
from tasks.studies.results import Measured
from tasks.studies.stage import conclude, main, make_scores


def test_only_what_is_changed_has_another_name(project):
    variants = ["cfg-w1", "cfg-early-stop", "knn"]
    before = open_run(variants=variants)
    changed = open_run(variants=variants, change={"kind": "jpeg", "quality": 50})
    weaker = open_run(variants=variants, change={"kind": "jpeg", "quality": 90})
    assert changed.unchanged.name == before.name
    assert len({before.name, changed.name, weaker.name}) == 3
    assert not changed.own
    assert not changed.whole
    assert changed.model(0, "denoiser") == before.model(0, "denoiser")
    folders = [{item.folder.path for item in plan(run)} for run in (before, changed, weaker)]
    assert not folders[0] & folders[1]
    assert not folders[1] & folders[2]
    assert not any({"change", "unchanged"} & item.folder.made_by.keys() for item in plan(before))
    assert set(changed.scored["role"]) == {"ind"}
    assert set(changed.scored["split"]) == {"test"}
    thinner = open_run(models={"denoiser": {"channels": [4, 8]}})
    same = open_run(models={"denoiser": {"channels": [8, 16]}})
    assert thinner.model(0, "denoiser") != before.model(0, "denoiser")
    assert thinner.model(0, "ordinary") == same.model(0, "ordinary") == before.model(0, "ordinary")
    assert same.own
    assert same.model(0, "denoiser") == before.model(0, "denoiser")


ONE = MODELS | {
    "figure": {"y": ["near auroc"]},
    "claim": CLAIM | {"measure": "near auroc", "of": "cfg-w1", "above": "knn"},
    "compare": None,
}


@pytest.mark.parametrize(
    ("study", "says"),
    [
        (
            {**APPEARANCE, "changes": {"monochrome": [1]}, "claim": CLAIM | {"of": "knn"}},
            "monochrome changes no image of mode L",
        ),
        ({**APPEARANCE, "changes": {"sepia": [1]}}, "data/studies/one.yaml: changes: 'sepia' is not one of monochrome"),
        ({**APPEARANCE, "changes": {"jpeg": [200]}}, "data/studies/one.yaml: changes.jpeg: quality"),
        ({**APPEARANCE, "groups": {"dataset": {}}}, "models, changes, groups: a study has one of them"),
        ({**CLOSE, "groups": {"file": {"file": "none.yaml"}}}, "none.yaml: no such file"),
        ({**CLOSE, "groups": {"distance": {"row": "kn"}}}, "'kn' is not one of"),
        (ONE | {"models": {"base": {"denoiser": {"chanels": [8]}}}}, "models.denoiser: trained.chanels"),
        (ONE | {"models": {"base": {"denoiser": {"kind": "pretrained", "path": None}}}}, "denoiser.path is empty"),
    ],
)
def test_a_point_that_cannot_run_is_one_line_before_work_begins(project, study, says):
    write_study(project, study)
    with pytest.raises(Exception, match=says) as error:
        plan_study("one", "digits")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def appearance(project):
    write_study(project, APPEARANCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["studies", "one"])
        main()
    return json.loads((project / "data" / "digits" / "studies" / "one" / "results.json").read_text())


def test_changed_images_meet_the_thresholds_of_unchanged_ones(appearance, project):
    points = {point["name"]: point["measures"] for point in appearance["points"]}
    assert set(points) == {
        f"{row}{change}"
        for row in ("cfg-w1", "knn", "fused")
        for change in ("", ", jpeg 90", ", jpeg 5", ", inverted 1")
    }
    assert points["cfg-w1, jpeg 90"]["accuracy"] == points["knn, jpeg 90"]["accuracy"]
    assert points["knn, inverted 1"]["rejected"]["value"] > points["knn"]["rejected"]["value"]
    assert points["knn, inverted 1"]["promised"] == points["knn"]["promised"]
    # Of 18 images, by Clopper and Pearson.
    if points["knn, inverted 1"]["rejected"]["value"] == 1:
        assert points["knn, inverted 1"]["rejected"]["low"] == pytest.approx(0.025 ** (1 / 18))
    page = (project / "docs" / "studies" / "one.md").read_text()
    assert "| row | unchanged | jpeg (JPEG quality) | inverted (share of the negative) |" in page


def test_a_finished_study_has_nothing_left_to_score(appearance, project):
    planned = plan_study("one", "digits")
    assert [run.change for run in map(planned.open, planned.runs)].count(None) == 1
    assert not any(missing(run, plan(run)) for run in map(planned.open, planned.runs))


def test_failure_is_from_the_weakest_strength_with_all_stronger_ones_above_the_promise():
    def points(*lows, kind="blurred"):
        measures = [{"rejected": {"low": low}, "promised": {"value": 0.05}} for low in lows]
        axes = [{"change": kind, "strength": number} for number in range(1, len(lows) + 1)]
        return [{"axes": axis, "measures": measure} for axis, measure in zip(axes, measures, strict=True)]

    assert fails_from(points(0.01, 0.06, 0.2))["axes"]["strength"] == 2
    assert fails_from(points(0.06, 0.01, 0.2))["axes"]["strength"] == 3
    assert fails_from(points(0.2, 0.2, 0.05)) is None
    assert fails_from(points(0.2, 0.06, 0.01, kind="jpeg"))["axes"]["strength"] == 2
    shown = [each | {"name": "x", "line": "rows", "row": "x", "classifier": "c"} for each in points(0.2, 0.2, 0.05)]
    for each in shown:
        each["measures"]["rejected"]["value"] = 0.3
    unchanged = shown[0] | {"axes": {"change": "none"}}
    table = failure_table({"classifiers": ["c"], "points": [unchanged, *shown]})
    assert table.splitlines()[-1] == "| `x` | 30.0 of 5.0 | only 1 (30.0), 2 (30.0) |"


def test_models_of_a_grid_are_trained_and_compared(project):
    write_study(project, MODELS, "models")
    planned = plan_study("models", "digits")
    make_scores(planned)
    results = conclude(planned)
    points = {point["name"]: point["measures"] for point in results["points"]}
    wide, thin = points["cfg-w1, CNN"], points["cfg-w1, small denoiser"]
    assert wide["denoiser macs"]["value"] > thin["denoiser macs"]["value"]
    # The benchmark's trains for 30 steps of 16 images, the thin one for 4; forward, and backward for two forwards.
    for point, steps in ((wide, 30), (thin, 4)):
        assert point["denoiser training_macs"]["value"] == 3 * point["denoiser macs"]["value"] * steps * 16
    assert [(each["of"], each["to"]) for each in results["differences"]] == [
        (f"{row}, {network}", f"{row}, CNN") for row in ("cfg-w1", "knn") for network in ("ViT", "small denoiser")
    ]
    assert points["cfg-w1, ViT"]["denoiser macs"] == wide["denoiser macs"]
    assert points["knn, CNN"]["near auroc"] == points["knn, small denoiser"]["near auroc"]
    assert points["knn, ViT"]["near auroc"] != points["knn, CNN"]["near auroc"]


@pytest.fixture(scope="module")
def measured_groups(project):
    """The study of groups with its scores, its points of the first grouping, and the score table of their row."""
    write_study(project, CLOSE, "close")
    planned = plan_study("close", "digits")
    make_scores(planned)
    measured = Measured.of(planned)
    [(_, tables)] = measured.runs.values()
    table = tables["ordinary", "knn", 0]
    return (
        measured,
        [point for point in planned.points if point.grouping == "distance"],
        table[table["split"] == "test"],
    )


def test_the_auroc_of_a_group_is_scikit_learns(measured_groups):
    """Over the groups of a partition, weighted by their sizes, it comes to the AUROC of all."""
    measured, points, table = measured_groups
    ind = table.loc[table["role"] == "ind", "score"]
    ood = table[table["role"] != "ind"]
    ids = []
    total = 0.0
    for point in points:
        members = measured._groups[point.grouping]
        ids += list(members.index[members == point.axes["group"]])
        scores = ood.loc[ood["id"].isin(members.index[members == point.axes["group"]]), "score"]
        expected = roc_auc_score([0] * len(ind) + [1] * len(scores), [*ind, *scores])
        assert measured.draws(point, "ordinary", "group auroc")[0] == pytest.approx(expected)
        total += expected * len(scores) / len(ood)
    assert sorted(ids) == sorted(ood["id"])
    whole = resample_scores([ind.to_numpy()], {"all": [ood["score"].to_numpy()]}, {}, draws=100)
    assert whole.by_seed["all"]["auroc"][0, 0] == pytest.approx(total)


def test_groups_end_to_end(project, measured_groups):
    measured, _, _ = measured_groups
    found = conclude(measured.planned)
    assert [point["axes"]["group"] for point in found["points"]] == [
        1, 2, 3, *[dataset for dataset, role in found["datasets"].items() if role != "ind"]
    ]  # fmt: skip
    assert all(point["measures"]["group auroc"] is not None for point in found["points"])


def test_a_text_conditioned_denoiser_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    save_own(tmp_path)
    save_stable_diffusion(tmp_path / "text")
    write_own(monkeypatch, tmp_path / "project", own_benchmark())
    study = {
        **MODELS,
        "benchmarks": ["mine"],
        "classifiers": ["mine"],
        "claim": {"says": "x", "source": "y", "measure": "near auroc", "of": "cam, text", "above": "cam, class"},
        "rows": ["cam"],
        "models": {
            "base": {},
            "grid": {"conditioning": {"class": {}, "text": {"denoiser": {"path": "{root}/text", "prompt": "a {}"}}}},
        },
        "compare": {"axis": "conditioning", "to": "class"},
        "measure": ["near auroc", "denoiser accuracy"],
        "figure": {"x": "conditioning", "y": ["near auroc"]},
    }
    write_study(tmp_path / "project", study, "text")
    prepare_if_changed(open_run(benchmark="mine", root=str(tmp_path)).benchmark, tmp_path / "project/data/mine", seed=0)
    planned = plan_study("text", "mine", root=str(tmp_path))
    make_scores(planned)
    found = conclude(planned)
    told, conditioned = ({**point["measures"]} for point in reversed(found["points"]))
    assert told["near auroc"] is not None
    assert told["near auroc"] != conditioned["near auroc"]
    assert told["denoiser accuracy"]["value"] <= 1
