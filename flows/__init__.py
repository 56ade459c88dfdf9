"""Prefect flows: the order of tasks, and nothing else."""

import warnings

# `flows.start.check_prefect` says so in one line, with what to do.
warnings.filterwarnings("ignore", "Failed to create the Prefect home directory")
