"""`armt serve`."""

import argparse


HELP = "answer clients of OpenAI's protocol; conversations keep their memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or Hub id of an ARMT checkpoint, or of an adapter on one")
    parser.add_argument("--host", default="localhost", help="address to listen at (default localhost)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default 8000)")
    parser.add_argument("--max-sessions", type=int, default=64, help="conversations whose memory is kept (default 64)")
    parser.add_argument(
        "--session-memory", type=float, default=4, metavar="GIB", help="what these memories may take (default 4)"
    )
    parser.add_argument("--max-requests", type=int, default=64, help="requests being answered or waiting (default 64)")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="answer clients that have it; may be given several times. Conversations are kept apart by key: without "
        "any, all clients count as one, and each can tell what another has sent",
    )
    parser.add_argument(
        "--match",
        choices=("tokens", "text"),
        default="tokens",
        help="what must come back for a memory to be used: its tokens (default), or a reply's text, whose tokens may "
        "be others than the memory's, so that answers may differ from a conversation read afresh",
    )
    parser.add_argument("--max-body", type=float, default=32, metavar="MIB", help="size of a request (default 32)")


def run(args: argparse.Namespace) -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("the server needs packages that are not installed: pip install 'modeling-armt[serve]'")
    from ..serving.serve import serve

    serve(
        args.model,
        host=args.host,
        port=args.port,
        max_sessions=args.max_sessions,
        session_bytes=int(args.session_memory * 2**30),
        max_requests=args.max_requests,
        max_body=int(args.max_body * 2**20),
        api_keys=args.api_key,
        match=args.match,
    )
