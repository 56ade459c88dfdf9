from tasks.common.console import run_stage
from tasks.prepare.stage import main

run_stage(main)
