"""
One decode step of a batch at fixed shapes: everything it reads and writes lies in buffers that stay where they are.

`step` takes one token of every row through (read, layer) for every layer; `flush` takes the memory tokens of rows
whose segment is full through (read, layer, write) and drops the segment. Both work in place on the buffers, so that
they can be compiled, and captured as CUDA graphs. The layers are the backbone's own, run by its own forward.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.utils import logging

from .attachment_armt import attach_memories, attach_positions, find_decoder_layers, spread_positions
from .cache_armt import ARMTCache
from .compatibility_armt import CACHE
from .compilation_armt import is_passing
from .head_armt import run_head
from .memory_armt import MemoryState
from .native_armt import StandIn, with_layers
from .replay_armt import Replay
from .static_keys_armt import StaticKeys, bare_layer, load_keys, slot_masks, unload_keys
from .statistics_armt import LayerStatistics, read_extremes


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

logger = logging.get_logger(__name__)

Pairs = list[tuple[torch.Tensor, torch.Tensor]]

# Turns the products of a single row into sums, which run nearer to the speed of the memory; takes longer to compile.
SINGLE_ROW_OPTIONS = {"coordinate_descent_tuning": True}


class _StaticLayer(StandIn):
    """A decoder layer with the memory of a [`DecodeStep`] around it."""

    def __init__(self, layer: nn.Module, before: Callable | None, after: Callable | None):
        super().__init__(layer)
        self.__dict__.update(before=before, after=after)

    def forward(self, *args, **kwargs):
        layer, before, after = self.__dict__["layer"], self.__dict__["before"], self.__dict__["after"]
        if before is not None and args:
            args = (before(args[0]), *args[1:])
        elif before is not None:
            kwargs["hidden_states"] = before(kwargs["hidden_states"])
        output = layer(*args, **kwargs)
        if after is not None:
            after(output[0] if isinstance(output, tuple) else output)
        return output


class DecodeStep:
    """
    Buffers and passes for batches of one model. Not thread-safe: the caller holds a lock.

    Args:
        model: the model, used as it is: parameters are neither copied nor changed.
        like: by layer, keys and values of any token, `(1, heads, 1, head_dim)`, for their shapes and dtypes.
        masks: "by kind", "sliding" or "full": what the backbone takes as its 4D attention mask.
        compiles, captures: whether to use torch.compile and CUDA graphs.

    Attributes:
        ids: `(B, 1)`, the tokens to read.
        real: `(B,)` bool, False for rows whose token is padding.
        logits: `(B, 1, vocabulary)`, of each row's last real token. Overwritten by the next step.
        prepare_seconds: what first calls took so far, compilation and capture included.
    """

    def __init__(self, model: "ARMTPreTrainedModel", like: Pairs, masks: str, compiles: bool, captures: bool):
        config = model.config
        # Not the model itself, which owns this step.
        self.backbone, self.decoder_name, self.config = model.model, model.decoder_name, config
        self.embedding = model.get_input_embeddings()
        self.memory, self.memory_tokens = model.memory, model.memory_tokens
        self.like, self.masks, self.captures = like, masks, captures
        self.segment_size, self.num_mem_tokens = config.segment_size, config.num_mem_tokens
        needed = self.segment_size + self.num_mem_tokens + 1
        self.num_slots = -(-needed // 16) * 16  # aligned rows: products of odd sizes are slow
        self.spans = _spans(config.text_config, masks)
        self.dtype, self.device = self.embedding.weight.dtype, self.embedding.weight.device
        self._seconds, self._replays, self.batch_size = 0.0, (), 0
        self._pass, self._compiles, self._postponed = None, compiles, False
        num_layers = config.text_config.num_hidden_layers
        layers = [bare_layer(layer) for layer in find_decoder_layers(model.decoder, num_layers)]
        attach_memories(with_layers(model.decoder, num_layers, layers), num_layers, ())
        memory_layers = set(config.memory_layer_indices)

        def decoder(read: Callable, write: Callable | None) -> nn.Module:
            around = [
                _StaticLayer(layer, _bind(read, index), _bind(write, index))
                if index in memory_layers
                else _StaticLayer(layer, None, None)
                for index, layer in enumerate(layers)
            ]
            bare = with_layers(model.decoder, num_layers, around)
            if config.spread_memory_tokens:  # positions are passed
                rotary = bare.rotary_emb = copy.copy(bare.rotary_emb)
                rotary._forward_pre_hooks = rotary._forward_pre_hooks.copy()
                attach_positions(bare, None)
            return bare

        self.reader = decoder(self._read, None)
        self.writer = decoder(self._read_rows, self._write_rows)

    def resize(self, batch_size: int) -> None:
        """Makes the buffers for `batch_size` rows. What they held is lost."""
        size, self.batch_size = batch_size, 0  # 0 until there are all of them
        with torch.inference_mode(False), torch.no_grad():

            def slots(states: torch.Tensor) -> torch.Tensor:
                return states.new_zeros(size, states.shape[1], self.num_slots, states.shape[3])

            self.keys, self.values = ([slots(states) for states in kind] for kind in zip(*self.like, strict=True))
            self.states = {
                index: self.memory[str(index)].zero_state(size, self.device)
                for index in self.config.memory_layer_indices
            }
            # Reads are bound by the bytes of A, which is constant within a segment.
            short = self.dtype == torch.bfloat16
            self.read_A = {index: s.A.to(self.dtype) if short else s.A for index, s in self.states.items()}
            empty = LayerStatistics.new(size, next(iter(self.states.values())).A)
            self.of_all_layers = empty.map(lambda tensor: tensor.repeat(len(self.states), 1, 1))
            self.statistics = {
                index: self.of_all_layers.map(lambda tensor, number=number: tensor[number])
                for number, index in enumerate(self.states)
            }
            self.ids = torch.zeros(size, 1, dtype=torch.long, device=self.device)
            self.real = torch.ones(size, dtype=torch.bool, device=self.device)
            self.position = torch.zeros(size, dtype=torch.long, device=self.device)
            self.written = torch.zeros(size, dtype=torch.bool, device=self.device)
            self.rows = torch.arange(size, device=self.device)
            self.one_row = self.rows[:1].clone()
        self.batch_size = size
        self.last_hidden = self.logits = self._flushed = None
        if self._compiles:
            options = SINGLE_ROW_OPTIONS if size == 1 and self.device.type == "cuda" else None
            self._pass = torch.compile(self._read_token, dynamic=False, options=options)
        self.recapture()

    def recapture(self) -> None:
        """Forgets the CUDA graphs, as when weights have moved."""
        self._seconds = self.prepare_seconds
        self._step = Replay(self._run, self.captures)
        self._flush_one = Replay(lambda: self._flush_rows(self.one_row), self.captures)
        self._flush_all = Replay(lambda: self._flush_rows(self.rows), self.captures)
        self._replays = (self._step, self._flush_one, self._flush_all)

    @property
    def prepare_seconds(self) -> float:
        return self._seconds + sum(replay.seconds for replay in self._replays)

    @property
    def is_captured(self) -> bool:
        """Whether steps are replays of a CUDA graph by now."""
        return self._step.graph is not None

    @property
    def is_ready(self) -> bool:
        """Whether a step takes the host no time, as far as it can be."""
        return self.is_captured or not self.captures

    def clear(self) -> None:
        """The end: lets go of weights and buffers, which compiled code, referring to itself, would keep a while."""
        self.__dict__.clear()

    # A conversation in the buffers

    @property
    def buffers(self) -> Pairs:
        return list(zip(self.keys, self.values, strict=True))

    def load(self, cache: ARMTCache) -> None:
        """Copies a conversation into the buffers."""
        self._postponed = False  # there may be memory for it now
        with torch.inference_mode(False), torch.no_grad():
            load_keys(cache.keys, cache.opened, self.buffers)
            for index, buffer in self.states.items():
                state = cache.states.get(index)
                for name, tensor in buffer._asdict().items():
                    if tensor is not None:
                        tensor.zero_() if state is None else tensor.copy_(getattr(state, name))
                if self.read_A[index] is not buffer.A:
                    self.read_A[index].copy_(buffer.A)
            for index, buffers in self.statistics.items():
                known = cache.statistics.get(index)
                if known is None:
                    known = LayerStatistics.new(self.batch_size, self.states[index].A)
                for buffer, tensor in zip(buffers, known, strict=True):
                    buffer.copy_(tensor)
            if self.last_hidden is None:
                # Not `empty_like`: a single row of something longer keeps its stride, which is compiled in.
                last_hidden = cache.last_hidden.new_empty(cache.last_hidden.shape)
                self._saved = [torch.empty_like(t) for t in (last_hidden, self.of_all_layers.reads, self.position)]
                self.last_hidden = last_hidden
            self.last_hidden.copy_(cache.last_hidden)
            self.position.copy_(torch.tensor(cache.opened))
            self.written.copy_(torch.tensor(cache.segments) > 0)

    def unload(self, opened: list[int], segments: list[int]) -> dict:
        """The tensors of an [`ARMTCache`] as they are now, in memory of their own."""
        statistics, states = {}, dict.fromkeys(self.states)
        if any(segments):
            states, statistics = (
                {index: tensors.map(torch.Tensor.clone) for index, tensors in by_layer.items()}
                for by_layer in (self.states, self.statistics)
            )
        keys = unload_keys(opened, self.buffers)
        return {"keys": keys, "states": states, "statistics": statistics, "last_hidden": self.last_hidden.clone()}

    # One token of every row

    def step(self) -> None:
        """Reads `ids`; leaves `logits`. Rows that are not `real` stay as they are."""
        self._step()

    def _run(self) -> None:
        self._save()
        if not self._run_compiled():
            self._read_token()
        self.logits = run_head(self.backbone, self.decoder_name, self.last_hidden[:, None])

    def _run_compiled(self) -> bool:
        """Reads a token by compiled code, if there is any."""
        if self._pass is None or self._postponed:
            return False
        try:
            # One entry for each batch size, and each time the weights changed shape or dtype.
            with torch._dynamo.config.patch(recompile_limit=64):
                self._pass()
        except Exception as error:
            if self.captures and torch.cuda.is_current_stream_capturing():
                raise
            self.restore()  # it may have got anywhere
            self._postponed = True
            if not is_passing(error):
                self._pass, self._compiles = None, False
            logger.warning(f"the decode step cannot be compiled ({error}); it runs as it is.")
        return not self._postponed

    def _read_token(self) -> None:
        place, real = self.position[:, None], self.real[:, None]
        slots = torch.where(real, place, self.num_slots - 1)
        keys = StaticKeys(self.keys, self.values, self.rows, slots, all_rows=True)
        embeddings = self.embedding(self.ids)
        self._seen = {}
        hidden = self._decode(self.reader, embeddings, place, self.real, keys)[:, 0]
        self._take_in_reads()
        self.last_hidden.copy_(torch.where(real, hidden, self.last_hidden))
        self.position.add_(self.real)

    def _decode(
        self,
        decoder: nn.Module,
        embeddings: torch.Tensor,
        place: torch.Tensor,
        real: torch.Tensor | None,
        keys: StaticKeys,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        masks = slot_masks(place, real, self.num_slots, self.dtype, self.spans)
        return (
            type(decoder)
            .forward(
                decoder,
                inputs_embeds=embeddings,
                attention_mask=masks if self.masks == "by kind" else masks[self.masks],
                position_ids=place if positions is None else positions,
                **{CACHE: keys},
                use_cache=True,
                return_dict=True,
            )
            .last_hidden_state
        )

    def _read(self, index: int, x: torch.Tensor) -> torch.Tensor:
        state = self.states[index]
        if x.dtype == self.dtype:
            state = MemoryState(self.read_A[index], state.z)
        read, terms = self.memory[str(index)].read(x, state)
        self._seen[index] = read_extremes(x, terms, self.states[index].A)
        return read

    def _take_in_reads(self) -> None:
        """The statistics of all layers at once: more kernels in every layer would be more than they are worth."""
        seen = torch.stack([self._seen[index] for index in self.states])
        self.of_all_layers.reads.copy_(self.of_all_layers.after_read(seen, ~(self.real & self.written)[:, None]).reads)

    def _save(self) -> None:
        """Keeps what a step overwrites, for [`restore`]. Part of the step, and of its graph."""
        for saved, buffer in zip(self._saved, self._overwritten(), strict=True):
            saved.copy_(buffer)

    def restore(self, opened: list[int] | None = None) -> None:
        """
        Takes back the last step, also one that failed halfway. Its keys and values stay, where nothing looks.

        Args:
            opened: tokens in each row's open segment before it, if it may have failed before it changed anything.
        """
        if opened is not None and self._saved[-1].tolist() != opened:
            return
        for saved, buffer in zip(self._saved, self._overwritten(), strict=True):
            buffer.copy_(saved)

    def _overwritten(self) -> tuple[torch.Tensor, ...]:
        return self.last_hidden, self.of_all_layers.reads, self.position

    # The end of a segment

    def flush(self, rows: list[int]) -> None:
        """
        Writes the segments of `rows`, which are full, to memory, and starts new ones. If it fails, the memories are
        as they were.
        """
        every = len(rows) == self.batch_size
        flush = self._flush_all if every else self._flush_one
        kept = [] if flush.graph is not None else self._copies(rows)  # the replay of a graph does not fail
        try:
            if every:
                return flush()
            for row in rows:
                self.one_row.fill_(row)
                flush()
        except BaseException:
            for buffer, index, before in kept:
                buffer.index_copy_(0, index, before)
            raise

    def _copies(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What a flush of `rows` overwrites: `(buffer, rows, what they hold)`."""
        buffers = [self.written]
        for index, state in self.states.items():
            buffers += [*state, *self.statistics[index], self.read_A[index]]
        index = torch.tensor(rows, device=self.device)
        return [(buffer, index, buffer[index]) for buffer in buffers if buffer is not None]

    def _flush_rows(self, rows: torch.Tensor) -> None:
        number = torch.arange(self.num_mem_tokens, device=self.device)
        place = (self.segment_size + number).repeat(len(rows), 1)
        keys = StaticKeys(self.keys, self.values, rows, place, all_rows=False)
        embeddings = self.memory_tokens(number).to(self.dtype).repeat(len(rows), 1, 1)
        self._flushed = rows
        positions = place
        if self.config.spread_memory_tokens:
            positions = spread_positions(place, self.segment_size, self.num_mem_tokens)
        self._decode(self.writer, embeddings, place, None, keys, positions)
        self.written.index_fill_(0, rows, True)
        self.position.index_fill_(0, rows, 0)

    def _read_rows(self, index: int, x: torch.Tensor) -> torch.Tensor:
        rows = self._flushed
        read, terms = self.memory[str(index)].read(x, self.states[index].map(lambda t: t[rows]))
        statistics = self.statistics[index].map(lambda t: t[rows])
        seen = read_extremes(x, terms, statistics.reads)
        self._keep(index, statistics.after_read(seen, ~self.written[rows][:, None]))
        return read

    def _write_rows(self, index: int, y: torch.Tensor) -> None:
        rows, buffer = self._flushed, self.states[index]
        first = ~self.written[rows]
        new, terms = self.memory[str(index)].write(y, buffer.map(lambda tensor: tensor[rows]), first)
        buffer.A.index_copy_(0, rows, new.A)
        if buffer.z is not None:
            buffer.z.index_copy_(0, rows, new.z)
        if self.read_A[index] is not buffer.A:
            self.read_A[index].index_copy_(0, rows, new.A.to(self.dtype))
        statistics = self.statistics[index].map(lambda tensor: tensor[rows])
        self._keep(index, statistics.after_write(new.A, terms, first, None))

    def _keep(self, index: int, statistics: LayerStatistics) -> None:
        for buffer, tensor in zip(self.statistics[index], statistics, strict=True):
            buffer.index_copy_(0, self._flushed, tensor)


def _bind(function: Callable | None, index: int) -> Callable | None:
    return None if function is None else lambda x: function(index, x)


def _spans(backbone_config, masks: str) -> dict[str, tuple]:
    """What the masks of each kind of layer let a position see: `(window, chunk)`."""
    window = getattr(backbone_config, "sliding_window", None)
    spans = {
        "full_attention": (None, None),
        "sliding_attention": (window, None),
        "chunked_attention": (None, getattr(backbone_config, "attention_chunk_size", None)),
    }
    if masks == "by kind":
        return {kind: spans.get(kind, (None, None)) for kind in set(backbone_config.layer_types)}
    return {masks: spans[f"{masks}_attention"]}
