"""The command `diffguard`: its subcommands are modules beside this one, and some come from the project around."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from diffguard.cli import convert, explain, recalibrate, score, serve
from diffguard.errors import DiffGuardError, SettingError
from diffguard.version import __version__

COMMANDS = {"score": score, "explain": explain, "recalibrate": recalibrate, "serve": serve, "convert": convert}
FORMER_NAMES = {"calibrate": "recalibrate"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that the user can mend is one line and exit code 1."""
    parser = argparse.ArgumentParser(prog="diffguard", description="Out-of-distribution detection for classifiers.")
    parser.add_argument("--version", action="version", version=f"diffguard {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        aliases = [former for former, now in FORMER_NAMES.items() if now == name]
        module.add(commands.add_parser(name, aliases=aliases, help=module.HELP, description=module.__doc__))
    given = sys.argv[1:] if arguments is None else list(arguments)
    project = {entry.name: entry for entry in entry_points(group="diffguard.commands")}
    for name in project:
        commands.add_parser(name, help="of the project around the library: run it in its folder")
    try:
        if given and given[0] in project:
            code = _project_command(project[given[0]])(given[1:])
        else:
            options = parser.parse_args(given)
            code = COMMANDS[FORMER_NAMES.get(options.command, options.command)].run(options)
    except DiffGuardError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        # Who reads the output, as `head`, has seen enough; nothing more is to be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _project_command(entry: EntryPoint) -> Callable[[Sequence[str]], int]:
    """A command that comes with the project around the library."""
    try:
        command: Callable[[Sequence[str]], int] = entry.load()
    except ImportError as error:
        raise SettingError(f"diffguard {entry.name}: run it in the project's folder ({error})") from None
    return command


if __name__ == "__main__":
    main()
