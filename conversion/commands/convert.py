"""`armt convert`."""

import argparse
from pathlib import Path


HELP = "turn a pretrained decoder into an ARMT checkpoint"


class _Instead(argparse.Action):
    """A flag that does without another, required argument."""

    def __init__(self, *args, of: argparse.Action, **kwargs):
        super().__init__(*args, nargs=0, default=False, **kwargs)
        self.other = of

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, True)
        self.other.required = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backbone", help="folder or Hub id of the decoder")
    out = parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--dry-run",
        action=_Instead,
        of=out,
        help="load and write nothing; say how large the model would be and whether it fits this machine",
    )
    parser.add_argument("--segment-size", type=int, default=1024, help="tokens in a segment (default 1024)")
    parser.add_argument("--num-mem-tokens", type=int, default=16, help="memory tokens of a segment (default 16)")
    parser.add_argument("--d-mem", type=int, default=64, help="width of memory queries and keys (default 64)")
    parser.add_argument("--variant", choices=["v2", "paper"], default="v2", help="formula of the memory (default v2)")
    parser.add_argument(
        "--no-correction",
        dest="correction",
        action="store_false",
        help="without the correction gamma, so that what is written again adds up, for comparison",
    )
    parser.add_argument(
        "--memory-norm", action="store_true", help="normalise what the memory's projections get (default: as it is)"
    )
    parser.add_argument(
        "--spread-memory-tokens",
        action="store_true",
        help="give memory tokens positions all over their segment (default: behind it)",
    )
    parser.add_argument(
        "--memory-layers", type=int, nargs="+", metavar="I", help="layers that get a memory (default: all)"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the backbone's weights (default: as they are)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fresh memories (default 0)")


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    from ..convert import convert
    from ..planning import plan

    options = vars(args)
    if options.pop("dry_run"):
        del options["seed"]
        print(plan(**options))
        return
    config = convert(**options).config
    Console(stderr=True, markup=False).print(
        f"{args.out} reads segments of {config.segment_size} tokens with {config.num_mem_tokens} memory "
        f"tokens; {len(config.memory_layer_indices)} layers have a memory. It passed every check against its "
        "backbone, and will remember once it is trained."
    )
