"""`armt merge`."""

import argparse
from pathlib import Path


HELP = "fold an adapter into its base: one full checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of an adapter on an ARMT checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..merging import merge_adapter

    merge_adapter(args.adapter, args.out)
    Console(stderr=True, markup=False).print(f"{args.out} is a full checkpoint with the logits that the adapter gave.")
