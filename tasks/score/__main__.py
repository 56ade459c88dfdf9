from tasks.common.console import run_stage
from tasks.score.stage import main

run_stage(main)
