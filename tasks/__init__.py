"""One module a pipeline stage: read files, call diffguard, write files."""

from diffguard.utils.threads import set_wait_policy

set_wait_policy()  # before a stage imports torch
