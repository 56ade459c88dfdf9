"""The endpoint: a detector behind HTTP."""
