"""The library's version, and that of its scores' arithmetic."""

__version__ = "0.1.0"

METHOD_VERSION = 4
"""Raised whenever the arithmetic of a score changes, so that old scores are not taken for new ones."""
