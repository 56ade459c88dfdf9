"""Prefect flows: the order of tasks, and nothing else."""

import atexit
import os
import sys
import warnings

from diffguard.utils.threads import set_wait_policy

set_wait_policy()  # before a flow imports torch

ended_with: list[int] = []
"""The exit code of a program that a signal has ended."""


@atexit.register  # before anything else has been imported, so that it is called when all others have been
def _leave() -> None:
    """End at once: Python would first walk through all of torch for garbage, which takes seconds."""
    if ended_with:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended_with[0])


# `flows.start.check_prefect` says so in one line, with what to do.
warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
