"""`armt demo`."""

import argparse
from pathlib import Path


HELP = "the whole way on an embedded backbone, in minutes on two CPU cores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("armt-demo"), help="folder to write (default armt-demo)")


def run(args: argparse.Namespace) -> None:
    from ..demo.demonstration import run_demo

    run_demo(args.out)
