"""A model whose `generate` goes on from what earlier calls have read."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ...cache_armt import ARMTCache
from ...modeling_armt import ARMTForCausalLM
from .sessions import Session, Sessions


class Cancelled(Exception):
    """Nobody waits for this reply any more."""


class Turn:
    """
    One request.

    Attributes:
        owner: who asks; conversations are kept apart by it.
        seed: of what is sampled; None for whatever comes.
        cached_tokens: ids of the prompt that an earlier turn had read.
        cancelled: set when its client is gone.
    """

    def __init__(self, owner: str = ""):
        self.owner = owner
        self.seed: int | None = None
        self.cached_tokens = 0
        self.cancelled = threading.Event()

    def check(self, *args: Any) -> None:
        if self.cancelled.is_set():
            raise Cancelled("the client is gone")


class ClientGone(StoppingCriteria):
    """Ends a generation that nobody waits for."""

    def __init__(self, turn: Turn):
        self.turn = turn

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.turn.cancelled.is_set(), device=input_ids.device)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Within it torch's generators start at `seed`, if there is one; afterwards they go on as if nothing had been."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


class RememberingModel:
    """
    What the server of transformers takes for the model: `generate` gets a whole conversation, and reads what is new.

    All calls must come from one thread, as those of that server do.

    Args:
        model: an ARMT model.
        sessions: where conversations are kept.
    """

    def __init__(self, model: ARMTForCausalLM, sessions: Sessions):
        self.model, self.sessions = model, sessions
        self.device, self.generation_config, self.name_or_path = model.device, model.generation_config, "armt"
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        # The server finds the parser for tool calls by the family, which is the backbone's.
        self.config = model.config.text_config
        # A moment's work, so that a client who leaves is noticed.
        self.block_segments = 256 if model.device.type == "cuda" else max(1, 4096 // model.config.segment_size)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        turn: Turn,
        generation_config: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase,
        streamer: Any = None,
        **kwargs,
    ) -> torch.LongTensor:
        """
        Args:
            input_ids: `(1, T)`, the whole conversation.
            turn: whose request it is; told how many ids had been read before, and may cancel the call.
            generation_config, tokenizer, streamer: as for `generate` of any model.
            kwargs: what else a tokenizer returns; a single text needs no mask.

        Returns:
            `(1, T + new)` ids, those of the prompt first.

        Raises:
            Cancelled: if the client is gone. Nothing of the reply is remembered.
            ValueError: for options that `generate` refuses.
        """
        turn.check()
        prompt, last = input_ids[0].cpu(), input_ids.shape[1] - 1
        start = self.sessions.find(prompt, turn.owner)
        turn.cached_tokens = start.length
        memories = {start.length: start.cache} if start.length else {}
        cache, read = start.cache.fork(), start.length
        if start.shared - read >= self.model.config.segment_size:  # where two conversations part, a third may come
            read = self._read(prompt, read, start.shared, cache, turn)
            start.branches[read] = cache.fork()
        if last > read:
            read = self._read(prompt, read, last, cache, turn)
        memories[read] = cache
        session = Session(prompt[:last], last, memories, start.branches, turn.owner)
        self.sessions.keep(session, instead_of=start.session)

        reply = cache.fork()
        with seeded(turn.seed, self.device):
            sequences = self.model.generate(
                input_ids[:, last:],
                cache=reply,
                generation_config=generation_config,
                tokenizer=tokenizer,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([ClientGone(turn)]),
            )
        turn.check()
        if reply.batch_size == 1:  # beams leave the memories of several replies
            if int(sequences[0, -1]) not in tokenizer.all_special_ids:  # an end comes back as the template has it
                self.model.read(sequences[:, -1:], reply)
            read += sum(reply.tokens) - sum(cache.tokens)
            ids = torch.cat([prompt[:last], sequences[0, : read - last].cpu()])
            whole = Session(ids, last + 1, {**memories, read: reply}, start.branches, turn.owner)
            self.sessions.keep(whole, instead_of=session)
        return torch.cat([input_ids[:, :last], sequences[:1]], dim=1)

    def _read(self, prompt: torch.Tensor, start: int, end: int, cache: ARMTCache, turn: Turn) -> int:
        """Reads a part of the prompt. Returns where it ends."""
        self.model.read(prompt[start:end], cache, block_segments=self.block_segments, progress=turn.check)
        return end
