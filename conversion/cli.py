"""The `armt` command: one verb a subcommand, each a plain function that can be called from Python too."""

import argparse
import os
import shlex
import sys
import warnings

from .commands import (
    COMMAND_LINE,
    card,
    convert,
    demo,
    evaluate,
    generate,
    import_,
    inspect,
    merge,
    publish,
    refresh,
    serve,
    train,
)


VERBS = {
    "convert": convert,
    "import": import_,
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "inspect": inspect,
    "serve": serve,
    "merge": merge,
    "card": card,
    "publish": publish,
    "refresh": refresh,
    "demo": demo,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="armt", description="Associative Recurrent Memory Transformers from pretrained decoders."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, command in VERBS.items():
        verb = verbs.add_parser(name, help=command.HELP)
        command.add_arguments(verb)
        verb.set_defaults(run=command.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns its exit code: 0, 1 for what the user can mend, 130 for an interrupt."""
    args = build_parser().parse_args(argv)
    COMMAND_LINE.set(shlex.join(["armt", *(sys.argv[1:] if argv is None else argv)]))
    run = vars(args).pop("run")
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
