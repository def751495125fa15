"""What one client may ask of a server, and noticing that it is gone."""

import asyncio
import json
import uuid
from typing import Any

from transformers.cli.serving.utils import X_REQUEST_ID

from .remembering import Turn


BODY_SECONDS = 60  # for a request to arrive; then it no longer takes somebody else's place


class Connections:
    """
    ASGI middleware around the server of transformers. It refuses requests that are too large or too many, gives every
    other one a [`Turn`], and cancels that when the client leaves.

    Args:
        app: the application.
        turns: the requests being answered or waiting, by request id; filled here.
        max_requests: at most so many of them.
        max_body: bytes in a request.
    """

    def __init__(self, app: Any, turns: dict[str, Turn], max_requests: int, max_body: int):
        self.app, self.turns, self.max_requests, self.max_body = app, turns, max_requests, max_body

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if len(self.turns) >= self.max_requests:
            await self._receive_body(receive, keep=0)
            many = f"the server is full: {self.max_requests} requests are being answered or waiting. Try again later."
            await refuse(send, 429, many, "server_full", retry_after=1)
            return
        name, turn = uuid.uuid4().hex, Turn()
        self.turns[name] = turn
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await self._receive_body(receive, keep=self.max_body)
            except TimeoutError:
                await refuse(send, 408, f"the request did not arrive within {BODY_SECONDS} seconds.", "too_slow")
                return
            if body is None:
                large = f"the request is larger than {self.max_body:,} bytes, the limit of this server (--max-body)."
                await refuse(send, 413, large, "request_too_large")
                return
            # The id under which the server of transformers knows the request; a client's own could be another's too.
            others = [header for header in scope["headers"] if header[0] != X_REQUEST_ID.encode()]
            scope = {**scope, "headers": [*others, (X_REQUEST_ID.encode(), name.encode())]}
            await self._answer(scope, body, receive, send, turn)
        finally:
            turn.cancelled.set()
            del self.turns[name]

    async def _answer(self, scope: dict, body: bytes, receive: Any, send: Any, turn: Turn) -> None:
        gone = asyncio.Event()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            turn.cancelled.set()
            gone.set()

        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, replay, send)
        finally:
            watcher.cancel()

    async def _receive_body(self, receive: Any, keep: int) -> bytes | None:
        """The body of a request; None if it is larger than `keep`. It is taken to its end: then clients listen."""
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            size += len(message.get("body", b""))
            if size <= keep:
                body += message.get("body", b"")
        return bytes(body) if size <= keep else None


async def refuse(send: Any, status: int, message: str, code: str, retry_after: int | None = None) -> None:
    """Answers with an error as OpenAI's servers word it."""
    headers = [(b"content-type", b"application/json")]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error_body(message, code)).encode()})


def error_body(message: str, code: str) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
