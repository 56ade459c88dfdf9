"""The command `diffguard`. Its subcommands are modules of this package; a project adds its own by entry points."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from diffguard.cli import convert, explain, recalibrate, score, serve
from diffguard.errors import DiffGuardError, SettingError
from diffguard.utils.threads import set_wait_policy
from diffguard.version import __version__

COMMANDS = {"score": score, "explain": explain, "recalibrate": recalibrate, "serve": serve, "convert": convert}
FORMER_NAMES = {"calibrate": "recalibrate"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; an error that the user can correct is one line and exit code 1."""
    set_wait_policy()
    parser = argparse.ArgumentParser(prog="diffguard", description="Out-of-distribution detection for classifiers.")
    parser.add_argument("--version", action="version", version=f"diffguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        aliases = [former for former, current in FORMER_NAMES.items() if current == name]
        module.add(commands.add_parser(name, aliases=aliases, help=module.HELP, description=module.__doc__))
    words = sys.argv[1:] if arguments is None else list(arguments)
    project = {entry.name: entry for entry in entry_points(group="diffguard.commands")}
    for name in project:
        commands.add_parser(name, help="a command of the project; run it in the project's folder")
    try:
        if words and words[0] in project:
            code = _project_command(project[words[0]])(words[1:])
        else:
            options = parser.parse_args(words)
            code = COMMANDS[FORMER_NAMES.get(options.command, options.command)].run(options)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; without this, Python would fail to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _project_command(entry: EntryPoint) -> Callable[[Sequence[str]], int]:
    """Load a command of the project."""
    try:
        command: Callable[[Sequence[str]], int] = entry.load()
    except ImportError as error:
        raise SettingError(f"diffguard {entry.name}: run it in the project's folder ({error})") from None
    return command


if __name__ == "__main__":
    main()
