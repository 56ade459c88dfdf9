"""What is recorded of a finished run, and the tables that are made of such a record."""

import json
import runpy

import pytest

from diffguard.errors import DataError
from tasks.config.project import ROOT
from tasks.config.run import open_run
from tasks.evaluate.stage import evaluate
from tasks.score.plan import plan


@pytest.fixture(scope="module")
def metrics(finished):
    run = open_run()
    return evaluate(run, plan(run))


def test_a_finished_run_is_recorded(metrics, script, tmp_path):
    output = tmp_path / "recorded.json"
    script("record", "--output", output)
    recorded = json.loads(output.read_text())
    run = open_run()
    assert recorded["benchmark"] == run.benchmark.name
    near = metrics["strong"]["knn"]["near"]
    assert (recorded["images"]["ind"], recorded["images"]["near"]) == (near["n_ind"], near["n_ood"])
    for classifier, rows in metrics.items():
        found = recorded["classifiers"][classifier]
        assert 0 <= found["accuracy"] <= 1
        assert list(found["rows"]) == list(rows)
        for name, row in rows.items():
            for group in {"near", "far"} & set(row):
                for metric in ("auroc", "fpr95"):
                    assert found["rows"][name][group][metric] == pytest.approx(row[group][metric], abs=1e-6)
            assert set(found["rows"][name].get("difference", {})) == set(row.get("difference", {}))
        chosen = found["rows"]["best"]["fitted"]
        assert chosen["members"] == rows["best"]["fitted"][0]["members"]
        assert found["rows"]["best"]["evaluations"] == (8 if "cfg-w1" in chosen["members"] else 0)
    assert recorded["classifiers"]["strong"]["rows"]["knn"]["evaluations"] == 0


def test_tables_check_fails_on_an_old_table(tmp_path, monkeypatch, capsys):
    tables = runpy.run_path(str(ROOT / "experiments" / "tables.py"))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("<!-- table: cost -->\nold\n<!-- end of table -->\n")
    main = tables["main"]
    monkeypatch.setitem(main.__globals__, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    with pytest.raises(DataError, match=r"tables out of date in README\.md"):
        main()
    monkeypatch.setattr("sys.argv", ["tables"])
    main()
    assert "`cfg-w1`" in page.read_text()
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    main()


def test_metrics_of_several_training_seeds_are_recorded(script):
    metric = {"value": 0.1234567, "low": 0.1, "high": 0.2, "per_seed": [0.1234567, 0.2]}
    found = script("record")["groups_of"]({"near": {"auroc": metric, "fpr95": metric, "n_ind": 10}})
    recorded = {"value": 0.123457, "low": 0.1, "high": 0.2, "per_seed": [0.123457, 0.2]}
    assert found == {"near": {"auroc": recorded, "fpr95": recorded}}
