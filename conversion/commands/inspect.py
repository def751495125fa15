"""`armt inspect`."""

import argparse
from pathlib import Path

from .generate import read_text


HELP = "show on an HTML page what a memory does on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="folder or Hub id of an ARMT checkpoint, or of an adapter on one")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text file")
    parser.add_argument("--out", type=Path, default=Path("inspect.html"), help="the page (default inspect.html)")
    parser.add_argument("--layers", type=int, nargs="+", metavar="I", help="layers whose weights are shown")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ..inspecting.page import inspect_text

    bars = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="token", desc="reading", leave=False))
        bars[0].update(done - bars[0].n)

    try:
        found = inspect_text(args.model, read_text(args.text), args.out, args.layers, args.text.name, progress)
    finally:
        for bar in bars:
            bar.close()
    print(f"{args.out} shows {len(found.ids):,} tokens in {found.segments:,} segments.")
