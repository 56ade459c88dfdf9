"""``precision: auto``: one precision a run, part of what names its scores, and as it was where they were made."""

import json

import pytest
import yaml

import tasks.config.precision
from diffguard.errors import SettingError
from diffguard.utils.precision import has_bfloat16_units
from tasks import workflow
from tasks.config.current import current_run
from tasks.config.precision import NOTE, fast_precision
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.score.plan import missing, plan
from tasks.score.stage import main as score_stage
from tasks.score.stage import score

AUTO = ("cfg-w1", "cfg-early-stop")


@pytest.fixture
def auto(project):
    """The project, two of whose variants say auto; its scores go when the test ends."""
    path = project / "params.yaml"
    before = path.read_text()
    params = yaml.safe_load(before)
    for name in AUTO:
        params["score"]["variants"][name]["precision"] = "auto"
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    yield project
    path.write_text(before)


@pytest.fixture
def machine(monkeypatch):
    """A machine on which this precision is fast."""

    def have(precision):
        monkeypatch.setattr(tasks.config.precision, "fast_precision", lambda: precision)
        monkeypatch.setattr("tasks.score.stage.fast_precision", lambda: precision)

    return have


def precisions(run):
    return {name: variant.precision for name, variant in run.params.score.variants.items()}


def test_auto_is_what_is_fast_here_and_other_variants_keep_their_own(auto, machine):
    assert fast_precision() == ("bfloat16" if has_bfloat16_units("cpu") else "float32")
    for fast in ("float32", "bfloat16"):
        machine(fast)
        run = open_run(limit=2)
        assert precisions(run) == {"cfg-w1": fast, "cfg-early-stop": fast, "paper-cg": "float32"}
        assert run.precision == fast


def test_a_precision_can_be_chosen_and_no_other_than_there_are(auto, machine):
    machine("float32")
    assert precisions(open_run(precision="bfloat16"))["cfg-w1"] == "bfloat16"
    with pytest.raises(SettingError, match="precision: 'float8' is not one of float32, bfloat16"):
        open_run(precision="float8")


def test_without_auto_a_run_has_none_and_asks_for_no_device(project, monkeypatch):
    monkeypatch.setattr(tasks.config.precision, "fast_precision", lambda: pytest.fail("asked"))
    assert open_run().precision is None


def test_a_changed_precision_never_mixes_with_old_scores(auto):
    full, lowered = (open_run(limit=2, precision=precision) for precision in ("float32", "bfloat16"))
    folders = [
        {item.name: item.folder.path for item in plan(run) if item.classifier == "ordinary"} for run in (full, lowered)
    ]
    differ = {name for name in folders[0] if folders[0][name] != folders[1][name]}
    assert differ == set(AUTO)
    score(full)
    assert missing(full, plan(full)) == []
    assert missing(lowered, plan(lowered)) != []
    score(lowered)
    tables = [
        {item.name: item.read() for item in plan(run) if item.classifier == "ordinary"} for run in (full, lowered)
    ]
    for name in AUTO:
        one, other = (table[name]["score"] for table in tables)
        assert not one.equals(other)
        assert (one - other).abs().median() < 0.1 * one.std()  # one that stops a level earlier moves further
    assert tables[0]["paper-cg"]["score"].equals(tables[1]["paper-cg"]["score"])


def test_recorded_scores_are_evaluated_in_the_precision_that_they_were_made_in(auto, machine, capsys):
    machine("bfloat16")
    score_stage()
    note = auto / "data" / "digits" / "scores" / NOTE
    assert json.loads(note.read_text()) == {"auto": "bfloat16"}
    machine("float32")  # another machine, to which DVC brought them
    run = open_run()
    assert run.own
    assert precisions(run)["cfg-w1"] == "bfloat16"
    assert missing(run, plan(run)) == []
    assert set(evaluate(run, plan(run))["ordinary"]) >= set(AUTO)
    assert workflow.with_precision({}) == {"precision": "bfloat16"}
    score_stage()
    assert json.loads(note.read_text()) == {"auto": "bfloat16"}
    # What has to be scored anew there is scored in what is fast there.
    for shard in plan(run)[0].folder.path.glob("shard-*.parquet"):
        shard.unlink()
    assert workflow.with_precision({}) == {"precision": "float32"}
    assert workflow.with_precision({"precision": "bfloat16"}) == {"precision": "bfloat16"}
    score_stage()
    assert json.loads(note.read_text()) == {"auto": "float32"}
    assert current_run().precision == "float32"
    tracked = {path.name for path in note.parent.iterdir()}
    assert tracked == {NOTE, *(item.folder.path.name for item in plan(open_run()))}


def test_a_damaged_note_is_named(auto):
    note = auto / "data" / "digits" / "scores" / NOTE
    note.parent.mkdir(exist_ok=True)
    note.write_text('{"auto": "float8"}')
    try:
        with pytest.raises(SettingError, match=r"precision\.json: auto: 'float8' is not one of float32, bfloat16"):
            open_run()
    finally:
        note.unlink()
