"""The stock `generate` on top of a recurrent memory: which modes work, and what a finished row must not do."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

import torch
from transformers import GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation import GenerationMode

from .cache_armt import ARMTCache
from .compatibility_armt import CACHE, one_cache, with_both_names
from .decode_armt import read_ahead, undo_ahead


class FinishedRows(StoppingCriteriaList):
    """
    Stopping criteria that remember which rows they have stopped. `generate` goes on appending padding to these rows
    and marks it as real input; it must not reach their memory. The token that stopped a row is still the row's own.

    They see every new token before `generate` waits for the device, which is the time to begin reading it.

    Attributes:
        started: whether a token was generated.
        padded: `(B,)` bool, the rows whose newest column is padding; None before the second token.
        read_next: called with `(B, 1)`, the newest column, if it is going to be read; None where it must not.
    """

    started = False
    padded: torch.Tensor | None = None
    read_next: Callable[[torch.LongTensor], None] | None = None
    _stopped: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.started, self.padded = True, self._stopped
        self._stopped = done if self._stopped is None else self._stopped | done
        if self.read_next is not None and input_ids.shape[1] != self.max_length:
            self.read_next(input_ids[:, -1:])
        return done


# What generate holds for itself; the stock `prepare_inputs_for_generation` drops it too.
_NOT_FOR_FORWARD = ("next_sequence_length", "is_first_iteration", "labels")

_finished_rows: ContextVar[FinishedRows | None] = ContextVar("armt_finished_rows", default=None)


class ARMTGenerationMixin(GenerationMixin):
    """Greedy search, sampling and beams as for any model; what needs to undo or share a cache is refused."""

    _is_stateful = True  # other code asks this before it rolls a cache back
    _supported_generation_modes = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]

    def _validate_generation_mode(self, generation_mode, *args, **kwargs):
        if generation_mode not in self._supported_generation_modes:
            raise ValueError(
                f"{generation_mode} is not supported: it takes back tokens or runs them twice, and what is written to "
                "an associative memory cannot be taken back. Use greedy search, sampling or beams."
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the ARMTCache

    def generate(self, *args, **kwargs):
        """
        [`GenerationMixin.generate`] with a prompt of any length. `cache` may be an [`ARMTCache`]: one that
        an earlier call returned, together with the full ids so far, or a `fork()` or loaded memory, with new ids only.

        Raises:
            ValueError: for cache implementations and generation modes that a recurrent memory cannot serve.
        """
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None and not isinstance(cache, ARMTCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}; an ARMT model keeps its memory in an ARMTCache, which "
                "it makes itself. Leave cache out, or pass one that this model returned."
            )
        if cache is not None:
            kwargs[CACHE] = cache
        prompts = (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        ids = next((prompt for prompt in prompts if prompt is not None), None)
        if ids is not None and ids.dim() > 1 and ids.shape[1] == 0:
            raise ValueError("the prompt is empty: generate needs at least one token to go on from.")
        if cache is not None and cache.columns:
            mask = kwargs.get("attention_mask")
            if ids is not None and ids.shape[1] <= cache.columns and (mask is None or mask.shape[1] == ids.shape[1]):
                raise ValueError(
                    f"the prompt has {ids.shape[1]} columns, but this cache has read {cache.columns} in this "
                    "conversation. Pass all ids from its start, or only new ids with cache.fork()."
                )
        for config in (*args[1:2], kwargs.get("generation_config"), self.generation_config):
            implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
            if implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation={implementation!r} does not fit a recurrent memory: an ARMTCache has "
                    "constant size as it is. Leave the option out."
                )
        token = _finished_rows.set(None)
        try:
            return with_both_names(super().generate(*args, **kwargs))
        finally:
            undo_ahead(self)
            _finished_rows.reset(token)

    # The backbone's longest text bounds a segment, not what is generated: no default and no reminder comes from it.

    def _prepare_generated_length(self, generation_config, has_default_max_length, input_ids_length, **kwargs):
        new_tokens = generation_config.max_length
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            input_ids_length=input_ids_length,
            **kwargs,
        )
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = new_tokens + input_ids_length
        return generation_config

    def _get_stopping_criteria(self, generation_config, *args, **kwargs):
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        if generation_config.num_beams == 1:  # beams that end leave the batch by themselves
            criteria = FinishedRows(criteria)
            _finished_rows.set(criteria)
        return criteria

    def _prefill(self, input_ids, generation_config, *args, **kwargs):
        generation_config.prefill_chunk_size = None  # whatever its length, a prompt is read segment by segment
        return super()._prefill(input_ids, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, attention_mask=None, **kwargs):
        kwargs.pop("tokenizer", None)  # generate hands on what it needs for stop strings
        finished, cache = _finished_rows.get(), kwargs.get(CACHE)
        generated = cache is not None and finished is not None and finished.started
        if generated:
            # The mask of the prompt says nothing about the column that was generated.
            padded = finished.padded
            some = padded is not None and len(padded) > 1 and bool(padded.any())
            attention_mask = ~padded[:, None] if some else None
            if self.fast.enabled and kwargs.get("next_sequence_length") == 1:
                # Rows that end now are seen too late: then what was begun is undone.
                finished.read_next = None if some else partial(read_ahead, self, cache=cache)
                known = {"input_ids": input_ids[:, -1:]}
                rest = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_FORWARD}
                return {**rest, **known, "attention_mask": attention_mask}
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(
            "continuous batching shares paged attention caches between requests, which a recurrent memory does not "
            "have. Use generate with a padded batch; rows do not influence each other."
        )

    continuous_batching_context_manager = init_continuous_batching
    generate_batch = init_continuous_batching
