"""`armt evaluate`."""

import argparse
from pathlib import Path

from . import COMMAND_LINE


HELP = "measure what checkpoints recall at which length, beside controls without their memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints", nargs="+", metavar="DIR", help="ARMT checkpoints or adapters; seeds of one recipe"
    )
    parser.add_argument("--task", required=True, help="associative_retrieval, babilong, needle, passkey, text or chat")
    parser.add_argument(
        "--lengths",
        required=True,
        help="such as 4k,32k,1M, in tokens (babilong: of GPT-2); for associative_retrieval also in pairs: 50p,1kp",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="folder for results.json and plots; goes on from there"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="at each length (default 1,000 up to 1M, 100 beyond)")
    parser.add_argument(
        "--task-option", action="append", default=[], metavar="KEY=VALUE", help="of the task; may come several times"
    )
    parser.add_argument(
        "--controls",
        nargs="*",
        metavar="CONTROL",
        help="which of off, swapped, deleted, backbone, or for a loss off, carried, backbone (default all; without a "
        "name none)",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="samples read side by side (default: what fits)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--compile", action="store_true", help="compile first: for many or long samples on a GPU")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.evaluate import evaluate
    from ..evaluation.report import print_report
    from ..tasks.options import parse_options

    results = evaluate(
        args.checkpoints,
        args.task,
        args.lengths.split(","),
        args.out,
        args.samples,
        parse_options(args.task_option),
        args.controls,
        args.batch_size,
        args.dtype,
        args.device,
        args.compile,
        COMMAND_LINE.get(),
    )
    print_report(results, args.out)
