"""The stages on a benchmark that is small enough for a test, with real models, in a folder of its own."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_project import write_params

import tasks.config.run
from diffguard.calibration.zscores import calibration_z_scores, z_scores
from diffguard.errors import DataError, ServiceError
from diffguard.utils.hashing import hash_file
from tasks.calibrate import calibrate
from tasks.combine import fitted, score_tables
from tasks.config.run import open_run
from tasks.evaluate.report import choices, difference_table, report, result_table
from tasks.evaluate.stage import evaluate
from tasks.log import log
from tasks.score.plan import plan
from tasks.score.stage import score
from tasks.services.tracking import open_tracking
from tasks.train.stage import train
from tasks.validate import validate_manifest, validate_scores

ROWS = ["cfg-w1", "cfg-early-stop", "paper-cg", "msp", "knn", "mahalanobis", "pixel-knn"]
GROUPS = {"digits-6-8", "letters", "patches", "noise", "near", "far"}


@pytest.fixture(scope="module")
def scored(project):
    run = open_run()
    return run, score(run)


def written(root):
    return {path: path.stat().st_mtime_ns for path in (root / "data/digits/scores").rglob("shard-*")}


def test_tables_are_complete_and_keep_their_rules(scored, tmp_path):
    run, items = scored
    tables = {item.title: item.read() for item in items}
    assert len(tables) == 2 * 7
    for table in tables.values():
        assert table["id"].tolist() == run.scored["id"].tolist()
        assert np.isfinite(table["score"]).all()
    validate_scores(tables, run.scored["id"], tmp_path / "docs")
    assert (tmp_path / "docs" / "index.html").is_file()


@pytest.mark.parametrize(
    ("breaking", "rule"),
    [
        (lambda t: t.drop(index=3), "every image has a row"),
        (lambda t: pd.concat([t, t.iloc[3:4]]), "no image has two rows"),
        (lambda t: t.assign(score=t["score"].where(t.index != 3)), "scores are finite"),
        (lambda t: t.assign(id=t["id"].where(t.index != 3, "stranger")), "rows are of the run's images"),
    ],
)
def test_a_broken_score_table_names_rule_and_row(scored, breaking, rule):
    run, [first, *_] = scored
    table = first.read()
    with pytest.raises(DataError, match=rule) as error:
        validate_scores({"scores of x": breaking(table)}, run.scored["id"])
    assert table["id"][3] in str(error.value) or "stranger" in str(error.value)


@pytest.mark.parametrize(
    ("breaking", "rule"),
    [
        (lambda m: m.assign(id=m["id"].where(m.index != 1, m["id"][0])), "ids are unique"),
        (lambda m: m.assign(path=m["path"].where(m.index != 1, "images/nowhere.png")), "files can be read"),
        (lambda m: m.assign(path=m["path"].where(m.index != 1, m["path"][0])), "files are as recorded"),
        (lambda m: m.assign(content_hash=m["content_hash"][0]), "no image is in two splits"),
        (lambda m: m.assign(content_hash=m["content_hash"][0]), "no image is both InD and OOD"),
        (lambda m: m[(m["split"] != "test") | (m["label"] != 2)], "every split has every InD class that is"),
        (lambda m: m.assign(label=m["label"].where(m.index != 1, 6)), "labels are 0..5 of InD, -1 of OOD"),
        (lambda m: m.assign(split=m["split"].where(m["dataset"] != "noise", "train")), "OOD is only in"),
        (lambda m: m.assign(split=m["split"].where(m.index != m.index[-1], "test")), "in one split only"),
    ],
)
def test_a_broken_manifest_names_its_rule(project, breaking, rule):
    run = open_run()
    validate_manifest(run.manifest, run.home, 8, "L", 6)
    with pytest.raises(DataError, match=rule):
        validate_manifest(breaking(run.manifest), run.home, 8, "L", 6)


@pytest.mark.parametrize(("size", "mode", "rule"), [(9, "L", "images are 9x9"), (8, "RGB", "of mode RGB")])
def test_images_of_another_format_break_a_rule(project, size, mode, rule):
    run = open_run()
    with pytest.raises(DataError, match=rule):
        validate_manifest(run.manifest, run.home, size, mode, 6)


def test_scoring_again_repeats_nothing(project, scored):
    before = written(project)
    score(open_run())
    assert written(project) == before


def test_a_lost_shard_is_made_again_alone_and_alike(project, scored):
    _, [first, *_] = scored
    before, table = written(project), first.read()
    lost = first.folder.path / "shard-00001.parquet"
    lost.unlink()
    score(open_run())
    changed = {path for path, at in written(project).items() if before[path] != at}
    assert lost in changed
    assert {path.parent for path in changed} == {first.folder.path}
    again = first.read()
    assert again.drop(columns="score").equals(table.drop(columns="score"))
    assert np.allclose(again["score"], table["score"], atol=1e-4)


def test_one_changed_variant_rescores_that_one(project, scored):
    before = written(project)
    try:
        write_params(project, lambda params: params["score"]["variants"]["cfg-w1"].update(stop=3))
        items = score(open_run())
        after = written(project)
        new = {path.parent for path in after if path not in before}
        assert new == {item.folder.path for item in items if item.name == "cfg-w1"}
        assert all(after[path] == at for path, at in before.items() if path in after)
    finally:
        write_params(project)
        score(open_run())
    assert {path.parent.name for path in written(project)} == {path.parent.name for path in before}


def test_scores_do_not_depend_on_the_batch(project, scored, monkeypatch):
    size, (_, items) = 7, scored
    write_params(project, lambda params: params["score"].update(slots=size))
    try:
        small = open_run()
        monkeypatch.setattr(tasks.config.run.Run, "home", property(lambda self: project / "data" / f"batch-{size}"))
        (project / "data" / f"batch-{size}").mkdir()
        for name in ("images", "models", "manifest.parquet"):
            (project / "data" / f"batch-{size}" / name).symlink_to(project / "data" / "digits" / name)
        again = score(small)
    finally:
        write_params(project)
    for one, other in zip(items, again, strict=True):
        assert np.allclose(one.read()["score"], other.read()["score"], atol=1e-4), one.title
        assert one.folder.path != other.folder.path


def test_an_unreadable_image_stops_scoring_and_leaves_no_shard(project, scored):
    run = open_run(limit=3)
    broken = run.home / run.scored["path"].iloc[-1]
    content = broken.read_bytes()
    broken.write_bytes(content[:30])
    try:
        with pytest.raises(DataError, match=broken.name):
            score(run)
        last = run.shards - 1
        assert all(last in item.folder.missing() for item in plan(run))
    finally:
        broken.write_bytes(content)
    before = written(project)
    assert all(not item.folder.missing() for item in score(run))
    assert written(project) == before


def test_results_have_every_row_with_intervals_and_counts(project, scored):
    run, items = scored
    thresholds, metrics, tables = calibrate(run, items), evaluate(run, items), score_tables(run, items)
    assert json.loads((project / "data/digits/metrics.json").read_text()) == metrics
    assert metrics.keys() == {"ordinary", "strong"}
    for classifier, rows in metrics.items():
        assert list(rows) == [*ROWS, "fused", "cascade", "best"]
        for name, row in rows.items():
            assert row.keys() - {"difference", "diffused", "fitted"} == GROUPS
            assert (row["near"]["n_ind"], row["near"]["n_ood"], row["far"]["n_ood"]) == (18, 6, 18)
            for metric in ("auroc", "fpr95", "aupr_in", "aupr_out"):
                assert 0 <= row["far"][metric]["low"] <= row["far"][metric]["high"] <= 1
            [entry] = thresholds[classifier][name]
            table = tables[classifier, name, 0]
            calibration = table.loc[table["split"] == "calibration", "score"]
            assert (calibration <= entry["threshold_together"]).mean() >= 0.95
    assert len(result_table(metrics).splitlines()) == 2 + 20
    assert len(difference_table(metrics).splitlines()) == 2 + 2 * (3 + 2 + 3)
    validation = json.loads((project / "data/digits/validation.json").read_text())["strong"]
    assert validation["knn"].keys() == {"digit-9", "symbols", "near", "far"}
    assert validation["fused"].keys() == {*validation["knn"], "difference"}
    with Image.open(project / "data/digits/verdicts.png") as picture:
        assert picture.height > 5 * 2 * 84


def test_a_combination_is_made_of_its_members_scores(scored):
    run, items = scored
    tables = score_tables(run, items)
    assert len(tables) == 2 * 10
    fused = tables["strong", "fused", 0]
    assert fused.columns.tolist() == tables["strong", "knn", 0].columns.tolist()
    assert (fused["variant"] == "fused").all()
    assert fused["id"].tolist() == run.scored["id"].tolist()
    members = [tables["strong", name, 0] for name in ("cfg-w1", "knn", "msp")]
    at = (fused["split"] == "calibration").to_numpy()
    expected = sum(z_scores(each["score"][at], each["score"]) for each in members)
    assert np.allclose(fused["score"][~at], expected[~at])
    assert np.allclose(fused["score"][at], sum(calibration_z_scores(each["score"][at]) for each in members))
    assert (fused["steps"] == 4).all()


def test_a_cascade_asks_its_second_detector_where_the_gate_is_undecided(scored):
    run, items = scored
    tables, metrics = score_tables(run, items), evaluate(run, items)
    cascade, gate = tables["ordinary", "cascade", 0], tables["ordinary", "pixel-knn", 0]
    goes_on = fitted(run, tables, "ordinary", "cascade", 0).undecided(gate["score"])
    assert (cascade["steps"] == np.where(goes_on, 4, 0)).all()
    found = metrics["ordinary"]["cascade"]["diffused"]
    assert found.keys() == {"digits-0-5", "digits-6-8", "letters", "patches", "noise"}
    for dataset, each in found.items():
        mine = (gate["split"] == "test") & (gate["dataset"] == dataset)
        assert each["share"] == goes_on[mine].mean()
        assert each["evaluations"] == pytest.approx(8 * each["share"])  # 4 steps up and 4 down


def test_a_choice_on_validation_is_in_the_results_with_what_it_is_based_on(scored):
    run, items = scored
    metrics, tables = evaluate(run, items), score_tables(run, items)
    for classifier, rows in metrics.items():
        [best], [band] = rows["best"]["fitted"], rows["cascade"]["fitted"]
        combined = fitted(run, tables, classifier, "best", 0)
        assert best == combined.fitted_values()
        assert tables[classifier, "best", 0]["score"].to_numpy() == pytest.approx(_scored(combined, tables, classifier))
        assert band == fitted(run, tables, classifier, "cascade", 0).fitted_values()
        assert band["validation"]["images"] == {"ind": 12, "near": 6, "far": 6}
        assert (band["validation"]["stated_loss"], band["validation"]["confidence"]) == (0.6, 0.5)
    lines = choices(metrics).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("- cascade (ordinary): ")
    assert lines[3].startswith(
        f"- best (strong): {' + '.join(metrics['strong']['best']['fitted'][0]['members'])}, mean AUROC "
    )
    assert report(metrics).endswith(choices(metrics))


def _scored(combined, tables, classifier):
    members = {name: tables[classifier, name, 0] for name in combined.members}
    scores = combined.score({name: table["score"].to_numpy() for name, table in members.items()})
    first = next(iter(members.values()))
    scores[(first["split"] == "calibration").to_numpy()] = combined.score_calibration()
    return scores


def test_differences_are_of_the_same_draws_and_add_up(scored):
    run, items = scored
    rows = evaluate(run, items)["ordinary"]
    of = {"fused": {"cfg-w1", "knn", "msp"}, "cascade": {"pixel-knn", "fused"}, "best": {"cfg-w1", "knn", "pixel-knn"}}
    for name, members in of.items():
        assert rows[name]["difference"].keys() == members
        for member, groups in rows[name]["difference"].items():
            assert groups.keys() == GROUPS
            for group, metrics in groups.items():
                for metric, found in metrics.items():
                    mine, theirs = (rows[each][group][metric] for each in (name, member))
                    assert found["value"] == pytest.approx(mine["value"] - theirs["value"], abs=1e-12)
                    assert found["low"] <= found["high"]
                    assert (
                        found["high"] - found["low"]
                        <= sum(each["high"] - each["low"] for each in (mine, theirs)) + 1e-9
                    )


def test_decisions_are_by_predicted_class_where_there_are_enough_images(project, scored):
    run, items = scored
    write_params(project, lambda params: params["calibrate"].update(accept=0.7))
    try:
        loose = open_run()
        found = calibrate(loose, items)["ordinary"]["knn"][0]
    finally:
        write_params(project)
        strict = calibrate(run, items)["ordinary"]["knn"][0]
    assert strict["thresholds"] == {}
    assert strict["pooled_classes"] == run.classes
    assert (strict["alpha"], strict["promised_together"]) == (0.05, 1 / 25)
    assert strict["promised"] == pytest.approx(1 / 25)
    assert strict["rejected"] == strict["rejected_together"]
    assert strict["rejected"]["value"] == pytest.approx(1 - strict["accepted"]["digits-0-5"]["value"])
    assert found["alpha"] == 0.3
    assert 0 < len(found["thresholds"]) < 6
    assert {*found["thresholds"], *found["pooled_classes"]} == set(run.classes)
    table = score_tables(run, items)["ordinary", "knn", 0]
    counts = table[table["split"] == "calibration"]["predicted"].value_counts()
    own = {run.classes[label] for label, count in counts.items() if count >= 3}
    assert set(found["thresholds"]) <= own  # where the others are too few, one joins them
    assert len(own - set(found["thresholds"])) <= 1
    ind = table[(table["split"] == "test") & (table["role"] == "ind")]
    limits = [found["thresholds"].get(run.classes[each], found["threshold"]) for each in ind["predicted"]]
    assert found["rejected"]["value"] == (ind["score"] > limits).mean()
    assert found["rejected"]["low"] <= found["rejected"]["value"] <= found["rejected"]["high"]


def test_a_combination_may_be_the_default_detector(project, scored):
    write_params(project, lambda params: params["evaluate"].update(default="cascade"))
    try:
        run, items = open_run(), scored[1]
        metrics = evaluate(run, items)
        summary = json.loads((project / "data/digits/summary.json").read_text())
        assert summary["strong"]["near auroc"] == metrics["strong"]["cascade"]["near"]["auroc"]["value"]
        assert (project / "data/digits/verdicts.png").is_file()
    finally:
        write_params(project)
        evaluate(*scored)


def test_seeds_are_trained_apart_and_pooled(project, scored):
    run = open_run(seeds=[0, 1], variants=["cfg-w1", "msp"], classifier="ordinary")
    before = hash_file(project / "data/digits/models")
    for model in ("denoiser", "ordinary"):
        train(run, model, 1)
    metrics = evaluate(run, score(run))
    found = metrics["ordinary"]["cfg-w1"]["near"]["auroc"]
    assert len(found["per_seed"]) == 2
    assert found["value"] == pytest.approx(np.mean(found["per_seed"]))
    assert hash_file(project / "data/digits/models") == before
    assert (run.results / "metrics.json").is_file()


def test_an_oracle_variant_is_told_the_truth(project):
    def add(params):
        params["score"]["variants"]["told"] = {**params["score"]["variants"]["cfg-w1"], "label": "oracle-ind"}

    write_params(project, add)
    try:
        items = score(open_run(variants=["cfg-w1", "told"], classifier="ordinary", limit=10))
    finally:
        write_params(project)
    tables = {item.name: item.read().set_index("id").sort_index() for item in items}
    plain, told = tables["cfg-w1"], tables["told"]
    wrong = (plain["role"] == "ind") & (plain["predicted"] != plain["label"])
    assert wrong.any()
    assert (plain["predicted"] == told["predicted"]).all()
    assert np.allclose(plain["score"][~wrong], told["score"][~wrong], atol=1e-6)
    assert not np.isclose(plain["score"][wrong], told["score"][wrong], atol=1e-6).any()


@pytest.fixture(scope="module")
def logged(scored):
    run, items = scored
    metrics, thresholds = evaluate(run, items), calibrate(run, items)
    return log(run, items, metrics, thresholds), metrics, thresholds


def test_mlflow_holds_the_whole_evaluation(scored, logged):
    (_, items), (parent, metrics, _) = scored, logged
    client = open_tracking()
    [experiment] = [e for e in client.search_experiments() if e.name == "diffguard"]
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'", max_results=100)
    assert client.get_run(parent).info.status == "FINISHED"
    assert {child.info.status for child in children} == {"FINISHED"}
    combined = {
        f"{name} · {classifier}" for name in ("fused", "cascade", "best") for classifier in ("ordinary", "strong")
    }
    assert {child.info.run_name for child in children} == {f"{i.name} · {i.classifier}" for i in items} | combined
    [child] = [each for each in children if each.info.run_name == "cfg-early-stop · strong"]
    expected = metrics["strong"]["cfg-early-stop"]["far"]["auroc"]
    assert child.data.metrics["far/auroc"] == pytest.approx(expected["value"])
    assert child.data.metrics["far/auroc_low"] == pytest.approx(expected["low"])
    assert child.data.params["settings.guidance.scale"] == "2.0"
    assert child.data.metrics["images_per_second"] > 0
    assert child.data.metrics["evaluations_per_image"] > 0
    assert all(len(each.data.metrics) <= 40 for each in children)
    datasets = {each.dataset.name for each in child.inputs.dataset_inputs}
    assert datasets == {"digits", "digits-6-8", "letters", "patches", "noise"}
    names = {each.path for each in client.list_artifacts(child.info.run_id)}
    assert names == {"curves.png", "scores-seed-0.csv", "samples", "metrics.json"}
    samples = {Path(each.path).name for each in client.list_artifacts(child.info.run_id, "samples")}
    assert samples == {f"{name}.png" for name in ("digits-0-5", "digits-6-8", "letters", "patches", "noise")}


def test_mlflow_holds_a_combination_with_its_differences(logged):
    parent, metrics, thresholds = logged
    client = open_tracking()
    [experiment] = [e for e in client.search_experiments() if e.name == "diffguard"]
    mine = f"tags.mlflow.parentRunId = '{parent}' and attributes.run_name = 'cascade · strong'"
    [child] = client.search_runs([experiment.experiment_id], mine)
    assert child.data.params["kind"] == "combination"
    assert child.data.params["settings.of"] == "['pixel-knn', 'fused']"
    row = metrics["strong"]["cascade"]
    expected = row["difference"]["fused"]["far"]["fpr95"]
    found = json.loads(Path(client.download_artifacts(child.info.run_id, "metrics.json")).read_text())
    assert found["metrics"]["difference"]["fused"]["far"]["fpr95"]["low"] == pytest.approx(expected["low"])
    assert found["metrics"]["diffused"]["noise"]["share"] == row["diffused"]["noise"]["share"]
    assert "noise" in found["thresholds"][0]["accepted"]
    assert child.data.metrics["rejected"] == thresholds["strong"]["cascade"][0]["rejected"]["value"]
    assert child.data.params["fitted.band"] == str(row["fitted"][0]["band"])
    assert child.data.params["fitted.validation.images.near"] == "6"
    artifacts = {each.path for each in client.list_artifacts(child.info.run_id)}
    assert artifacts == {"curves.png", "scores-seed-0.csv", "metrics.json"}
    assert "auroc-by-evaluations.png" in {each.path for each in client.list_artifacts(parent)}
    report = client.download_artifacts(parent, "results.md")
    assert "| strong | cascade − pixel-knn |" in Path(report).read_text()


def test_mlflow_ranks_detectors_by_dataset(logged):
    metrics = logged[1]
    client = open_tracking()
    [experiment] = [e for e in client.search_experiments() if e.name == "diffguard"]
    assert "`near/auroc`" in experiment.tags["mlflow.note.content"]
    ranked = client.search_logged_models(
        [experiment.experiment_id],
        datasets=[{"dataset_name": "letters"}],
        order_by=[{"field_name": "metrics.letters/auroc", "dataset_name": "letters", "ascending": False}],
    )
    aurocs = [next(metric.value for metric in model.metrics if metric.key == "letters/auroc") for model in ranked]
    expected = [row["letters"]["auroc"]["value"] for rows in metrics.values() for row in rows.values()]
    assert aurocs == pytest.approx(sorted(expected, reverse=True))
    assert {model.params["detector"] for model in ranked} == set(metrics["strong"])


def test_an_unreachable_mlflow_is_named(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ServiceError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be reached"):
        open_tracking()
