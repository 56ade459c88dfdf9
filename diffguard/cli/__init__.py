"""The subcommands of `diffguard`, a module each: `add` declares its options, `run` does it.

What needs torch is imported when a command runs, so that --help is quick.
"""
