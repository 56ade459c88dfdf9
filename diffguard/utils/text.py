"""Text of messages."""


def first_line(error: BaseException) -> str:
    r"""The first line of what an error says; of one that says nothing, its kind.

    Example:
        >>> first_line(ValueError("no such key\nTraceback ...")), first_line(EOFError())
        ('no such key', 'EOFError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
