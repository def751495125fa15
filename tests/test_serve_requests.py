"""
What may be asked of the server: bounds, keys, fields, and requests that are none.
"""

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from serving import (
    TEXT,
    TOO_LONG,
    Served,
    assistant,
    cached,
    model_that_remembers,
    openai,
    read_afresh,
    served,
    user,
    words_tokenizer,
)
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.serving.connections import is_intricate
from modeling_armt.conversion.serving.protocol import ChatRequest, CompletionRequest
from modeling_armt.conversion.serving.server import build_app


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return words_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> ARMTForCausalLM:
    return model_that_remembers(tokenizer)


@pytest.fixture(scope="module")
def server(model, tokenizer) -> Iterator[Served]:
    with served(model, tokenizer) as server:
        yield server


class TestLimits:
    def test_a_request_that_is_too_large(self, model, tokenizer):
        with served(model, tokenizer, max_body=2**20) as server:
            with pytest.raises(openai.APIStatusError, match=r"larger than 1,048,576 bytes") as error:
                server.chat([user("a" * 2 * 2**20)])
            assert error.value.status_code == 413
            assert server.still_answers()

    def test_a_full_server_says_so(self, model, tokenizer):
        with served(model, tokenizer, max_requests=2) as server:
            options = {"model": "tiny", "messages": [user("Hello!")], "max_tokens": TOO_LONG, "stream": True}
            streams = [server.client.chat.completions.create(**options) for _ in range(2)]
            with pytest.raises(openai.RateLimitError, match="the server is full: 2 requests") as error:
                server.chat([user("And I?")])
            assert error.value.response.headers["retry-after"] == "1"
            for stream in streams:
                stream.close()
            # The official client tries again by itself.
            patient = server.client.with_options(max_retries=5)
            assert patient.chat.completions.create(model="tiny", messages=[user("Now?")], max_tokens=1).choices

    def test_a_body_that_is_arriving_takes_nobodys_place(self, model, tokenizer):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n{"
        with served(model, tokenizer, max_requests=2) as server:
            connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
            for connection in connections:
                connection.sendall(head)
            assert server.still_answers()
            for connection in connections:
                connection.close()

    def test_what_is_arriving_is_bounded_together(self, model, tokenizer):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 1001\r\n\r\n"
        with served(model, tokenizer, max_requests=2, max_body=1024) as server:
            connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
            for connection in connections:
                connection.sendall(head + b"{" * 1000)
            body = {"prompt": "Hello!" + " " * 100}
            deadline = time.monotonic() + 10
            while (answer := server.post(body, "/v1/completions"))[0] == 200 and time.monotonic() < deadline:
                pass
            assert (answer[0], answer[1]["error"]["code"]) == (429, "server_full")
            for connection in connections:
                connection.close()
            assert server.still_answers()

    @pytest.mark.parametrize("limit", ["max_sessions", "session_bytes", "max_requests", "max_body"])
    def test_limits_must_be_positive(self, model, tokenizer, limit):
        with pytest.raises(ValueError, match=f"{limit} is 0; it must be at least 1"):
            build_app(model, tokenizer, "tiny", **{limit: 0})

    def test_what_is_matched_must_be_known(self, model, tokenizer):
        with pytest.raises(ValueError, match="match is 'words'; it must be one of tokens, text"):
            build_app(model, tokenizer, "tiny", match="words")


class TestKeys:
    @pytest.fixture(scope="class")
    @classmethod
    def clients(cls, model, tokenizer) -> Iterator[dict[str, Served]]:
        """Clients of one server, by their key; one has none that is right."""
        with served(model, tokenizer, api_keys=["Mary's", "John's"]) as server:
            yield {key: Served(server.port, key) for key in ("Mary's", "John's", "Eve's")}

    def test_strangers_are_refused(self, clients):
        for call in (clients["Eve's"].still_answers, clients["Eve's"].client.models.list):
            with pytest.raises(openai.AuthenticationError, match="one of its API keys"):
                call()
        assert clients["Eve's"].post({}, Authorization="Bearer ")[0] == 401
        assert clients["Eve's"].health() == 200

    def test_a_client_does_not_learn_what_another_has_sent(self, clients):
        messages = [user(TEXT)]
        first, _ = clients["Mary's"].chat(messages)
        for key, remembered in (("John's", False), ("Mary's", True), ("John's", True)):
            answer, usage = clients[key].chat(messages)
            assert answer == first
            assert (cached(usage) > 0) == remembered

    def test_without_keys_all_are_one_client(self, model, tokenizer):
        with served(model, tokenizer) as server:
            messages = [user(TEXT)]
            server.chat(messages)
            assert cached(Served(server.port, "another").chat(messages)[1]) > 0

    def test_an_empty_key_is_refused(self, model, tokenizer):
        with pytest.raises(ValueError, match="an API key is empty"):
            build_app(model, tokenizer, "tiny", api_keys=["Mary's", ""])


class TestSampling:
    OPTIONS = {"model": "tiny", "messages": [user("Hello!")], "max_tokens": 8, "temperature": 1.5}

    def test_a_seed_is_the_requests_own(self, server):
        """Twelve with one seed are answered among others without."""

        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
                seeds = [5, None] * 12
                answers = [client.chat.completions.create(**self.OPTIONS, seed=seed) for seed in seeds]
                return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

        answers = asyncio.run(ask())
        assert len(set(answers[::2])) == 1
        assert len(set(answers[1::2])) > 6

    def test_another_seed_gives_another_answer(self, server):
        answers = {
            server.client.chat.completions.create(**self.OPTIONS, seed=seed).choices[0].message.content
            for seed in range(4)
        }
        assert len(answers) == 4

    @pytest.mark.parametrize(
        "given, expected",
        [
            ({}, (False, 1.0, 1.0)),
            ({"temperature": 0}, (False, 1.0, 1.0)),
            ({"temperature": 1e-9}, (False, 1.0, 1.0)),
            ({"temperature": 0.5}, (True, 0.5, 1.0)),
            ({"top_p": 0.5}, (True, 1.0, 0.5)),
            ({"temperature": 0, "top_p": 0.5}, (False, 1.0, 1.0)),
        ],
        ids=str,
    )
    def test_asking_for_a_temperature_is_asking_for_samples(self, given, expected):
        default = GenerationConfig(do_sample=False, temperature=1.0, top_p=1.0)
        config = CompletionRequest(prompt="Hello!", **given).generation_config(default, vocabulary=100)
        assert (config.do_sample, config.temperature, config.top_p) == expected

    def test_numbers_of_tokens(self):
        default = GenerationConfig()
        for given, expected in ((None, 1024), (1, 1), (131_072, 131_072)):
            request = ChatRequest(messages=[user("Hello!")], max_tokens=given)
            assert request.generation_config(default, vocabulary=100).max_new_tokens == expected
        newer = ChatRequest(messages=[user("Hello!")], max_completion_tokens=7)
        assert newer.generation_config(default, vocabulary=100).max_new_tokens == 7

    def test_biases_move_tokens(self, server, tokenizer):
        token = tokenizer(" house", add_special_tokens=False)["input_ids"][0]
        biased, _ = server.chat([user("Hello!")], tokens=3, logit_bias={str(token): 100})
        assert biased == " house" * 3


# Loops that would run for years in a template.
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


class TestBadRequests:
    """The message that a chat is refused with, by what its request has besides messages."""

    BAD = {
        "no messages": ({"messages": []}, "messages: List should have at least 1 item"),
        "no role": ({"messages": [{"content": "Hello"}]}, "messages.0.role: Field required"),
        "a picture": (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.image_url: this server does not know it, or does not support it",
        ),
        "a call that is no JSON": (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages.0.tool_calls.0.function.arguments: Invalid JSON",
        ),
        "half a character": ({"messages": [user("\ud800")]}, "the prompt cannot be made into tokens"),
        "another model": ({"model": "gpt-9"}, "there is no model 'gpt-9' here, only 'tiny'"),
        "a field of its own": ({"colour": "red"}, "colour: this server does not know it"),
        "a wrong number": ({"temperature": "hot"}, "temperature: Input should be a valid number"),
        "no number": ({"temperature": float("nan")}, "temperature: Input should be a finite number"),
        "too hot": ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        "no mass": ({"top_p": 0}, "top_p: Input should be greater than 0"),
        "a huge number": ({"max_tokens": 1e308}, "max_tokens: Input should be a valid integer"),
        "many tokens": ({"max_tokens": 10**9}, "max_tokens: Input should be less than or equal to 131072"),
        "no tokens": (
            {"max_completion_tokens": 0},
            "max_completion_tokens: Input should be greater than or equal to 1",
        ),
        "two numbers": ({"max_tokens": 3, "max_completion_tokens": 4}, "are two names of one number"),
        "a seed below zero": ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        "a huge seed": ({"seed": 2**64}, "seed: Input should be less than"),
        "stop at nothing": ({"stop": ""}, "stop: String should have at least 1 character"),
        "stop at many": ({"stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        "a bias of no token": ({"logit_bias": {"house": 1}}, "logit_bias: house: it takes token ids"),
        "a bias of an unknown token": ({"logit_bias": {"999999": 1}}, "there is no token 999999"),
        "a large bias": (
            {"logit_bias": {"5": 1000}},
            "logit_bias: 5: it takes token ids with numbers from -100 to 100",
        ),
        "a template": (
            {"chat_template_kwargs": {"chat_template": ENDLESS}},
            "chat_template_kwargs.chat_template: this server does not know it, or does not support it",
        ),
        "padding": (
            {"chat_template_kwargs": {"padding": "max_length", "max_length": 10**9}},
            "chat_template_kwargs.padding: this server does not know it",
        ),
        "generation settings": (
            {"generation_config": '{"num_beams": 2000}'},
            "generation_config: this server does not",
        ),
        "several answers": ({"n": 2}, "n: Input should be 1"),
        "logprobs": ({"logprobs": True}, "logprobs: Input should be False"),
        "top logprobs": ({"top_logprobs": 2}, "top_logprobs: this server does not know it"),
        "a format": ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        "a tool to call": ({"tool_choice": "required"}, "tool_choice: Input should be 'auto' or 'none'"),
        "a presence penalty": ({"presence_penalty": 0.5}, "presence_penalty: Input should be less than or equal to 0"),
        "a frequency penalty": ({"frequency_penalty": -1}, "frequency_penalty: Input should be greater than"),
        "effort": ({"reasoning_effort": "high"}, "reasoning_effort: this server does not know it"),
    }

    @pytest.mark.parametrize("case", BAD)
    def test_chat(self, server, case):
        options, message = self.BAD[case]
        status, answer = server.post({"messages": [user("Hello!")], "max_tokens": 2, **options})
        assert status == (404 if "model" in options else 400)
        assert message in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"

    BAD_COMPLETIONS = {
        "no prompt": ({}, "prompt: Field required"),
        "an empty prompt": ({"prompt": ""}, "prompt: String should have at least 1 character"),
        "several prompts": ({"prompt": ["Hello", "world"]}, "prompt: Input should be a valid string"),
        "an echo": ({"prompt": "Hello", "echo": True}, "echo: Input should be False"),
        "logprobs": ({"prompt": "Hello", "logprobs": 1}, "logprobs: this server does not know it"),
        "the best of many": ({"prompt": "Hello", "best_of": 3}, "best_of: Input should be 1"),
        "a suffix": ({"prompt": "Hello", "suffix": "!"}, "suffix: this server does not know it"),
    }

    @pytest.mark.parametrize("case", BAD_COMPLETIONS)
    def test_completions(self, server, case):
        body, message = self.BAD_COMPLETIONS[case]
        status, answer = server.post(body, "/v1/completions")
        assert status == 400
        assert message in answer["error"]["message"]

    def test_an_error_names_its_field(self, server):
        with pytest.raises(openai.BadRequestError) as error:
            server.chat([user("Hello!"), {"role": "user", "content": 5}])
        assert (error.value.param, error.value.code) == ("messages.1.content", "invalid_request")

    def test_what_clients_say_by_habit_changes_nothing(self, server):
        """Fields at their default, and a reply that comes back with all that it had."""
        messages = [user("Hello!")]
        reply = server.client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
        plain = server.chat([*messages, assistant(reply.choices[0].message.content), user("Why?")])
        habits = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "user": "me"}
        habits |= {"response_format": {"type": "text"}, "tool_choice": "none", "parallel_tool_calls": True}
        habits |= {"stream_options": {"include_usage": True}, "stream": True, "stop": None, "seed": None}
        whole = [*messages, reply.choices[0].message.model_dump(), user("Why?")]
        assert server.chat(whole, **habits)[0] == plain[0]

    @pytest.mark.parametrize("part", [b"{},", b'"",', b"1,", b'"\\"",', b"["], ids=str)
    def test_many_parts_are_not_even_read(self, server, part):
        """A million of them would keep all others waiting for seconds."""
        started = time.monotonic()
        status, answer = server.post(b'{"messages":[' + part * (2**23 // len(part)))
        assert status == 413 and "only texts may be long" in answer["error"]["message"]
        assert time.monotonic() - started < 5

    def test_a_long_text_with_much_in_it_is_read(self):
        text = json.dumps({"messages": [user('He said: "{[,]}\\".\n' * 200_000)]}).encode()
        assert not is_intricate(text)

    def test_no_chat_template(self, model):
        with served(model, AutoTokenizer.from_pretrained(BACKBONE)) as server:
            with pytest.raises(openai.BadRequestError, match="no chat template. Send the text itself"):
                server.chat([user("Hello!")])
            assert server.client.completions.create(model="tiny", prompt="Hello!", max_tokens=2).choices[0].text

    def test_a_template_that_refuses_a_conversation(self, model, tokenizer):
        strict = AutoTokenizer.from_pretrained(BACKBONE)
        strict.chat_template = "{{ raise_exception('roles must \"alternate\"') }}"
        with (
            served(model, strict) as server,
            pytest.raises(openai.BadRequestError, match="roles must .*alternate"),
        ):
            server.chat([user("Hello!")], stream=True)

    def test_an_error_within_a_stream(self, server, model, monkeypatch):
        """That the server has, not its client."""
        with monkeypatch.context() as patch, pytest.raises(openai.APIError, match="strictly positive float"):
            patch.setattr(model.generation_config, "repetition_penalty", -1.0)
            server.chat([user("Hello!")], stream=True)
        assert server.still_answers()

    @pytest.mark.parametrize("body", [b"", b"{", b"[1, 2]", b"null"])
    def test_no_json_object(self, server, body):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        assert answer.startswith("HTTP/1.1 400")
        assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"]
        assert server.still_answers()

    def test_other_routes_of_the_stock_server_are_closed(self, server):
        """They would load other models, or unload this one."""
        for route in ("/load_model", "/reset", "/v1/responses"):
            with pytest.raises(openai.NotFoundError):
                server.client.post(f"http://127.0.0.1:{server.port}{route}", body={"model": "other"}, cast_to=object)


JUNK = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    2**70,
    "",
    "x",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [[[]]],
    [1],
    [{}],
    {"a": {"b": None}},
)
FIELDS = {
    "/v1/chat/completions": {"messages": [user("Hello!")]},
    "/v1/completions": {"prompt": "Hello!"},
}
# What is wrong in both kinds of requests, whatever else they have.
WRONG = {
    "max_tokens": (0, -5, 1e308, 2**70, "8", True, [8]),
    "temperature": (-1, 2.5, float("nan"), float("inf"), "0", [], True),
    "top_p": (0, -0.1, 1.1, float("nan"), "1"),
    "seed": (-1, 2**63, 0.5, "0"),
    "stop": ("", [], [""], ["a"] * 9, 5, {"a": 1}, "x" * 1000),
    "logit_bias": ({"x": 1}, {"5": "1"}, {"5": 1e9}, {"-5": 1}, {"99999999": 1}, [5], "5"),
    "n": (0, 2, 10**9, "1"),
    "stream": ("yes", 1, {}),
    "stream_options": ({"include_usage": False}, {"chunk": 1}, True),
    "frequency_penalty": (0.1, -2, "0"),
    "presence_penalty": (0.1, -2, "0"),
    "model": ("gpt-9", "", 5, "x" * 1000, ["tiny"]),
    "user": (5, {}, "x" * 1000),
    "generation_config": ('{"num_beams": 2000}', "{}", {}),
    "chat_template_kwargs": ({"chat_template": ENDLESS}, {"padding": "max_length"}, {"tokenize": False}, "x", [1]),
    "echo": (True, 1),
    "best_of": (2, "1"),
    "logprobs": (True, 5),
    "suffix": ("x",),
    "response_format": ({"type": "json_object"}, "text"),
    "tool_choice": ("required", {"type": "function"}),
    "num_beams": (2000,),
    "padding": ("max_length",),
    "__class__": ("x",),
}
WRONG_MESSAGES = (
    "Hello!", [], {}, ["Hello!"], [{}], [{"role": "user", "content": 5}], [{"role": "", "content": "x"}],
    [{"role": ["user"]}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
    [{"role": "assistant", "tool_calls": [{"function": {}}]}], [{"role": "user", "content": "x", "padding": True}],
)  # fmt: skip
WRONG_BODIES = (
    b"", b"{", b"null", b"[1, 2]", b"5", b"NaN", b'"text"', b"\x00", b"\xff\xfe", b'{"prompt": "\xff"}', b"{" * 1000,
    b"[" * 100_000, b'{"a":' * 100_000, b'{"max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": "x"} {}', b"'prompt'",
    b'{"messages": [' + b'{"role": "user", "content": "x"},' * 20_000, b'"' * 400_000,
)  # fmt: skip


def malformed(rng: random.Random) -> tuple[str, object, dict[str, str]]:
    """Route, body and headers of a request with something wrong in it."""
    route = rng.choice(sorted(FIELDS))
    body: dict | bytes = dict(FIELDS[route], max_tokens=2)
    way = rng.choice(["field", "field", "field", "junk", "content", "body", "cut", "flip", "type", "nested"])
    if way == "field":
        name = rng.choice(sorted(WRONG))
        body[name] = rng.choice(WRONG[name])
    elif way == "junk":
        body["".join(rng.choices("abcdefg_", k=6))] = rng.choice(JUNK)
    elif way == "content":
        wrong = WRONG_MESSAGES if "chat" in route else [junk for junk in JUNK if not isinstance(junk, str)]
        body["messages" if "chat" in route else "prompt"] = rng.choice(wrong)
    elif way == "body":
        body = rng.choice(WRONG_BODIES)
    elif way in ("cut", "flip"):
        text = json.dumps(body).encode()
        place = rng.randrange(1, len(text) - 1)
        body = text[:place] if way == "cut" else b"\x00" + text[1:place] + b"\xff" + text[place:]
    elif way == "type":
        return route, json.dumps(body).encode(), {"Content-Type": rng.choice(["text/plain", "application/xml", ""])}
    else:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": rng.choice([5, "x", [{}]])}}]
    return route, body, {}


class TestFuzzing:
    def test_300_malformed_requests_disturb_nobody(self, server, model, tokenizer):
        """Each is refused with a reason, while a conversation goes on and the server's health is asked for."""
        seed = 0
        rng, waits, done = random.Random(seed), [], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                started = time.monotonic()
                assert server.health() == 200
                waits.append(time.monotonic() - started)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            talk = []
            for number in range(300):
                route, body, headers = malformed(rng)
                status, answer = server.post(body, route, **headers)
                case = f"request {number} of seed {seed}: {str(body)[:200]}: {status} {answer}"
                assert 400 <= status < 500 and answer["error"]["message"], case
                if number % 30 == 0:
                    talk.append(user(f"{number} were refused. Why?"))
                    reply, _ = server.chat(talk, tokens=4)
                    assert reply == read_afresh(model, tokenizer, talk, tokens=4)
                    talk.append(assistant(reply))
        finally:
            done.set()
            watcher.join()
        assert len(waits) > 10 and max(waits) < 1
