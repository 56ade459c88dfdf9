"""The measurement of start-up, on a small bundle, against a second checkout."""

import json
import sys

import pytest
from small_detector import Made, tiny_classifier, tiny_denoiser

from diffguard.deploy.bundle import save_bundle
from tasks.config.project import ROOT


@pytest.fixture
def bundle(tmp_path):
    save_bundle(Made(tiny_classifier(), tiny_denoiser()).detector("adaptive"), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def checkout(tmp_path):
    """This one under another name."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "diffguard").symlink_to(ROOT / "diffguard")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def test_commands_are_timed_in_both_checkouts(script, bundle, checkout, tmp_path, capsys):
    output = tmp_path / "startup.json"
    script("startup", "--detector", bundle, "--against", checkout, "--repeats", 2, "--output", output)
    report = json.loads(output.read_text())
    assert list(report["commands"]) == ["help", "score"]
    for measured in report["commands"].values():
        for name in ("this", "against"):
            for kind in ("elapsed", "processor"):
                seconds = measured[name]["runs"][kind]
                assert len(seconds) == 2
                assert min(seconds) > 0
                assert measured[name]["median"][kind] == pytest.approx(sum(seconds) / 2)
        this, against = (measured[name]["median"]["processor"] for name in ("this", "against"))
        assert measured["times_faster"]["processor"] == pytest.approx(against / this, abs=0.01)
    # Python alone has no torch to load.
    assert (
        report["commands"]["help"]["this"]["median"]["elapsed"]
        < report["commands"]["score"]["this"]["median"]["elapsed"]
    )
    assert str(tmp_path) not in output.read_text()
    assert "| score | times faster |" in capsys.readouterr().out


def test_a_failing_command_is_an_error(script, bundle):
    (bundle / "detector.json").unlink()
    with pytest.raises(SystemExit, match=r"diffguard score ended with 1: error: .*no detector here"):
        script("startup", "--detector", bundle, "--repeats", 1)
