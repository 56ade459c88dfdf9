"""Rows of single denoising steps through the stages: their scores, and what the denoiser knows of its labels."""

import pytest
from small_project import write_params

from diffguard.engine import Engine, Request, Sample
from tasks.combine import evaluations
from tasks.common.files import read_images
from tasks.config.run import open_run
from tasks.evaluate.report import report
from tasks.evaluate.stage import evaluate
from tasks.models.loaded import load_models
from tasks.score.stage import score

ROWS = {
    "label-gain": {"stop": 3, "guidance": {"kind": "label"}, "distance": "label-gain"},
    "denoiser-posterior": {"stop": 3, "guidance": {"kind": "all-labels"}, "distance": "denoiser-posterior"},
    "activations": {"stop": 1, "guidance": {"kind": "none"}, "distance": "denoiser-activations"},
}


def with_single_steps(params):
    score = params["score"]
    score["variants"] = {"cfg-w1": score["variants"]["cfg-w1"], **ROWS}
    score["baselines"] = {"msp": score["baselines"]["msp"]}
    params["combine"] = {}


@pytest.fixture(scope="module")
def evaluated(project):
    write_params(project, with_single_steps)
    run = open_run()
    items = score(run)
    yield run, items, evaluate(run, items)
    write_params(project)


def labels_of_the_denoiser(run, classifier, ids):
    models = load_models(run, 0, "cpu")
    images = read_images(run.home, run.scored.set_index("id").loc[ids])
    request = Request(models.classifiers[classifier], run.params.score.variants["denoiser-posterior"])
    results = dict(Engine(models.denoiser, [request], slots=16).run(map(Sample, range(len(images)), images)))
    return [results[row][0].denoiser_label for row in range(len(images))]


def test_the_denoisers_accuracy_is_that_of_its_labels(evaluated):
    run, items, metrics = evaluated
    for classifier, rows in metrics.items():
        [item] = [each for each in items if (each.name, each.classifier) == ("denoiser-posterior", classifier)]
        table = item.read()
        ind = table[(table["split"] == "test") & (table["role"] == "ind")]
        right = (ind["denoiser_label"] == ind["label"]).mean()
        accuracy = rows["denoiser-posterior"]["denoiser"]["accuracy"]
        assert accuracy["value"] == pytest.approx(right)
        assert accuracy["low"] <= right <= accuracy["high"]
        assert accuracy["n"] == len(ind) == 18
        assert ind["denoiser_label"].tolist() == labels_of_the_denoiser(run, classifier, ind["id"])
        assert all("denoiser" not in row for name, row in rows.items() if name != "denoiser-posterior")
    share = f"{100 * metrics['ordinary']['denoiser-posterior']['denoiser']['accuracy']['value']:.1f} ("
    assert f"The denoiser as a classifier (denoiser-posterior) gives {share}" in report(metrics)


@pytest.mark.parametrize(("name", "cost"), [("label-gain", 6), ("denoiser-posterior", 18), ("activations", 1)])
def test_they_cost_what_they_evaluate(name, cost, evaluated):
    run, items, _ = evaluated
    [item] = [each for each in items if (each.name, each.classifier) == (name, "ordinary")]
    steps = item.read()["steps"]
    assert set(steps) == {0}
    assert set(evaluations(run, name, steps)) == {cost}
