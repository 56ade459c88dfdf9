"""The code that the pages show: commands are taken by the real parsers, Python blocks run or at least resolve."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import logging
import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from small_detector import tiny_classifier, tiny_denoiser

from diffguard.cli.main import main as diffguard_main
from diffguard.images import to_picture
from diffguard.models.classifiers.files import save_classifier
from diffguard.models.denoisers.loading import save_denoiser
from tasks.config.project import ROOT

INLINE = re.compile(r"`((?:diffguard|make|dvc|python|prefect) [^`\n]+)`")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
VARIABLES = set(re.findall(r"^(\w+) \?=", MAKEFILE, re.MULTILINE))


class ParsedError(Exception):
    """The options were taken; nothing ran."""


@pytest.fixture
def parses_only(monkeypatch):
    """Every parser ends the command after it has taken the options."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments, **keywords):
        parse(self, *arguments, **keywords)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.chdir(ROOT)


def commands(page):
    """Command lines of a page's blocks, without comments."""
    for block in page.blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def check(words, monkeypatch):
    """Give a command to the parser that would take it.

    Raises:
        SystemExit, AssertionError, ModuleNotFoundError: it would not be taken.
    """
    while "=" in words[0]:  # a variable of the environment
        words = words[1:]
    if words[0] == "nice":
        words = words[3:]
    program, *given = words
    if program == "diffguard":
        with contextlib.suppress(ParsedError):
            diffguard_main(given)
            raise AssertionError("no parser took it")
    elif program == "python":
        check_python(given, monkeypatch)
    elif program == "make":
        check_make(given, monkeypatch)
    elif program == "dvc":
        from dvc.cli.parser import get_main_parser

        # Its handlers write to a stream that an earlier test may have closed.
        monkeypatch.setattr(logging.getLogger("dvc"), "disabled", True)
        monkeypatch.setattr(logging.getLogger("dvc.cli.parser"), "disabled", True)
        with contextlib.suppress(ParsedError):
            get_main_parser().parse_args(given)
    elif words[:3] == ["prefect", "deployment", "run"]:
        listed = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
        deployment = next((each for each in listed if f"diffguard/{each['name']}" == words[3]), None)
        assert deployment is not None, words[3]
        parameters = [value.partition("=")[0] for flag, value in pairwise(words) if flag == "-p"]
        assert set(parameters) <= set(deployment["parameters"])
    elif program == "prefect":
        from prefect.cli._app import _app

        _app.parse_args(given, print_error=False, exit_on_error=False)
    elif "/" in program:
        assert (ROOT / program).is_file(), program
    else:
        assert program in ("source", "export", "git", "mlflow"), program


def check_python(given, monkeypatch):
    if given[0] == "-m":
        spec = importlib.util.find_spec(given[1])
        assert spec is not None, given[1]
        file, options = Path(spec.origin), given[2:]
        module = given[1]
    else:
        file, options, module = ROOT / given[0], given[1:], None
    assert file.is_file(), file
    monkeypatch.setattr(sys, "argv", [str(file), *options])
    if "ArgumentParser" not in file.read_text(encoding="utf-8"):
        return
    with contextlib.suppress(ParsedError):
        if module is not None:
            importlib.import_module(module).main()
        else:
            runpy.run_path(str(file), run_name="__main__")
        raise AssertionError("no parser took it")


def check_make(given, monkeypatch):
    variables = dict(word.split("=", 1) for word in given if "=" in word)
    targets = {word for word in given if "=" not in word}
    assert targets <= TARGETS
    assert set(variables) <= VARIABLES
    if targets == {"evaluate"}:
        check_python(["-m", "flows.evaluate", *shlex.split(variables.get("OPTIONS", ""))], monkeypatch)


def test_commands_of_blocks_are_taken(page, parses_only, monkeypatch):
    for words in commands(page):
        try:
            check(words, monkeypatch)
        except SystemExit as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


def test_commands_of_text_exist(page, parses_only, monkeypatch):
    """Text names a command without what it needs, so that only its name is looked at."""
    if page.name == "CHANGELOG.md":
        pytest.skip("it names what there was")
    for line in INLINE.findall(page.prose):
        words = shlex.split(line)
        if re.search("[<{…]", line) or "scripts/" in line:  # a placeholder, or another project's
            continue
        if words[0] == "diffguard":
            diffguard_help(words[1])
        elif words[0] == "make":
            check_make(words[1:], monkeypatch)
        elif words[0] == "python":
            found = importlib.util.find_spec(words[2]) if words[1] == "-m" else (ROOT / words[1]).is_file()
            assert found, line


def diffguard_help(name):
    with pytest.raises(SystemExit) as end:
        diffguard_main([name, "--help"])
    assert end.value.code == 0, name


@pytest.mark.parametrize(
    "line",
    [
        "diffguard scores image.png",
        "diffguard recalibrate folder --outputs x",
        "diffguard doctor --folder x",
        "python -m flows.evaluate --varied cfg-w1",
        "python -m flows.evaluates",
        "python experiments/no_such.py",
        "python experiments/steps.py --no-such",
        "make benchmark",
        "make evaluate BENCHMARKS=digits",
        "make evaluate OPTIONS='--varied x'",
        "dvc metrics shows",
        "prefect deployment run diffguard/score",
        "prefect deployment run diffguard/evaluate -p images=5",
        "experiments/gpu/go.sh",
        "mlfow ui",
    ],
)
def test_a_wrong_command_is_found(line, parses_only, monkeypatch, capsys):
    from dvc.cli.parser import DvcParserError

    with pytest.raises((SystemExit, AssertionError, ModuleNotFoundError, DvcParserError)):
        check(shlex.split(line), monkeypatch)


def test_python_blocks_compile_and_their_imports_resolve(page):
    for block in page.blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}: {name.name}"


def test_python_blocks_on_digits_run(page, tmp_path, monkeypatch, capsys):
    """On small models and images of random numbers, where the blocks expect those of a finished run."""
    blocks = [block for block in page.blocks("python") if "data/digits/" in block]
    if not blocks:
        pytest.skip("no such block")
    models = tmp_path / "data/digits/models/seed-0"
    (models / "ordinary").mkdir(parents=True)
    save_classifier(tiny_classifier(), models / "ordinary" / "model.safetensors")
    save_denoiser(tiny_denoiser(), models / "denoiser")
    for dataset in ("digits-0-5", "digits-6-8", "letters"):
        folder = tmp_path / "data/digits/images" / dataset / "test"
        folder.mkdir(parents=True)
        to_picture(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))).save(folder / "00000.png")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
    assert "tensor([" in capsys.readouterr().out


FOLDERS = "diffguard|tasks|flows|experiments|tests|docs|mlflow|data/benchmarks"
NAMED_FILE = re.compile(rf"`((?:{FOLDERS})/(?:[\w./-]+\.\w+|[\w./-]*/)?)`")


def test_files_that_pages_name_exist(page):
    missing = [name for name in NAMED_FILE.findall(page.prose) if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []
