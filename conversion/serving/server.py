"""
The server of transformers around an ARMT model.

It brings the OpenAI protocol: routes, replies, tool calls, streams. What it lacks for ARMT is put into its
public parts: its model is one that remembers, its generation says for which request it works, and its usage counts
what was remembered. (Run as it is, it cannot load a model with code of its own, and reads every conversation afresh.)
"""

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Collection
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from openai.types.completion_usage import PromptTokensDetails
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ...modeling_armt import ARMTForCausalLM
from . import protocol
from .connections import Connections, error_body
from .remembering import Cancelled, RememberingModel, Turn
from .sessions import Sessions


MATCHES = ("tokens", "text")
ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}


def build_app(
    model: ARMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    max_sessions: int = 64,
    session_bytes: int = 4 * 2**30,
    max_requests: int = 64,
    max_body: int = 32 * 2**20,
    api_keys: Collection[str] = (),
    match: str = "tokens",
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
        api_keys: those of the clients who may ask; conversations are kept apart by them. Without keys everybody may,
            and all are one client: who sends what somebody else has sent sees by `cached_tokens`, and by how soon the
            answer comes, that it was sent before.
        match: what must come back for a conversation's memory to be used: its `tokens`, so that answers are those of a
            conversation read afresh, or its `text`. A tokenizer may cut a reply's text into other tokens than those
            that were generated; with `text` the memory of these serves nevertheless, which spares reading the reply
            but makes other answers.

    Raises:
        ValueError: for a limit below 1, an empty key, or another `match`.
    """
    limits = {"max_sessions": max_sessions, "session_bytes": session_bytes}
    for limit, value in {**limits, "max_requests": max_requests, "max_body": max_body}.items():
        if value < 1:
            raise ValueError(f"{limit} is {value}; it must be at least 1.")
    if not all(api_keys):
        raise ValueError("an API key is empty: everybody would have it.")
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; it must be one of {', '.join(MATCHES)}.")
    turns: dict[str, Turn] = {}
    tokenizer("")  # sets its truncation and padding, which later calls of several threads must not change
    sessions = Sessions(max_sessions, session_bytes, tokenizer.decode if match == "text" else None)
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
    app.add_middleware(
        Connections, turns=turns, max_requests=max_requests, max_body=max_body, api_keys=frozenset(api_keys)
    )
    for error, status in ((ValueError, 400), (RequestValidationError, 400), (Cancelled, 499), (Exception, 500)):
        app.add_exception_handler(error, answer_with(status))
    app.add_exception_handler(ValidationError, answer_fault)
    app.add_exception_handler(StarletteHTTPException, answer_http_error)
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


class Remembering:
    """A handler that takes what `protocol` allows, and answers with how many tokens of the prompt were remembered."""

    fields: type[protocol.Request]

    def encode(self, request: protocol.Request, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        """The prompt as ids."""
        raise NotImplementedError

    async def handle_request(self, body: dict, request_id: str):
        request = self.fields.model_validate(body)
        name = self.model_manager.force_model
        if request.model not in (None, name):
            raise HTTPException(404, f"there is no model {request.model!r} here, only {name!r}.")
        served = self.model_manager.loaded_models[name]
        model, tokenizer = served.model, served.processor
        options = request.generation_config(model.generation_config, model.vocabulary)
        try:
            inputs = await asyncio.to_thread(self.encode, request, tokenizer)  # a long text takes seconds
        except HTTPException:
            raise
        except Exception as error:  # a template raises whatever it comes to
            raise HTTPException(400, f"the prompt cannot be made into tokens: {error}") from error
        if inputs["input_ids"].shape[1] == 0:
            raise HTTPException(400, "the prompt is empty: there is nothing to go on from.")
        turn = self.generation_state.turns[request_id]
        turn.seed = request.seed
        arguments = (request_id, model, tokenizer, name, inputs.to(model.device), options)
        manager = self.generation_state.get_manager(name)
        # Later versions of transformers parse tool calls by the tools' schemas.
        tools = {"tools": body.get("tools")} if "tools" in inspect.signature(self._streaming).parameters else {}
        if request.stream:
            response = self._streaming(*arguments, manager, **tools)
            response.body_iterator = word_errors(response.body_iterator)
            return response
        response = await self._non_streaming(*arguments, manager, **tools)
        answer = json.loads(response.body)
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": turn.cached_tokens}
        return JSONResponse(answer)

    def chunk_to_sse(self, chunk: Any) -> str:
        if getattr(chunk, "usage", None) is not None:
            cached = self.generation_state.turns[chunk.id].cached_tokens
            chunk.usage.prompt_tokens_details = PromptTokensDetails(cached_tokens=cached)
        return super().chunk_to_sse(chunk)


class RememberingChat(Remembering, ChatCompletionHandler):
    """Answers `/v1/chat/completions`."""

    fields = protocol.ChatRequest

    def encode(self, request: protocol.ChatRequest, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        if tokenizer.chat_template is None:
            raise HTTPException(400, "this model has no chat template. Send the text itself to /v1/completions.")
        tools = None if request.tool_choice == "none" else request.tools
        options = request.chat_template_kwargs
        return tokenizer.apply_chat_template(
            [message.for_template() for message in request.messages],
            tools=tools and [tool.model_dump(exclude_unset=True) for tool in tools],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            **({} if options is None else options.model_dump(exclude_none=True)),
        )


class RememberingCompletion(Remembering, CompletionHandler):
    """Answers `/v1/completions`."""

    fields = protocol.CompletionRequest

    def encode(self, request: protocol.CompletionRequest, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
        return tokenizer(request.prompt, return_tensors="pt")


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

    async def answer(request: Request, error: Exception) -> Response:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return error_response(status, error_body(str(error), type(error).__name__, kind=kind))

    return answer


async def answer_http_error(request: Request, error: StarletteHTTPException) -> Response:
    return error_response(error.status_code, error_body(str(error.detail), "invalid_request"))


async def answer_fault(request: Request, error: ValidationError) -> Response:
    param, message = protocol.fault(error)
    return error_response(400, error_body(message, "invalid_request", param))


def error_response(status: int, body: dict) -> Response:
    """JSON in ASCII: what a client sent, and a message quotes, may have no form in UTF-8."""
    return Response(json.dumps(body), status, media_type="application/json")
