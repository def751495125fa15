"""A model whose `generate` goes on from what earlier calls have read."""

import threading
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
        cached_tokens: ids of the prompt that an earlier turn had read.
        cancelled: set when its client is gone.
    """

    def __init__(self):
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
            turn: told how many ids had been read before; may cancel the call.
            generation_config, tokenizer, streamer: as for `generate` of any model.
            kwargs: what else a tokenizer returns; a single text needs no mask.

        Returns:
            `(1, T + new)` ids, those of the prompt first.

        Raises:
            Cancelled: if the client is gone. Nothing of the reply is remembered.
            ValueError: for an empty prompt, or options that `generate` refuses.
        """
        turn.check()
        if input_ids.shape[1] == 0:
            raise ValueError("the prompt is empty: there is nothing to go on from.")
        prompt, last = input_ids[0].cpu(), input_ids.shape[1] - 1
        start = self.sessions.find(prompt)
        turn.cached_tokens = start.length
        memories = {start.length: start.cache} if start.length else {}
        cache, read = start.cache.fork(), start.length
        if start.shared - read >= self.model.config.segment_size:  # where two conversations part, a third may come
            read = self._read(prompt, read, start.shared, cache, turn)
            start.branches[read] = cache.fork()
        if last > read:
            read = self._read(prompt, read, last, cache, turn)
        memories[read] = cache
        session = Session(prompt[:last], last, memories, start.branches)
        self.sessions.keep(session, instead_of=start.session)

        reply = cache.fork()
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
            self.sessions.keep(Session(ids, last + 1, {**memories, read: reply}, start.branches), instead_of=session)
        return torch.cat([input_ids[:, :last], sequences[:1]], dim=1)

    def _read(self, prompt: torch.Tensor, start: int, end: int, cache: ARMTCache, turn: Turn) -> int:
        """Reads a part of the prompt. Returns where it ends."""
        self.model.read(prompt[start:end], cache, block_segments=self.block_segments, progress=turn.check)
        return end
