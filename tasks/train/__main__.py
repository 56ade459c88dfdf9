from tasks.common.console import run_stage
from tasks.train.command import command

run_stage(command)
