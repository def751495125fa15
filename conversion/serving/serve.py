"""`armt serve`: loads a checkpoint and listens."""

import socket
from pathlib import Path
from typing import Any

import uvicorn
from rich.console import Console

from ..checkpoints import armt_model, load_checkpoint
from .server import build_app


def serve(checkpoint: str | Path, host: str = "localhost", port: int = 8000, **options: Any) -> None:
    """
    Answers requests until it is interrupted.

    Args:
        checkpoint: folder or Hub id of an ARMT checkpoint, or of an adapter on one. The name that clients ask for is
            its last part.
        host, port: where to listen; port 0 takes a free one.
        options: those of [`build_app`].

    Raises:
        ValueError: for what is no ARMT checkpoint, or has no tokenizer, and as [`build_app`].
        OSError: if something else listens there.
    """
    listener = listen(host, port)
    with listener:
        model, tokenizer = load_checkpoint(checkpoint)
        if tokenizer is None:
            raise ValueError(f"{checkpoint} has no tokenizer, without which it cannot read what clients send.")
        name = Path(checkpoint).resolve().name if Path(checkpoint).exists() else str(checkpoint)
        app = build_app(armt_model(model), tokenizer, name, **options)
        port = listener.getsockname()[1]
        console = Console(stderr=True, markup=False)
        console.print(f"Serving {name} at http://{host}:{port}/v1", highlight=False)
        if not options.get("api_keys"):
            console.print("Without --api-key all clients are one: each can tell what another has sent.", style="dim")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen at {host}:{port}: {error}. Choose another --port or --host.") from error
