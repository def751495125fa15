"""`armt generate`."""

import argparse
from pathlib import Path


HELP = "read a prompt of any length and go on with it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of an ARMT checkpoint")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text itself")
    prompt.add_argument("--prompt-file", type=Path, help="a UTF-8 text file")
    prompt.add_argument("--prompt-ids", type=Path, metavar="F", help="a .npy file of token ids, mapped, not loaded")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="0 only reads (default 100)")
    parser.add_argument(
        "--save-memory", type=Path, metavar="F", help="save what was read, before anything is generated"
    )
    parser.add_argument("--load-memory", type=Path, metavar="F", help="start from a saved memory")


def run(args: argparse.Namespace) -> None:
    from ..generate import generate

    prompt = read_text(args.prompt_file) if args.prompt_file is not None else args.prompt
    generate(args.model, prompt, args.max_new_tokens, args.save_memory, args.load_memory, args.prompt_ids)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
