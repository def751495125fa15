"""
What a request may say: the part of OpenAI's protocol that this server answers, with bounds.

All else is refused, fields that change nothing at their default value excepted: what is not supported is not passed
over, and no request brings a template, padding or generation settings of its own.
"""

import copy
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from transformers import GenerationConfig


MAX_NEW_TOKENS = 131_072
DEFAULT_NEW_TOKENS = 1_024
LEAST_TEMPERATURE = 0.01  # below it the logits' quotients overflow; a reply is greedy long before

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Zero = Annotated[float, Field(ge=0, le=0)]


def check_biases(biases: dict[str, Any]) -> dict[str, Any]:
    for token, bias in biases.items():
        if not re.fullmatch("[0-9]{1,9}", token) or type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"{token[:20]}: it takes token ids with numbers from -100 to 100")
    return biases


class Fields(BaseModel):
    """An object of a request, with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def refuse_others(cls, value: Any) -> Any:
        """One error where pydantic has one for each field: there may be a hundred thousand."""
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                raise PydanticCustomError("unsupported", "{name}", {"name": name})
        return value


class StreamOptions(Fields):
    include_usage: Literal[True] = True  # it always comes


class Request(Fields):
    """What both kinds of requests have in common."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, min_length=1, max_length=4)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=1_024), AfterValidator(check_biases)] | None = None
    user: Name | None = None  # changes nothing
    # At these values they change nothing.
    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None

    def generation_config(self, default: GenerationConfig, vocabulary: int) -> GenerationConfig:
        """
        The model's own settings with those of the request.

        Args:
            default: the model's own.
            vocabulary: number of token ids.

        Raises:
            ValueError: for a `logit_bias` of an id outside the vocabulary.
        """
        config = copy.deepcopy(default)
        config.max_new_tokens = self.max_tokens or max(config.max_new_tokens or 0, DEFAULT_NEW_TOKENS)
        if self.temperature is not None or self.top_p is not None:
            temperature = config.temperature if self.temperature is None else self.temperature
            config.do_sample = temperature is None or temperature >= LEAST_TEMPERATURE
            if config.do_sample:
                config.temperature, config.top_p = temperature, config.top_p if self.top_p is None else self.top_p
        if self.stop is not None:
            config.stop_strings = self.stop
        if self.logit_bias:
            config.sequence_bias = {(int(token),): float(bias) for token, bias in self.logit_bias.items()}
            unknown = [token for (token,) in config.sequence_bias if token >= vocabulary]
            if unknown:
                raise ValueError(f"logit_bias: there is no token {unknown[0]}, the vocabulary has {vocabulary:,}.")
        return config


class CompletionRequest(Request):
    """The body of a request to `/v1/completions`."""

    prompt: Annotated[str, StringConstraints(min_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None


class TextPart(Fields):
    type: Literal["text"]
    text: str


class FunctionCall(Fields):
    name: Name
    arguments: Json[dict[str, Any]]


class ToolCall(Fields):
    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Fields):
    """One message. What clients get in a reply may come back as it was."""

    role: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Name | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """What a chat template gets. Where tools are called, the text is their markup, which it writes itself."""
        parts = [] if self.content is None or self.tool_calls else self.content
        text = parts if isinstance(parts, str) else " ".join(part.text for part in parts)
        others = self.model_dump(exclude_none=True, exclude={"content", "annotations"})
        return {**others, "content": text}


class Function(Fields):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Fields):
    type: Literal["function"]
    function: Function


class TextFormat(Fields):
    type: Literal["text"]


class TemplateOptions(Fields):
    enable_thinking: bool | None = None


class ChatRequest(Request):
    """The body of a request to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None  # the newer name
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=256)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    parallel_tool_calls: Literal[True] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None

    def model_post_init(self, context: Any) -> None:
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens are two names of one number; give one of them")
            self.max_tokens = self.max_completion_tokens


def fault(error: ValidationError) -> tuple[str, str]:
    """What is wrong with a request: the path to a field, and words."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    # Of alternatives the one that was meant.
    deepest = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    path = [str(part) for part in deepest["loc"] if not re.search(r"^str$|-str$|\[", str(part))]
    message = deepest["msg"].removeprefix("Value error, ")
    if deepest["type"] == "unsupported":
        path, message = [*path, message], "this server does not know it, or does not support it"
    param = ".".join(path)[:200]
    return param, f"{param}: {message}".removeprefix(": ")
