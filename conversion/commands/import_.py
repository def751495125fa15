"""`armt import`."""

import argparse
from pathlib import Path


HELP = "turn a checkpoint of the ARMT authors into one that loads anywhere"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="file or folder of the authors' checkpoint")
    parser.add_argument("--backbone", required=True, help="folder or Hub id of the model it was made from")
    parser.add_argument("--segment-size", type=int, required=True, help="tokens in a segment, as it was trained")
    parser.add_argument(
        "--variant", choices=["v2", "paper"], required=True, help="paper: code of 2024-08; v2: any later"
    )
    parser.add_argument("--no-correction", action="store_true", help="it was trained without the correction gamma")
    parser.add_argument("--no-denom", action="store_true", help="it was trained without denominators")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..importing import import_checkpoint

    import_checkpoint(
        args.checkpoint,
        args.backbone,
        args.out,
        segment_size=args.segment_size,
        variant=args.variant,
        correction=not args.no_correction,
        use_denom=not args.no_denom,
    )
    Console(stderr=True, markup=False).print(
        f"{args.out} is ready: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
    )
