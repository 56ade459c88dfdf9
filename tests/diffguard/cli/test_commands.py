"""score, explain and calibrate on a bundle: what they print and write, and their exit codes."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import betabinom

from diffguard.cli import detector_option, image_files
from diffguard.cli.main import main
from diffguard.deploy.bundle import load_bundle
from diffguard.images import to_picture

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def images(made, tmp_path_factory):
    """A folder with folders: PNG files, and what is no image."""
    root = tmp_path_factory.mktemp("images")
    (root / "b").mkdir()
    (root / ".hidden").mkdir()
    for number, image in enumerate(made.new):
        to_picture(image).save(root / ("b" if number % 2 else "") / f"{number:02}.png")
    to_picture(made.new[0]).save(root / ".hidden" / "x.png")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def paths(images):
    return [*sorted(images.glob("*.png")), *sorted((images / "b").glob("*.png"))]


@pytest.fixture(scope="module")
def expected(paths, detector):
    pictures = [detector.prepare(Image.open(path)) for path in paths]
    return detector.decide(torch.stack(pictures))


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(each) for each in arguments])
    return stopped.value.code


def same(row, path, decision):
    assert row["path"] == str(path)
    assert (row["label"], row["class_name"], row["is_ood"]) == (decision.label, decision.class_name, decision.is_ood)
    assert row["score"] == pytest.approx(decision.score, abs=1e-4)
    assert row["p_value"] == pytest.approx(decision.p_value, abs=1e-9)
    return True


def test_score_prints_a_table(bundle, images, paths, expected, capsys):
    assert run("score", images, "--detector", bundle) == 3
    printed = capsys.readouterr()
    head, *lines = printed.out.splitlines()
    assert head.split() == ["path", "label", "confidence", "score", "p-value", "verdict"]
    assert [line.split()[0] for line in lines] == [str(path) for path in paths]
    assert [line.split()[-1] for line in lines] == ["OOD" if each.is_ood else "InD" for each in expected]
    ood = sum(each.is_ood for each in expected)
    assert f"24 images: {24 - ood} InD, {ood} OOD (alpha 0.05, gated)" in printed.err


def test_score_prints_json_lines(bundle, paths, expected, capsys):
    assert run("score", *paths, "--detector", bundle, "--json") == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(same(*each) for each in zip(rows, paths, expected, strict=True))


def test_score_writes_files(bundle, images, paths, expected, tmp_path):
    kinds = {"parquet": tmp_path / "s.parquet", "csv": tmp_path / "s.csv", "json": tmp_path / "s.json"}
    for path in kinds.values():
        assert run("score", images, "--detector", bundle, "--output", path) == 3
    tables = {
        "parquet": pd.read_parquet(kinds["parquet"]).to_dict("records"),
        "json": json.loads(kinds["json"].read_text()),
    }
    for rows in tables.values():
        assert all(same(*each) for each in zip(rows, paths, expected, strict=True))
    with kinds["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [float(row["score"]) for row in rows] == pytest.approx([each.score for each in expected], abs=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.csv", "s.json", "s.parquet"]


def test_exit_code_0_if_all_are_in_distribution(bundle, paths, expected):
    ind = [path for path, each in zip(paths, expected, strict=True) if not each.is_ood]
    assert run("score", *ind, "--detector", bundle) == 0


def test_a_corrupt_image_loses_nothing_of_the_others(bundle, paths, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_files, "BATCH", 5)
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(paths[0].read_bytes()[:-30])
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    output = tmp_path / "scores.parquet"
    given = [*paths[:7], corrupt, empty, *paths[7:]]
    assert run("score", *given, "--detector", bundle, "--output", output, "--json") == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [str(corrupt), str(empty)]
    table = pd.read_parquet(output)
    assert list(table["path"]) == [str(path) for path in given]
    assert list(table[table["error"].notna()]["path"]) == [str(corrupt), str(empty)]
    good = table[table["error"].isna()].to_dict("records")
    assert all(same(*each) for each in zip(good, paths, expected, strict=True))
    assert len(printed.out.splitlines()) == len(given)


def test_a_file_name_that_is_not_utf8_loses_nothing(bundle, made, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(19):
        to_picture(made.new[0]).save(folder / f"{number:02}.png")
    path = folder / os.fsdecode(b"caf\xe9.png")
    to_picture(made.new[0]).save(path)
    shown = f"{folder}/caf\\udce9.png"
    for name in ("s.parquet", "s.csv", "s.json"):
        assert run("score", folder, "--detector", bundle, "--output", tmp_path / name) in (0, 3)
        assert shown in capsys.readouterr().out
    assert pd.read_parquet(tmp_path / "s.parquet")["path"].iloc[-1] == shown
    assert pd.read_csv(tmp_path / "s.csv")["path"].iloc[-1] == shown
    assert json.loads((tmp_path / "s.json").read_text())[-1]["path"] == shown
    assert run("explain", path, "--detector", bundle, "--output", tmp_path / "why.png") == 0
    assert capsys.readouterr().out.startswith(f"{shown}: ")
    assert run("calibrate", folder, "--detector", bundle, "--output", tmp_path / "new") == 0
    path.write_bytes(b"")
    assert run("score", folder, "--detector", bundle, "--output", tmp_path / "bad.csv") == 1
    assert "caf\\udce9.png: " in pd.read_csv(tmp_path / "bad.csv")["error"].iloc[-1]


def test_images_are_read_a_batch_at_a_time(paths, detector, monkeypatch):
    monkeypatch.setattr(image_files, "BATCH", 5)
    read = []
    prepare = detector.prepare
    monkeypatch.setattr(detector, "prepare", lambda picture, name: read.append(1) or prepare(picture, name))
    batches = image_files.batches(paths, detector)
    assert [path for path, _ in next(batches)] == paths[:5]
    assert len(read) == 5
    assert sum(len(batch) for batch in batches) == len(paths) - 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], "nowhere.png: no such file or folder"),
        (["{tmp}"], "{tmp}: no images in this folder"),
        (["{image}", "--threshold", "1"], "--threshold: goes with --classifier and --denoiser"),
        (["{image}", "--classifier", "c"], "each needs the other"),
        (["{image}", "--classifier", "c", "--denoiser", "d", "--json"], "goes without --detector, --output, --json"),
        (["{image}", "--detector", "{tmp}"], "{tmp}: no detector here (detector.json is missing)"),
        (["{image}", "--detector", "{bundle}", "--device", "abacus"], "--device abacus: not available on this machine"),
        (["{image}", "--detector", "{bundle}", "--output", "{tmp}/no/s.csv"], "{tmp}/no/s.csv: cannot be written"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments, words, bundle, paths, tmp_path):
    places = {"tmp": tmp_path, "image": paths[0], "bundle": bundle}
    code = run("score", *(each.format(**places) for each in arguments))
    assert code.startswith("error: ")
    assert words.format(**places) in code
    assert "\n" not in code


def test_the_command_line_itself_is_exit_code_2(bundle, paths, capsys):
    assert run("score", paths[0], "--output", "scores.xlsx") == 2
    assert "neither .parquet, .csv nor .json" in capsys.readouterr().err
    assert run("score") == 2
    assert run("explain", paths[0], "--output", "why.gif") == 2


def test_the_default_detector(bundle, paths, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(detector_option.VARIABLE, raising=False)
    assert "--detector: none is named" in run("score", paths[0])
    (tmp_path / "params.yaml").write_text("benchmark: tiny\n")
    assert run("score", paths[0]).endswith("or make it: dvc repro bundle")
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    (tmp_path / "data" / "tiny" / "detector").symlink_to(bundle)
    assert detector_option.find(None) == "data/tiny/detector"
    capsys.readouterr()
    assert run("score", paths[0]) in (0, 3)
    told = "detector: data/tiny/detector (of params.yaml's benchmark; --detector names another)"
    assert capsys.readouterr().err.splitlines()[0] == told
    monkeypatch.setenv(detector_option.VARIABLE, "models:/diffguard-tiny@champion")
    assert detector_option.find(None) == "models:/diffguard-tiny@champion"
    assert capsys.readouterr().err == f"detector: models:/diffguard-tiny@champion (by {detector_option.VARIABLE})\n"
    assert detector_option.find("elsewhere") == "elsewhere"
    assert capsys.readouterr().err == ""


def test_a_borrowed_environment_is_told_of(bundle, paths, tmp_path, monkeypatch, capsys):
    """In another clone of the project, whose code does not run."""
    (tmp_path / "diffguard").mkdir()
    (tmp_path / "diffguard" / "version.py").touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    run("score", paths[0].resolve(), "--detector", bundle.resolve())
    [line] = [line for line in capsys.readouterr().err.splitlines() if "make setup" in line]
    assert line.startswith(f"warning: this is the program of {ROOT}, not of {tmp_path};")
    monkeypatch.chdir(ROOT / "docs")
    run("score", paths[0].resolve(), "--detector", bundle.resolve())
    assert "make setup" not in capsys.readouterr().err


def test_explain_draws_why(bundle, paths, expected, detector, tmp_path, capsys):
    index = next(index for index, each in enumerate(expected) if each.is_ood)
    why = tmp_path / "why.png"
    assert run("explain", paths[index], "--output", why, "--detector", bundle) == 0
    assert f"{paths[index]}: OOD, taken for {expected[index].class_name} (" in capsys.readouterr().out
    drawn = detector.picture(detector.prepare(Image.open(paths[index])))
    with Image.open(why) as picture:
        assert picture.size == drawn.size
        assert np.abs(np.asarray(picture, int) - np.asarray(drawn, int)).mean() < 0.5
    assert "the image cannot be read" in run("explain", bundle / "detector.json", "--output", why, "--detector", bundle)


def test_calibrate_makes_a_bundle_that_keeps_its_promise(bundle, detector, made, tmp_path, capsys):
    from small_detector import pictures

    folder = tmp_path / "ind"
    folder.mkdir()
    new = pictures(70, 11)
    for number, image in enumerate(new):
        to_picture(image).save(folder / f"{number:02}.png")
    output = tmp_path / "detector"
    assert run("calibrate", folder, "--detector", bundle, "--output", output, "--accept", "0.9") == 0
    assert f"{output}: gated, calibrated on 70 images; alpha 0.1" in capsys.readouterr().out
    changed = load_bundle(output, "cpu")
    assert changed.alpha == pytest.approx(0.1)
    assert len(changed.calibration) == 70
    # Its scores are those of the same models: the rows behind it agree with the old detector's on these images.
    _, members = detector.member_scores(new)
    kept = {name for name in detector.calibration.columns if not name.startswith("score/")}
    assert set(changed.calibration.columns) == kept | {changed.column(name) for name in members}
    for name, scores in members.items():
        column = changed.calibration[changed.column(name)].to_numpy()
        assert np.abs(column - scores).max() < 1e-4
    # Of new images about the promised share is rejected, as one calibration set of 70 images lets it vary.
    rejected = sum(each.is_ood for each in changed.decide(pictures(60, 150)))
    assert betabinom.ppf(0.005, 150, 7, 64) <= rejected <= betabinom.ppf(0.995, 150, 7, 64)
    assert "is there already" in run("calibrate", folder, "--detector", bundle, "--output", output)


def test_calibrate_looks_where_it_is_to_write_before_all_the_work(bundle, paths, monkeypatch):
    monkeypatch.setattr(detector_option, "open_selected", lambda options: pytest.fail("work was begun"))
    said = run("calibrate", *paths, "--detector", bundle, "--output", "/proc/new/detector")
    assert said == "error: /proc/new/detector: cannot be written (No such file or directory); name another folder"


def test_calibrate_refuses_what_it_cannot_promise(bundle, paths, tmp_path):
    output = tmp_path / "detector"
    few = run("calibrate", *paths[:5], "--detector", bundle, "--output", output)
    assert "calibration images" in few
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(b"")
    assert f"{corrupt}: the image cannot be read" in run(
        "calibrate", *paths, corrupt, "--detector", bundle, "--output", output
    )
    assert "--accept: 2 is not between 0 and 1" in run(
        "calibrate", *paths, "--detector", bundle, "--output", output, "--accept", "2"
    )
    assert not output.exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--timeout", "nan", "--timeout: nan is not above 0 and at most 86,400 seconds"),
        ("--timeout", "inf", "--timeout: inf is not above 0"),
        ("--timeout", "0", "--timeout: 0 is not above 0"),
        ("--max-megabytes", "nan", "--max-megabytes: nan is not a finite number above 0"),
        ("--max-megabytes", "inf", "--max-megabytes: inf is not a finite number above 0"),
        ("--max-megabytes", "-1", "--max-megabytes: -1 is not a finite number above 0"),
        ("--max-total-pixels", "0", "max_total_pixels"),
    ],
)
def test_serve_refuses_limits_that_are_none(bundle, option, value, words):
    message = run("serve", "--detector", bundle, option, value)
    assert message.startswith("error: ")
    assert words in message
    assert "\n" not in message
