"""Who may ask a server, how much one client may send, and noticing that it is gone."""

import asyncio
import hmac
import json
import uuid
from collections.abc import Collection
from typing import Any

from transformers.cli.serving.utils import X_REQUEST_ID

from .remembering import Cancelled, Turn


BODY_SECONDS = 60  # for a request to arrive
# What a body may have besides the text in its strings: reading a hundred million brackets takes a minute.
MAX_STRINGS, MAX_STRUCTURE = 2**17, 2**20


class Connections:
    """
    ASGI middleware around the server of transformers. It refuses requests of strangers and those that are too large or
    too many, gives every other one a [`Turn`], and cancels that when the client leaves.

    Args:
        app: the application.
        turns: the requests being answered or waiting, by request id; filled here.
        max_requests: at most so many of them. What is still arriving takes nobody's place, but all of it together may
            have no more than `max_requests * max_body` bytes.
        max_body: bytes in a request.
        api_keys: those of the clients; empty if everybody may ask, who then are one client.
    """

    def __init__(
        self, app: Any, turns: dict[str, Turn], max_requests: int, max_body: int, api_keys: Collection[str] = ()
    ):
        self.app, self.turns, self.max_requests, self.max_body = app, turns, max_requests, max_body
        self.api_keys = api_keys
        self.arriving = 0  # bytes

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        owner = self._owner(dict(scope["headers"]).get(b"authorization", b""))
        if owner is None:
            await refuse(send, 401, "this server answers those who have one of its API keys.", "invalid_api_key")
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._receive_body(receive)
            if await asyncio.to_thread(is_intricate, body):
                raise Refused(413, "the request has too many parts: only texts may be long.", "request_too_large")
            if len(self.turns) >= self.max_requests:
                raise self._full()
        except TimeoutError:
            await refuse(send, 408, f"the request did not arrive within {BODY_SECONDS} seconds.", "too_slow")
        except Refused as refused:
            await refuse(send, *refused.args)
        except Cancelled:
            pass
        else:
            await self._take_turn(scope, body, receive, send, Turn(owner))

    def _owner(self, authorization: bytes) -> str | None:
        """The key of the client, an empty one if none is needed, None for a stranger."""
        if not self.api_keys:
            return ""
        given = authorization.removeprefix(b"Bearer ")
        return next((key for key in self.api_keys if hmac.compare_digest(key.encode(), given)), None)

    def _full(self) -> "Refused":
        many = f"the server is full: {self.max_requests} requests are being answered or waiting. Try again later."
        return Refused(429, many, "server_full", 1)

    async def _take_turn(self, scope: dict, body: bytes, receive: Any, send: Any, turn: Turn) -> None:
        name = uuid.uuid4().hex
        self.turns[name] = turn
        try:
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

    async def _receive_body(self, receive: Any) -> bytes:
        """The body of a request. One that is refused is taken to its end nevertheless: then clients listen."""
        body, refused, more = bytearray(), None, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client is gone")
                more, part = message.get("more_body", False), message.get("body", b"")
                if len(body) + len(part) > self.max_body:
                    large = f"the request is larger than {self.max_body:,} bytes, the limit here (--max-body)."
                    refused = Refused(413, large, "request_too_large")
                elif self.arriving + len(part) > self.max_requests * self.max_body:
                    refused = self._full()
                if refused is None:
                    body += part
                    self.arriving += len(part)
                else:
                    self.arriving -= len(body)
                    body.clear()
            if refused is not None:
                raise refused
            return bytes(body)
        finally:
            self.arriving -= len(body)


class Refused(Exception):
    """A request that is answered here, with the arguments of [`refuse`]."""


def is_intricate(body: bytes) -> bool:
    """Whether a JSON text is more than a few texts, so that reading it takes long."""
    text = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return text.count(b'"') > 2 * MAX_STRINGS or sum(map(len, text.split(b'"')[::2])) > MAX_STRUCTURE


async def refuse(send: Any, status: int, message: str, code: str, retry_after: int | None = None) -> None:
    """Answers with an error as OpenAI's servers word it."""
    headers = [(b"content-type", b"application/json")]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error_body(message, code)).encode()})


def error_body(message: str, code: str, param: str | None = None, kind: str = "invalid_request_error") -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
