"""Text of error messages, and of files that users write."""

from pathlib import Path

from diffguard.errors import DataError


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or the name of its class if the message is empty.

    Example:
        >>> first_line(ValueError("no such key\nTraceback ...")), first_line(EOFError())
        ('no such key', 'EOFError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file; a byte-order mark is removed.

    Raises:
        DataError: the file cannot be read, or is not UTF-8; the message names the first wrong byte and its line.
        FileNotFoundError: there is no such file.
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
