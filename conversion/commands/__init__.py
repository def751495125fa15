"""
The verbs of the `armt` command, one a file. Each has `HELP`, `add_arguments(parser)` and `run(args)`; what takes long
to import is imported in `run`, so that `--help` and usage errors answer at once.
"""

from contextvars import ContextVar


COMMAND_LINE: ContextVar[str] = ContextVar("armt_command_line", default="armt")
"""The command line that is being run, for the records of what it does."""
