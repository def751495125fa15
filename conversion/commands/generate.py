"""`armt generate`."""

import argparse
from pathlib import Path


HELP = "read a prompt of any length and go on with it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of an ARMT checkpoint, or of an adapter on one")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text itself")
    prompt.add_argument("--prompt-file", type=Path, help="a UTF-8 text file; the newline that ends it is left off")
    prompt.add_argument("--prompt-ids", type=Path, metavar="F", help="a .npy file of token ids, mapped, not loaded")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="0 only reads (default 100)")
    parser.add_argument(
        "--save-memory", type=Path, metavar="F", help="save what was read, before anything is generated"
    )
    parser.add_argument("--load-memory", type=Path, metavar="F", help="start from a saved memory")


def run(args: argparse.Namespace) -> None:
    from ..generate import generate

    # The newline that editors put at the end is not the text's, and ends what a model shall go on with.
    prompt = args.prompt if args.prompt_file is None else read_text(args.prompt_file).removesuffix("\n")
    generate(args.model, prompt, args.max_new_tokens, args.save_memory, args.load_memory, args.prompt_ids)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
