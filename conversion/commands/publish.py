"""`armt publish`."""

import argparse
from pathlib import Path


HELP = "put a checkpoint or an adapter on the Hub, in one commit, with its card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="an ARMT checkpoint, or an adapter on one")
    parser.add_argument("repository", metavar="REPO", help="user/name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="if the repository is made, make it private")
    parser.add_argument("--revision", help="branch to commit to (default main); made if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show it, and upload nothing")
    add_card_arguments(parser)


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    """What a card needs where the checkpoint does not say it."""
    parser.add_argument("--results", type=Path, help="folder that `armt evaluate` wrote (default: DIR itself)")
    parser.add_argument(
        "--base", help="Hub id of the backbone; for an adapter that of its ARMT base, user/name[@revision]"
    )
    parser.add_argument("--license", help="of the backbone, as the Hub writes it (default: what its card says)")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..publishing.publish import publish

    publication = publish(**vars(args))
    console = Console(stderr=True, markup=False)
    if publication.commit is None:
        table = Table("file", "bytes", title=f"would be in {args.repository}, in one commit")
        table.columns[1].justify = "right"
        for name, size in publication.files.items():
            table.add_row(name, f"{size:,}")
        Console(markup=False).print(table)
    else:
        console.print(
            f"{args.repository} is published at {publication.commit} (tag {publication.tag}): "
            f"{len(publication.files)} files in one commit. A fresh process without this package loaded it by that "
            "revision and found the same logits."
        )
    if publication.left:
        console.print(f"Not part of a checkpoint, and left here: {', '.join(publication.left)}")
