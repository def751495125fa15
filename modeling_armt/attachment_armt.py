"""
How memories are attached to a backbone: hooks on its decoder layers, which read before a layer and write after it.

The backbone stays as it is: same class, same parameter names, same forward. The hooks hold nothing but the index of
their layer. What they work on, a [`SegmentPass`], lives in a ContextVar for the time of one pass of one segment: two
threads never meet, a copied model has no ties to the original, and without a pass the hooks do nothing. (A keyword
argument would do too, if all decoders handed theirs on to their layers: gpt_neo, gptj, falcon, mpt and bloom do not.)

With `spread_memory_tokens` another hook turns memory tokens to other positions than they stand at, in the rotary
embedding alone: masks go by where tokens stand.
"""

import functools
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn

from .memory_armt import AssociativeMemory, MemoryState
from .statistics_armt import LayerStatistics, read_extremes


_current_pass: ContextVar["SegmentPass | None"] = ContextVar("armt_segment_pass", default=None)
_segment_ends: ContextVar[torch.Tensor | int | None] = ContextVar("armt_segment_ends", default=None)


@dataclass
class SegmentPass:
    """
    What the hooks need during one pass of the backbone, and what they leave behind.

    Args:
        memories: the [`AssociativeMemory`] modules by layer index (as a string, the way a ModuleDict keeps them).
        states: the state of each layer before the pass, None where nothing was written yet; afterwards the new states.
        num_mem_tokens: m.
        write_at: `(B,)` column of each row's first memory token, or an int for all rows; None if no row writes.
        ends: `(B, 1)` position of each row's first memory token in its segment, or an int for all rows; None if no
            row writes.
        writing_rows: `(B,)` bool, the rows that write; None means all.
        unwritten_rows: `(B,)` bool, the rows that have never written; None means none of those with a state.
        filler: `(B, P)` bool, positions that hold neither a real nor a memory token; None means none.
        statistics: by layer, replaced if given.
    """

    memories: Mapping[str, AssociativeMemory]
    states: dict[int, MemoryState | None]
    num_mem_tokens: int
    write_at: torch.Tensor | int | None = None
    ends: torch.Tensor | int | None = None
    writing_rows: torch.Tensor | None = None
    unwritten_rows: torch.Tensor | None = None
    filler: torch.Tensor | None = None
    statistics: dict[int, LayerStatistics] | None = None
    fired: list[tuple[str, int]] = field(default_factory=list)

    def read(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Before a layer: `(B, P, D)` input to `(B, P, D)` input with the memory's answer added."""
        self.fired.append(("read", layer))
        state = self.states[layer]
        if state is None:  # reading an empty memory adds exactly 0
            return x
        read, terms = self.memories[str(layer)].read(x, state)
        if self.statistics is not None:
            ignore = self.filler
            if self.unwritten_rows is not None:
                rows = self.unwritten_rows[:, None]
                ignore = rows if ignore is None else rows | ignore
            known = self._statistics(layer, state)
            self.statistics[layer] = known.after_read(read_extremes(x, terms, known.reads), ignore)
        return read

    def write(self, layer: int, y: torch.Tensor) -> None:
        """After a layer: takes the memory tokens out of its `(B, P, D)` output and stores them."""
        self.fired.append(("write", layer))
        if self.write_at is None:
            return
        memory, old = self.memories[str(layer)], self.states[layer]
        first = self.unwritten_rows
        if old is None:
            old = memory.zero_state(y.shape[0], memory.device or y.device)
            first = torch.ones(y.shape[0], dtype=torch.bool)
        if first is not None:
            first = first.to(old.A.device)
        new, terms = memory.write(self._memory_tokens(y), old, first)
        writing = None if self.writing_rows is None else self.writing_rows.to(old.A.device)
        if self.statistics is not None:
            self.statistics[layer] = self._statistics(layer, old).after_write(new.A, terms, first, writing)
        self.states[layer] = new if writing is None else new.where(writing, old)

    def _statistics(self, layer: int, state: MemoryState) -> LayerStatistics:
        return self.statistics.get(layer) or LayerStatistics.new(len(state.A), state.A)

    def _memory_tokens(self, y: torch.Tensor) -> torch.Tensor:
        if isinstance(self.write_at, int):
            return y[:, self.write_at : self.write_at + self.num_mem_tokens]
        columns = self.write_at.to(y.device)[:, None] + torch.arange(self.num_mem_tokens, device=y.device)
        return y[torch.arange(y.shape[0], device=y.device)[:, None], columns]

    @contextmanager
    def active(self):
        """Lets the hooks see this pass. Raises RuntimeError if a layer ran without its memory."""
        token = _current_pass.set(self)
        try:
            with segments_of(self.ends):
                yield self
        finally:
            _current_pass.reset(token)
        expected = [(kind, layer) for layer in sorted(self.states) for kind in ("read", "write")]
        if sorted(self.fired) != sorted(expected):
            raise RuntimeError(
                f"the memory hooks fired as {self.fired}, expected {expected}: the backbone does not run every "
                "decoder layer exactly once in a forward, so this family cannot carry a memory."
            )


def _read_before(layer: int, module: nn.Module, args: tuple, kwargs: dict):
    current = _current_pass.get()
    if current is None:
        return None
    if args:
        return (current.read(layer, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": current.read(layer, kwargs["hidden_states"])}


def _write_after(layer: int, module: nn.Module, args: tuple, output) -> None:
    current = _current_pass.get()
    if current is not None:
        current.write(layer, output[0] if isinstance(output, tuple) else output)


MEMORY_HOOKS = (_read_before, _write_after)


@contextmanager
def segments_of(ends: torch.Tensor | int | None):
    """Tells the rotary embedding how long the segments are that end in a pass, as [`SegmentPass`] has it."""
    token = _segment_ends.set(ends)
    try:
        yield
    finally:
        _segment_ends.reset(token)


def spread_positions(positions: torch.Tensor, ends: torch.Tensor | int, num_mem_tokens: int) -> torch.Tensor:
    """
    Positions `(B, P)` in a segment, where those of memory tokens are spread over it: number j of m gets the position
    after the (j + 1)-th m-th of the segment. There a pretrained backbone looks at what stands before, each memory
    token at another part; behind the segment all of them look at its last sentence.
    """
    behind = positions - ends
    shares = torch.minimum((behind + 1) * ends // num_mem_tokens, positions)
    return torch.where(behind >= 0, shares, positions)


def _spread_before(num_mem_tokens: int, module: nn.Module, args: tuple, kwargs: dict):
    ends = _segment_ends.get()
    if ends is None:
        return None
    if len(args) > 1:
        return (args[0], spread_positions(args[1], ends, num_mem_tokens), *args[2:]), kwargs
    return args, {**kwargs, "position_ids": spread_positions(kwargs["position_ids"], ends, num_mem_tokens)}


def attach_positions(decoder: nn.Module, num_mem_tokens: int | None) -> None:
    """
    Puts the hook on the rotary embedding of `decoder`, or only takes away that of an earlier call.

    Raises:
        ValueError: if the decoder has no rotary embedding.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    hooks = {} if rotary is None else rotary._forward_pre_hooks
    for handle in [key for key, hook in hooks.items() if getattr(hook, "func", None) is _spread_before]:
        del hooks[handle]
    if num_mem_tokens is None:
        return
    if rotary is None:
        raise ValueError(
            f"spread_memory_tokens turns rotary positions, and {type(decoder).__name__} has none. Leave it out."
        )
    rotary.register_forward_pre_hook(functools.partial(_spread_before, num_mem_tokens), with_kwargs=True)


def find_decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    """
    The list of decoder layers of a backbone without head.

    Raises:
        ValueError: if there is no ModuleList with `num_layers` entries.
    """
    for module in decoder.modules():  # breadth does not matter: the layers' own lists come after the list of layers
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"{type(decoder).__name__} has no list of {num_layers} decoder layers to attach memories to; "
        "ARMT works on plain decoders only."
    )


def find_decoder(backbone: nn.Module, num_layers: int) -> str:
    """The name of the child of a causal language model that holds its decoder layers."""
    for name, child in backbone.named_children():
        if any(isinstance(module, nn.ModuleList) and len(module) == num_layers for module in child.modules()):
            return name
    raise ValueError(f"{type(backbone).__name__} has no part with a list of {num_layers} decoder layers.")


def causal_table_size(decoder: nn.Module) -> int | None:
    """The columns that a pass may have where attention looks its causal mask up in a table (gpt_neo); else None."""
    tables = [table for name, table in decoder.named_buffers() if name.endswith("attention.bias") and table.dim() == 4]
    return min((table.shape[-1] for table in tables), default=None)


def attach_memories(decoder: nn.Module, num_layers: int, memory_layers: Iterable[int]) -> None:
    """Puts the hooks on the layers of `decoder` that have a memory, and takes away those of an earlier call."""
    layers = find_decoder_layers(decoder, num_layers)
    for part in layers.modules():  # a layer that somebody has wrapped meanwhile still has them
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for handle in [key for key, hook in hooks.items() if getattr(hook, "func", None) in MEMORY_HOOKS]:
                del hooks[handle]
    for index in memory_layers:
        layers[index].register_forward_pre_hook(functools.partial(_read_before, index), with_kwargs=True)
        layers[index].register_forward_hook(functools.partial(_write_after, index))


def are_attached(decoder: nn.Module, num_layers: int, memory_layers: Iterable[int]) -> bool:
    """
    Whether the hooks are on the layers as the decoder has them now. FSDP's plugins wrap layers for activation
    checkpointing, after which hooks on what is inside would run again in the backward pass, when there is no pass.
    """
    layers = find_decoder_layers(decoder, num_layers)
    hooks = [layers[index]._forward_hooks.values() for index in memory_layers]
    return all(any(getattr(hook, "func", None) is _write_after for hook in of_layer) for of_layer in hooks)
