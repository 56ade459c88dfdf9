"""A command is quick to start, by what it does not import, and to end, with all that is due at the end."""

import subprocess
import sys

import pytest

from diffguard.images import to_picture

NOT_FOR_HELP = {"torch", "numpy", "pandas", "pydantic", "yaml", "PIL"}
NOT_FOR_SCORING = {"pytorch_ood", "pytorch_grad_cam", "sklearn", "matplotlib", "piq", "mlflow", "prefect", "timm"}
"""Diffusers imports the rest: torch._dynamo, and with the extra "models" transformers, which imports torchvision."""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


IMPORTED = """if True:
    import sys
    from diffguard.cli.main import main

    try:
        main(sys.argv[1:])
    finally:
        print("imported:", *sys.modules)
"""


def imported(*arguments):
    done = run(IMPORTED, *arguments)
    lines = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert lines, done.stderr
    return done, set(lines[0].split()[1:])


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_no_more_than_itself(option):
    done, modules = imported(option)
    assert done.returncode == 0
    assert not NOT_FOR_HELP & modules


@pytest.fixture(scope="module")
def variant_bundle(made, tmp_path_factory):
    """A bundle without a baseline, beside one of the images."""
    from diffguard.deploy.bundle import save_bundle

    detector = made.detector("adaptive")
    detector.seen = {}
    detector.info = detector.info.model_copy(update={"baselines": {}, "combine": {}, "combined": {}})
    folder = tmp_path_factory.mktemp("variant")
    save_bundle(detector, folder / "bundle")
    to_picture(made.new[0]).save(folder / "image.png")
    return folder


def test_scoring_under_a_variant_imports_no_baselines(variant_bundle):
    done, modules = imported("score", variant_bundle / "image.png", "--detector", variant_bundle / "bundle")
    assert done.returncode in (0, 3), done.stderr
    assert "torch" in modules
    assert not NOT_FOR_SCORING & modules


AT_THE_END = """if True:
    import atexit, sys, threading, time
    from diffguard.cli.main import main

    class Freed:
        def __del__(self):
            print("freed")

    kept = Freed()
    main_ended = threading.Event()
    threading.Thread(target=lambda: (main_ended.wait(), time.sleep(0.2), print("thread"))).start()
    try:
        main()
    finally:
        atexit.register(lambda: print("exit function"))
        main_ended.set()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["--version"], 0, ""),
        (["explain"], 2, "the following arguments are required"),
        (["score", "no.png", "--detector", "no"], 1, "error: no.png:"),
    ],
)
def test_a_process_ends_at_once_with_what_is_due(arguments, code, error):
    """Threads are waited for, exit functions called, what was printed is there; objects are not freed."""
    done = run(AT_THE_END, *arguments)
    assert done.returncode == code, done.stderr
    assert error in done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["thread", "exit function"]


def test_a_crash_ends_as_always():
    code = "from diffguard.cli.process import ending_at_once\nwith ending_at_once():\n    1 / 0"
    done = run(code)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_a_decision_ends_with_its_code(variant_bundle):
    paths = (variant_bundle / "image.png", "--detector", variant_bundle / "bundle")
    done = run("from diffguard.cli.main import main; main()", "score", *paths)
    verdict = done.stdout.split()[-1]
    assert done.returncode == {"InD": 0, "OOD": 3}[verdict]
    # Nothing is reported as leaked.
    assert len(done.stderr.splitlines()) == 1


def test_a_process_that_goes_on_collects_again_and_frees_all(variant_bundle):
    code = """if True:
        import atexit, gc, sys
        from diffguard.cli.main import main

        atexit.register(lambda: print("collects:", gc.isenabled(), "frozen:", gc.get_freeze_count()))
        main(sys.argv[1:])
    """
    done = run(code, "score", variant_bundle / "image.png", "--detector", variant_bundle / "bundle")
    assert done.stdout.splitlines()[-1] == "collects: True frozen: 0"
    # Nothing is reported as leaked.
    assert len(done.stderr.splitlines()) == 1
