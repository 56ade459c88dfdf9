"""Scoring through an fsspec URL, as a worker on another machine does."""

import numpy as np
import pytest

from diffguard.errors import SettingError
from tasks.files import fetched, is_local, place
from tasks.run import open_run
from tasks.score import missing, plan, score_shards
from tasks.share import collect, publish


@pytest.fixture
def url():
    place = "memory://diffguard-test"
    yield place
    import fsspec

    fsspec.filesystem("memory").rm("/diffguard-test", recursive=True)


def test_scores_made_behind_a_url_are_those_made_here(project, url, tmp_path):
    choices = {"variants": ["cfg-w1", "cfg-early-stop", "knn"], "classifier": "ordinary", "limit": 4}
    run, shared = open_run(**choices), open_run(**choices, data=url)
    items = plan(run)
    score_shards(run, items, [0], "cpu")  # goes along, and is not scored again
    publish(run, items, shared)
    there = plan(shared)
    assert not any(is_local(item.folder.path) for item in there)
    assert missing(shared, there) == list(range(1, run.shards))
    assert score_shards(shared, there, range(run.shards), "cpu") == len(there) * (run.shards - 1)

    collect(items, there)
    assert not missing(run, items)
    made = [item.folder.read() for item in items]
    samples = items[0].folder.samples()
    for item in items:
        for path in item.folder.path.glob("shard-*"):
            path.unlink()
    score_shards(run, items, range(run.shards), "cpu")
    for item, table in zip(items, made, strict=True):
        here = item.folder.read()
        assert table["id"].tolist() == here["id"].tolist()
        assert np.allclose(table["score"], here["score"], atol=1e-5)
    assert np.abs(samples.reconstruction.astype(int) - items[0].folder.samples().reconstruction).max() <= 1


def test_publishing_again_copies_only_what_changed(project, url):
    import fsspec

    choices = {"variants": ["msp"], "classifier": "ordinary", "limit": 2}
    run, shared = open_run(**choices), open_run(**choices, data=url)
    publish(run, plan(run), shared)
    files = fsspec.filesystem("memory")
    before = {path: files.modified(path) for path in files.find("/diffguard-test")}
    model = shared.model(0, "ordinary") / "model.safetensors"
    model.write_bytes(b"an older one")
    publish(run, plan(run), shared)
    after = {path: files.modified(path) for path in files.find("/diffguard-test")}
    assert [path for path in after if after[path] != before.get(path)] == [model.path]
    assert fetched(model).read_bytes() == (run.model(0, "ordinary") / "model.safetensors").read_bytes()


def test_a_place_that_fsspec_does_not_know_is_named():
    with pytest.raises(SettingError, match="nowhere://bucket: not a place that fsspec knows"):
        place("nowhere://bucket")
