"""
The server of transformers around an ARMT model.

It brings the OpenAI protocol: requests, chat templates, tool calls, streams. What it lacks for ARMT is put into its
public parts: its model is one that remembers, its generation says for which request it works, and its usage counts
what was remembered. (Run as it is, it cannot load a model with code of its own, and reads every conversation afresh.)
"""

import inspect
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import jinja2
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai.types.completion_usage import PromptTokensDetails
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ...modeling_armt import ARMTForCausalLM
from .connections import Connections, error_body
from .remembering import Cancelled, RememberingModel, Turn
from .sessions import Sessions


ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


def build_app(
    model: ARMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    max_sessions: int = 64,
    session_bytes: int = 4 * 2**30,
    max_requests: int = 64,
    max_body: int = 32 * 2**20,
) -> FastAPI:
    """
    The application, for uvicorn or any other ASGI server.

    Args:
        model, tokenizer: what is served; the tokenizer's chat template renders conversations.
        name: what clients ask for as `model`.
        max_sessions: conversations whose memory is kept.
        session_bytes: bytes that these memories may take.
        max_requests: requests being answered or waiting; they are answered one after the other.
        max_body: bytes in a request.

    Raises:
        ValueError: for a limit below 1.
    """
    limits = {"max_sessions": max_sessions, "session_bytes": session_bytes}
    for limit, value in {**limits, "max_requests": max_requests, "max_body": max_body}.items():
        if value < 1:
            raise ValueError(f"{limit} is {value}; it must be at least 1.")
    turns: dict[str, Turn] = {}
    sessions = Sessions(max_sessions, session_bytes, tokenizer.decode)
    models = OneModel(name, RememberingModel(model, sessions), tokenizer)
    generation = RememberingGeneration(turns)
    handlers = {
        "chat_handler": RememberingChat(models, generation),
        "completion_handler": RememberingCompletion(models, generation),
    }
    known = inspect.signature(build_server).parameters  # which other handlers there are depends on the version
    others = {handler: None for handler in known if handler.endswith("_handler") and handler not in handlers}
    app = build_server(models, **handlers, **others, generation_state=generation)
    app.router.routes[:] = [route for route in app.router.routes if route.path in ROUTES]
    app.add_middleware(Connections, turns=turns, max_requests=max_requests, max_body=max_body)
    for error, status in ((ValueError, 400), (jinja2.TemplateError, 400), (Cancelled, 499), (Exception, 500)):
        app.add_exception_handler(error, answer_with(status))
    app.add_exception_handler(StarletteHTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_with(400))
    return app


class OneModel(ModelManager):
    """A manager of models that has one, loaded, and no other."""

    def __init__(self, name: str, model: RememberingModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.force_model = name
        self.loaded_models[name] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)
        self.created = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # it is no repository, and has no revision

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": self.created, "owned_by": "armt"}]


class RememberingGeneration(GenerationState):
    """Generation that tells the model which turn it works for."""

    def __init__(self, turns: dict[str, Turn]):
        super().__init__()
        self.turns = turns
        self.manager = TurnManager(turns)

    def get_manager(self, model_id: str, use_cb: bool = False) -> "TurnManager":
        return self.manager


class TurnManager(GenerateManager):
    def __init__(self, turns: dict[str, Turn]):
        super().__init__()
        self.turns = turns

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, **kwargs):
        inputs = {**inputs, "turn": self.turns[request_id]}
        return super().generate_streaming(model, processor, inputs, gen_config, request_id, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        inputs = {**inputs, "turn": self.turns[request_id]}
        return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)


class CountsCachedTokens:
    """A handler whose answers tell how many tokens of the prompt were remembered."""

    def chunk_to_sse(self, chunk: Any) -> str:
        if getattr(chunk, "usage", None) is not None:
            cached = self.generation_state.turns[chunk.id].cached_tokens
            chunk.usage.prompt_tokens_details = PromptTokensDetails(cached_tokens=cached)
        return super().chunk_to_sse(chunk)

    async def handle_request(self, body: dict, request_id: str):
        self.check(body)
        response = await super().handle_request(body, request_id)
        if isinstance(response, JSONResponse):
            answer = json.loads(response.body)
            cached = self.generation_state.turns[request_id].cached_tokens
            answer["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
            response = JSONResponse(answer)
        else:
            response.body_iterator = word_errors(response.body_iterator)
        return response


class RememberingChat(CountsCachedTokens, ChatCompletionHandler):
    """Answers `/v1/chat/completions`."""

    def check(self, body: dict) -> None:
        tokenizer = self.model_manager.loaded_models[self.model_manager.force_model].processor
        if tokenizer.chat_template is None:
            raise HTTPException(400, "this model has no chat template. Send the text itself to /v1/completions.")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise HTTPException(400, "messages must be a list of at least one message.")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise HTTPException(400, f"messages[{number}] must be an object with a role.")
            content = message.get("content")
            parts = content if isinstance(content, list) else []
            texts = all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts)
            if not texts or not isinstance(content, str | list | None):
                raise HTTPException(400, f"the content of messages[{number}] must be text or a list of text parts.")


class RememberingCompletion(CountsCachedTokens, CompletionHandler):
    """Answers `/v1/completions`."""

    def check(self, body: dict) -> None:
        if not body.get("prompt"):
            raise HTTPException(400, "the prompt is empty: there is nothing to go on from.")


async def word_errors(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream's events, with an error at its end as OpenAI's servers word it: clients do not show any other."""
    async for event in events:
        before, error, message = event.partition('data: {"error": "')
        if error:
            body = error_body(message.removesuffix('"}\n\n'), "generation_failed")
            event = f"{before}data: {json.dumps(body)}\n\n"
        yield event


def answer_with(status: int):
    """A handler of exceptions that words them as OpenAI's servers do."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(str(error), type(error).__name__), status)

    return answer


async def answer_http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
    return JSONResponse(error_body(str(error.detail), "invalid_request"), error.status_code)
