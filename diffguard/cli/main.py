"""The command `diffguard`. Its subcommands are modules of this package; a project adds its own by entry points."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NoReturn

import diffguard
from diffguard.cli.process import ending_at_once
from diffguard.errors import DiffGuardError, SettingError
from diffguard.utils.threads import set_wait_policy
from diffguard.version import __version__

COMMANDS = {
    "score": "decide on image files: in-distribution or OOD",
    "explain": "draw why: input, reconstruction, difference, CAM, verdict",
    "recalibrate": "recalibrate a detector on new in-distribution images",
    "serve": "serve a detector over HTTP",
    "convert": "write a published checkpoint as a folder in Diffusers' layout",
}
"""What each does, by the name of its module, of which only the one that is called is imported."""

FORMER_NAMES = {"calibrate": "recalibrate"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; an error that the user can correct is one line and exit code 1.

    Args:
        arguments: None: those of this process, which then ends without freeing its objects.
    """
    set_wait_policy()
    if warning := _borrowed():
        print(warning, file=sys.stderr)
    if arguments is None:
        with ending_at_once():
            _run(sys.argv[1:])
    else:
        _run(list(arguments))


def _run(words: list[str]) -> NoReturn:
    parser = argparse.ArgumentParser(prog="diffguard", description="Out-of-distribution detection for classifiers.")
    parser.add_argument("--version", action="version", version=f"diffguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    first = next((word for word in words if not word.startswith("-")), "")
    called = FORMER_NAMES.get(first, first)
    for name, text in COMMANDS.items():
        aliases = [former for former, current in FORMER_NAMES.items() if current == name]
        command = commands.add_parser(name, aliases=aliases, help=text)
        if name == called:
            module = import_module(f"diffguard.cli.{name}")
            command.description = module.__doc__
            module.add(command)
    # Only if need be: it reads the metadata of all installed distributions.
    project = {} if called in COMMANDS else {entry.name: entry for entry in entry_points(group="diffguard.commands")}
    for name in project:
        commands.add_parser(name, help="a command of the project; run it in the project's folder")
    try:
        if words and words[0] in project:
            code = _project_command(project[words[0]])(words[1:])
        else:
            options = parser.parse_args(words)
            code = module.run(options)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; without this, Python would fail to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _borrowed() -> str | None:
    """Warn of an environment with another copy of the project installed: its code would run in silence."""
    installed = Path(diffguard.__file__).resolve().parents[1]
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "diffguard" / "version.py").is_file():
            if folder.resolve() == installed:
                return None
            return (
                f"warning: this is the program of {installed}, not of {folder}; that folder has one of its own after: "
                "make setup"
            )
    return None


def _project_command(entry: EntryPoint) -> Callable[[Sequence[str]], int]:
    """Load a command of the project."""
    try:
        command: Callable[[Sequence[str]], int] = entry.load()
    except ImportError as error:
        raise SettingError(f"diffguard {entry.name}: run it in the project's folder ({error})") from None
    return command


if __name__ == "__main__":
    main()
