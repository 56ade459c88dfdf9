"""A process resolves a run once and reads each model once for its hash, and sees what changes in between."""

import os
import shutil
from collections import Counter

import pandas as pd
import pytest
import torch
import yaml
from prefect.testing.utilities import prefect_test_harness
from small_project import work_in, write_benchmark, write_params

import diffguard.utils.hashing
import tasks.config.current
import tasks.score.store
from diffguard.utils.hashing import hash_file, hash_unchanged
from tasks import workflow
from tasks.config.benchmark import DENOISER
from tasks.config.current import KEPT, current_run
from tasks.config.run import open_run
from tasks.models.loaded import load_models
from tasks.prepare.stage import make_ready
from tasks.score.plan import plan, read_items
from tasks.score.stage import score
from tasks.train.stage import train


class Counted:
    """How often runs are resolved, and files and folders read for their hash, under the real functions."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.runs, self.tables, self.hashed = 0, 0, Counter()
        resolve, read, hash_it = open_run, tasks.score.store.ScoreFolder.read, hash_file

        def counted_run(**choices):
            self.runs += 1
            return resolve(**choices)

        def counted_read(folder):
            self.tables += 1
            return read(folder)

        def counted_hash(path, without=None):
            self.hashed[path.name] += 1
            return hash_it(path, without)

        patch.setattr(tasks.config.current, "open_run", counted_run)
        patch.setattr(tasks.score.store.ScoreFolder, "read", counted_read)
        patch.setattr(diffguard.utils.hashing, "hash_file", counted_hash)

    def models(self) -> list[int]:
        """How often each of the three models was read."""
        return [
            sum(count for name, count in self.hashed.items() if name.startswith(f"{model}-"))
            for model in (DENOISER, "ordinary", "strong")
        ]


def run_tasks(choices) -> None:
    """The tasks of the flow for a benchmark that DVC does not have, in their order, each with plain choices."""
    workflow.prepare.fn(choices)
    workflow.validate.fn(choices)
    workflow.check.fn(choices)
    for model in (DENOISER, "ordinary", "strong"):
        workflow.train_other.fn(choices, model, 0)
    if shards := workflow.missing.fn(choices):
        workflow.score.fn(choices, shards)
    workflow.validate_scores.fn([choices])
    thresholds = workflow.calibrate.fn(choices)
    metrics = workflow.evaluate.fn(choices)
    assert workflow.bundle.fn(choices)
    parent = workflow.log.fn(choices, metrics, thresholds)
    workflow.register.fn(choices, parent, metrics)


def test_a_flow_resolves_its_run_and_hashes_each_model_once(tmp_path, monkeypatch):
    work_in(monkeypatch, tmp_path)
    write_params(tmp_path)
    write_benchmark(tmp_path)
    digits = tmp_path / "data" / "benchmarks" / "digits.yaml"
    (digits.parent / "other.yaml").write_text(yaml.safe_dump(yaml.safe_load(digits.read_text()) | {"name": "other"}))
    counted = Counted(monkeypatch)
    choices = {"benchmark": "other", "variants": ["cfg-w1", "msp", "fused"], "seeds": [0]}
    with prefect_test_harness(server_startup_timeout=120):
        run_tasks(choices)
        rows = 2 * 3  # of two classifiers: cfg-w1, and msp and knn, which fused needs too
        assert counted.runs == 2  # before there is a manifest, and with it
        assert counted.models() == [1, 1, 1]
        assert counted.tables == rows
        run_tasks(choices)
        assert (counted.runs, counted.models(), counted.tables) == (2, [1, 1, 1], rows)


def test_an_edited_setting_is_seen_though_the_file_keeps_its_size_and_time(project):
    before, path = current_run(), project / "params.yaml"
    assert current_run() is before
    written, stat = path.read_text(), path.stat()
    try:
        path.write_text(written.replace("draws: 100\n", "draws: 200\n"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert (before.params.evaluate.draws, current_run().params.evaluate.draws) == (100, 200)
    finally:
        path.write_text(written)
    assert current_run().params.evaluate.draws == 100


def test_an_edited_benchmark_is_seen(project):
    path = project / "data" / "benchmarks" / "digits.yaml"
    before, written = current_run(), path.read_text()
    try:
        path.write_text(written + "default: msp\n")
        assert (before.default, current_run().default) == ("cfg-w1", "msp")
    finally:
        path.write_text(written)


def test_a_new_manifest_is_seen(project):
    before, made_by = current_run(), plan(current_run())[0].folder.made_by
    before_model = before.model(5, "strong")  # of a seed that DVC does not have: named by the manifest's hash
    make_ready(before.benchmark, before.home, seed=1)
    try:
        after = current_run()
        assert set(after.manifest["content_hash"]) != set(before.manifest["content_hash"])
        assert after.model(5, "strong") != before_model
        assert plan(after)[0].folder.made_by["images"] == after.scored_hash != made_by["images"]
    finally:
        make_ready(before.benchmark, before.home, seed=0)
    assert plan(current_run())[0].folder.made_by == made_by


def test_a_retrained_model_is_hashed_and_loaded_anew(project):
    run = current_run()
    folder, before = run.model(0, "ordinary"), plan(run)
    weights = load_models(run, 0, "cpu").classifiers["ordinary"].state_dict()
    kept = shutil.copytree(folder, project / "kept")
    try:
        shutil.rmtree(folder)
        train(run, "ordinary", 1).rename(folder)
        after = plan(current_run())
        changed = {
            item.classifier
            for item, other in zip(before, after, strict=True)
            if item.folder.made_by["classifier"] != other.folder.made_by["classifier"]
        }
        assert changed == {"ordinary"}
        retrained = load_models(current_run(), 0, "cpu").classifiers["ordinary"].state_dict()
        assert not all(torch.equal(weights[key], retrained[key]) for key in weights)
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
    assert [item.folder.path for item in plan(current_run())] == [item.folder.path for item in before]


def test_a_copy_that_keeps_size_and_time_is_read_anew(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    os.utime(other, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    first = hash_unchanged(one)
    os.replace(other, one)
    assert hash_unchanged(one) == hash_file(one) != first


def test_scores_that_were_written_anew_are_read_anew(project):
    items = score(open_run(variants=["msp"], classifier="strong"))
    tables = read_items(items)
    assert read_items(items)["strong", "msp", 0] is tables["strong", "msp", 0]
    shard = items[0].folder.path / "shard-00000.parquet"
    first = pd.read_parquet(shard)
    items[0].folder.write(0, first.assign(score=first["score"] + 1), None, 1.0)
    again = read_items(items)["strong", "msp", 0]
    assert (again["score"] - tables["strong", "msp", 0]["score"])[: len(first)].tolist() == pytest.approx(
        [1] * len(first)
    )
    shard.unlink()


def test_a_place_that_appears_is_no_id_of_a_hub_any_more(project):
    digits = project / "data" / "benchmarks" / "digits.yaml"
    hub = yaml.safe_load(digits.read_text()) | {"name": "hub"}
    hub["denoiser"] = {"kind": "pretrained", "path": "someone/model"}
    path = digits.with_name("hub.yaml")
    path.write_text(yaml.safe_dump(hub))
    try:
        assert current_run(benchmark="hub").benchmark.denoiser.path == "someone/model"
        (project / "someone" / "model").mkdir(parents=True)
        assert current_run(benchmark="hub").benchmark.denoiser.path == str(project / "someone" / "model")
    finally:
        path.unlink()


def test_only_the_last_runs_are_kept(project):
    runs = [current_run(limit=limit) for limit in range(1, KEPT + 2)]
    assert current_run(limit=KEPT + 1) is runs[-1]
    assert current_run(limit=1) is not runs[0]
