"""Names as people read them, of labels and of files."""

from collections.abc import Sequence
from pathlib import Path


def label_name(classes: Sequence[str], label: int) -> str:
    """The name of a label; of one beyond the classes, which a classifier may know, "label <number>".

    Example:
        >>> label_name(["cat", "dog"], 1), label_name(["cat", "dog"], 7)
        ('dog', 'label 7')
    """
    return classes[label] if label < len(classes) else f"label {label}"


def readable(name: str | Path) -> str:
    r"""The name of a file, or text with one in it, as UTF-8 can hold it: a byte of another encoding is escaped.

    Example:
        >>> import os
        >>> print(readable(os.fsdecode(b"caf\xe9.png")))
        caf\udce9.png
    """
    return str(name).encode("utf-8", "backslashreplace").decode()


def in_a_line(name: str | Path) -> str:
    r"""`readable`, with control characters escaped, for a line of text.

    Example:
        >>> print(in_a_line("a\nb.png"))
        a\nb.png
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in readable(name))
