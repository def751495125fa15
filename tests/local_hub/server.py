"""A Hub as a threaded HTTP server, and the faults that tests put into it."""

import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer

from .endpoints import Endpoints
from .repository import Repository
from .transport import Dropped


class LocalHub:
    """
    A Hub that lives as long as a `with` block.

    Attributes:
        users: user names by token. A user may write to repositories of its own name.
        readers: tokens that may only read.
        private_by_default: what a repository is where nothing is said, as an organisation can set it.
        requests: `METHOD path` of every request that arrived.
    """

    def __init__(self, **users: str):
        self.users = {token: name for name, token in users.items()}
        self.readers: set[str] = set()
        self.private_by_default = False
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, Callable[[], None]]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "LocalHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Endpoints,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def on(self, request: str, fault: Callable[[], None]) -> None:
        """Calls `fault` in the middle of every request whose `METHOD path` matches; it may raise [`Dropped`]."""
        self.faults.append((request, fault))

    def drop(self, request: str, times: int) -> None:
        """Lets the connection of matching requests die, as often as that."""
        left = [times]

        def fault() -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise Dropped

        self.on(request, fault)
