"""HTTP beneath the endpoints."""

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .repository import Refused


if TYPE_CHECKING:
    from .server import LocalHub


class Dropped(Exception):
    """The connection ends without an answer."""


class Transport(BaseHTTPRequestHandler):
    """Requests in, answers and errors out. Subclasses have `routes`: patterns of `METHOD path`, and what replies."""

    hub: "LocalHub"
    routes: "list[tuple[str, Callable]]"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        called = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(called)
        try:
            self.body = self.read_body(called)
            self.reply(called)
        except (Dropped, ConnectionError):
            self.close_connection = True
            self.connection.close()

    def reply(self, called: str) -> None:
        try:
            for pattern, reply in self.routes:
                match = re.fullmatch(pattern, called)
                if match:
                    with self.hub.lock:
                        return reply(self, *map(unquote, match.groups()))
            raise Refused(404, "NotFound", f"no such endpoint: {called}")
        except Refused as error:
            self.send(error.status, {"error": str(error)}, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    def read_body(self, called: str) -> bytes:
        pieces = self.read_pieces()
        body = next(pieces, b"")
        for pattern, fault in self.hub.faults:
            if re.search(pattern, called):
                fault()
        return body + b"".join(pieces)

    def read_pieces(self):
        """The body in two pieces or more, so that something can happen in between."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            size = int(self.headers.get("Content-Length", 0))
            yield self.rfile.read(size // 2)
            yield self.rfile.read(size - size // 2)

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
