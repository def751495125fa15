"""The `armt` command: one verb a subcommand, each a plain function that can be called from Python too."""

import argparse
import os
import sys
import warnings
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="armt", description="Associative Recurrent Memory Transformers from pretrained decoders."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verb = verbs.add_parser("convert", help="turn a pretrained decoder into an ARMT checkpoint")
    verb.add_argument("backbone", help="folder or Hub id of the decoder")
    verb.add_argument("--out", required=True, type=Path, help="folder to write")
    verb.add_argument("--segment-size", type=int, default=1024, help="tokens in a segment (default 1024)")
    verb.add_argument("--num-mem-tokens", type=int, default=16, help="memory tokens of a segment (default 16)")
    verb.add_argument("--d-mem", type=int, default=64, help="width of memory queries and keys (default 64)")
    verb.add_argument("--variant", choices=["v2", "paper"], default="v2", help="formula of the memory (default v2)")
    verb.add_argument(
        "--memory-layers", type=int, nargs="+", metavar="I", help="layers that get a memory (default: all)"
    )
    verb.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the backbone's weights (default: as they are)",
    )

    verb = verbs.add_parser("import", help="turn a checkpoint of the ARMT authors into one that loads anywhere")
    verb.add_argument("checkpoint", help="file or folder of the authors' checkpoint")
    verb.add_argument("--backbone", required=True, help="folder or Hub id of the model it was made from")
    verb.add_argument("--segment-size", type=int, required=True, help="tokens in a segment, as it was trained")
    verb.add_argument(
        "--variant", choices=["v2", "paper"], required=True, help="paper: code of 2024-08; v2: any later"
    )
    verb.add_argument("--no-correction", action="store_true", help="it was trained without the correction gamma")
    verb.add_argument("--no-denom", action="store_true", help="it was trained without denominators")
    verb.add_argument("--out", required=True, type=Path, help="folder to write")

    verb = verbs.add_parser("generate", help="read a prompt of any length and go on with it")
    verb.add_argument("model", help="folder or Hub id of an ARMT checkpoint")
    prompt = verb.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text itself")
    prompt.add_argument("--prompt-file", type=Path, help="a UTF-8 text file")
    prompt.add_argument("--prompt-ids", type=Path, metavar="F", help="a .npy file of token ids, mapped, not loaded")
    verb.add_argument("--max-new-tokens", type=int, default=100, help="0 only reads (default 100)")
    verb.add_argument("--save-memory", type=Path, metavar="F", help="save what was read, before anything is generated")
    verb.add_argument("--load-memory", type=Path, metavar="F", help="start from a saved memory")

    verb = verbs.add_parser("demo", help="the whole way on an embedded backbone, in minutes on two CPU cores")
    verb.add_argument("--out", type=Path, default=Path("armt-demo"), help="folder to write (default armt-demo)")
    return parser


def run(args: argparse.Namespace) -> None:
    # Imported here, so that --help and usage errors answer at once.
    from rich.console import Console

    console = Console(stderr=True)
    if args.verb == "convert":
        from .convert import convert

        options = {name: value for name, value in vars(args).items() if name != "verb"}
        model = convert(**options)
        config = model.config
        console.print(
            f"[bold]{args.out}[/] reads segments of {config.segment_size} tokens with {config.num_mem_tokens} memory "
            f"tokens; {len(config.memory_layer_indices)} layers have a memory. It passed every check against its "
            "backbone, and will remember once it is trained."
        )
    elif args.verb == "import":
        from .importing import import_checkpoint

        import_checkpoint(
            args.checkpoint,
            args.backbone,
            args.out,
            segment_size=args.segment_size,
            variant=args.variant,
            correction=not args.no_correction,
            use_denom=not args.no_denom,
        )
        console.print(
            f"[bold]{args.out}[/] is ready: AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
        )
    elif args.verb == "generate":
        from .generate import generate

        prompt = read_text(args.prompt_file) if args.prompt_file is not None else args.prompt
        generate(args.model, prompt, args.max_new_tokens, args.save_memory, args.load_memory, args.prompt_ids)
    else:
        from .demo.demonstration import run_demo

        run_demo(args.out)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, 1 for what the user can mend, 130 for an interrupt."""
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, not for the user of this command
    try:
        run(args)
    except KeyboardInterrupt:
        print("armt: interrupted; nothing was left half-written.", file=sys.stderr)
        return 130
    except Exception as error:  # writers and readers of files raise types of their own; what counts is the message
        if os.environ.get("ARMT_TRACEBACK"):
            raise
        kind = "" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: "
        print(f"armt: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
