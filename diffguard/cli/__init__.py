"""The subcommands of `diffguard`, one module each: `add` declares the options, `run` executes the command.

Modules that need torch are imported when a command runs, so that --help is quick.
"""
