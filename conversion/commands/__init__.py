"""
The verbs of the `armt` command, one a file. Each has `HELP`, `add_arguments(parser)` and `run(args)`; what takes long
to import is imported in `run`, so that `--help` and usage errors answer at once.
"""
