"""A study as a stage of DVC."""

from tasks.common.console import run_stage
from tasks.studies.stage import main

run_stage(main)
