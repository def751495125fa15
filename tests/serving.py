"""A server of a tiny model, and clients of it."""

import http.client
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.demo import BACKBONE


pytest.importorskip("fastapi", reason="needs the extra: pip install 'modeling-armt[serve]'")
openai = pytest.importorskip("openai", reason="needs the extra: pip install 'modeling-armt[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra: pip install 'modeling-armt[serve]'")

from modeling_armt.conversion.serving.serve import listen  # noqa: E402 (needs the extra)
from modeling_armt.conversion.serving.server import build_app  # noqa: E402


SEGMENT_SIZE = 8
TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}[assistant]"
FACTS = {name: f"{name} has the {thing}. " for name, thing in {"Mary": "gold", "John": "letter"}.items()}
TEXT = "It was a fine day, and nobody thought of the war. " * 6
LONG = TEXT * 10  # more than 100 segments
TOO_LONG = 100_000  # tokens of a reply that would take far longer than a test may


def words_tokenizer() -> PreTrainedTokenizerBase:
    """That of the demonstration, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def model_that_remembers(tokenizer: PreTrainedTokenizerBase) -> ARMTForCausalLM:
    """A random model whose replies depend on all that it read, in words that come back as the tokens they were."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    backbone = LlamaForCausalLM(config).eval()
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model = ARMTForCausalLM.from_backbone(backbone, segment_size=SEGMENT_SIZE, num_mem_tokens=2, d_mem=16)
    for memory in model.memory.values():
        torch.nn.init.normal_(memory.memory_value.weight, std=0.1)
    # Whole words only, which come back from a client as the tokens that they were.
    words = [i for i in range(len(tokenizer)) if re.fullmatch(" [a-z]+", tokenizer.decode([i]))]
    words = {i for i in words if tokenizer(tokenizer.decode([i]))["input_ids"] == [i]}
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - words)
    return model


class Served:
    """A server in a thread, and how to talk to it."""

    def __init__(self, port: int, key: str = "none"):
        self.url = f"http://127.0.0.1:{port}/v1"
        self.port = port
        self.client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def chat(self, messages: list[dict], stream: bool = False, tokens: int = 12, **options) -> tuple[str, object]:
        """The reply and its usage."""
        options = {"model": "tiny", "messages": messages, "max_tokens": tokens, "temperature": 0, **options}
        if not stream:
            answer = self.client.chat.completions.create(**options)
            return answer.choices[0].message.content, answer.usage
        text, usage = "", None
        for chunk in self.client.chat.completions.create(**options, stream=True):
            text += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
        return text, usage

    def post(self, body: object, route: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict]:
        """Status and answer of a request that need not be one."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._ask("POST", route, content, {"Content-Type": "application/json", **headers})

    def health(self) -> int:
        """The status of the server's health."""
        return self._ask("GET", "/health", None, {})[0]

    def _ask(self, method: str, route: str, content: bytes | None, headers: dict[str, str]) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, route, content, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def still_answers(self) -> bool:
        return bool(self.chat([user("Are you there?")], tokens=2)[0])


@contextmanager
def served(model, tokenizer, **options) -> Iterator[Served]:
    listener = listen("127.0.0.1", 0)
    app = build_app(model, tokenizer, "tiny", **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    served = Served(listener.getsockname()[1])
    try:
        yield served
    finally:
        served.client.close()
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def read_afresh(model, tokenizer, messages: list[dict], tokens: int = 12) -> str:
    """What the model says to a conversation that it reads from its start."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    return tokenizer.decode(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :])


def cached(usage) -> int:
    return usage.prompt_tokens_details.cached_tokens
