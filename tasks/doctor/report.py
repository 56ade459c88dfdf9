"""A line for each thing that was looked at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from diffguard.errors import DiffGuardError
from diffguard.utils.names import readable


@dataclass
class Report:
    """Prints a line for each thing that was seen to, and counts what is wrong."""

    problems: int = 0

    def line(self, mark: str, subject: str, text: str) -> None:
        print(f"{mark:5} {subject:9} {readable(text)}", flush=True)

    @contextmanager
    def seeing_to(self, subject: str) -> Iterator[Callable[[str], None]]:
        """Yields what to call with what was found; an error of ours is a problem, and the next thing follows."""
        try:
            yield lambda text: self.line("ok", subject, text)
        except DiffGuardError as error:
            self.problems += 1
            self.line("FAIL", subject, str(error))
