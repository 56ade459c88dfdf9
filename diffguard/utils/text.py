"""Text: of messages, and of files that people write."""

from pathlib import Path

from diffguard.errors import DataError


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says; of one that says nothing, its kind.

    Example:
        >>> first_line(ValueError("no such key\nTraceback ...")), first_line(EOFError())
        ('no such key', 'EOFError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8; the message names the byte. FileNotFoundError: it is not there.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: not UTF-8: byte {error.start} (0x{content[error.start]:02x}, in line {line}); save it as UTF-8"
        ) from None
