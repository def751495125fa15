"""`armt card`."""

import argparse
from pathlib import Path

from .publish import add_card_arguments


HELP = "write a checkpoint's model card without publishing it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="an ARMT checkpoint, or an adapter on one")
    parser.add_argument("--out", type=Path, help="file to write (default: print the card)")
    add_card_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from ..publishing.card import card_of, write_card

    options = vars(args)
    out = options.pop("out")
    card = card_of(**options)
    if out is None:
        print(card)
    else:
        write_card(card, out)
