"""Names of labels and files for display."""

from collections.abc import Sequence
from pathlib import Path


def label_name(classes: Sequence[str], label: int) -> str:
    """Return the name of a label, or "label <number>" for one that the classifier has and the class list has not.

    Example:
        >>> label_name(["cat", "dog"], 1), label_name(["cat", "dog"], 7)
        ('dog', 'label 7')
    """
    return classes[label] if label < len(classes) else f"label {label}"


def readable(name: str | Path) -> str:
    r"""Return a file name, or text that contains one, as valid UTF-8: undecodable bytes are escaped.

    Example:
        >>> import os
        >>> print(readable(os.fsdecode(b"caf\xe9.png")))
        caf\udce9.png
    """
    return str(name).encode("utf-8", "backslashreplace").decode()


def in_a_line(name: str | Path) -> str:
    r"""Return `readable` text with control characters escaped, so that it stays in one line.

    Example:
        >>> print(in_a_line("a\nb.png"))
        a\nb.png
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in readable(name))
