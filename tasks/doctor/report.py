"""The report of `diffguard doctor`: a line for each check."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from diffguard.errors import DiffGuardError
from diffguard.utils.names import readable


@dataclass
class Report:
    """Prints a line for each check, and counts the problems."""

    problems: int = 0

    def line(self, mark: str, subject: str, text: str) -> None:
        print(f"{mark:5} {subject:9} {readable(text)}", flush=True)

    @contextmanager
    def check(self, subject: str) -> Iterator[Callable[[str], None]]:
        """Yield a function that prints a passed check; a DiffGuardError counts as a problem, and the checks go on."""
        try:
            yield lambda text: self.line("ok", subject, text)
        except DiffGuardError as error:
            self.problems += 1
            self.line("FAIL", subject, str(error))
