from tasks.common.console import run_stage
from tasks.evaluate.stage import main

run_stage(main)
