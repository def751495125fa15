"""`armt refresh`."""

import argparse


HELP = "put this version's code into a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR|USER/NAME", help="an ARMT checkpoint, here or on the Hub")
    parser.add_argument(
        "--force",
        action="store_true",
        help="also if somebody has changed its code, or if that gives other logits than this version's",
    )


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..publishing.refresh import refresh

    done = refresh(args.checkpoint, args.force)
    at = f" at {done.commit}, in one commit" if done.commit else ""
    if done.before == done.after:
        said = "has this version's code already; nothing was changed."
    else:
        said = f"has the code of version {done.after}{at}; before it had {done.before}. Its weights are as they were."
    Console(stderr=True, markup=False).print(f"{args.checkpoint} {said}")
