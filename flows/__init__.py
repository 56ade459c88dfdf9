"""Prefect flows: the order of tasks, and nothing else."""

import warnings

from diffguard.utils.threads import set_wait_policy

set_wait_policy()  # before a flow imports torch

# `flows.start.check_prefect` says so in one line, with what to do.
warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
