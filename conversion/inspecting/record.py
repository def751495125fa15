"""Reading a text segment by segment, and writing down what the memory does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...cache_armt import ARMTCache
from ...memory_armt import MemoryState, ReadTerms, WriteTerms
from ...modeling_armt import ARMTForCausalLM
from .weights import ReplayedWrites, one_hot_of_segment


MOST_GROUPS = 128
"""Segments that weights are kept apart for; in longer texts neighbours share a group."""


@dataclass
class LayerRecord:
    """
    One layer on one text, whose segments stand in R groups of neighbours; G of them were written.

    Attributes:
        A_norm, z_norm, gamma: by segment, norms after its write (z_norm empty without denominator) and mean gamma.
        weights: `(R, G)`, weight of each written group, mean over the tokens of each reading group; NaN where a group
            of one segment, the first, has read nothing.
        last_weights: `(P, G)`, of each token of the last segment.
    """

    A_norm: list[float] = field(default_factory=list)
    z_norm: list[float] = field(default_factory=list)
    gamma: list[float] = field(default_factory=list)
    weights: torch.Tensor | None = None
    last_weights: torch.Tensor | None = None


@dataclass
class Record:
    """
    What was seen on a text of T tokens.

    Attributes:
        ids: the text, `(T,)`.
        segment_size: S.
        group: segments in a group, 1 if the text has no more than `MOST_GROUPS`.
        layers: by index.
        loss, loss_alone: `(T - 1,)`, nats for each token but the first, read with memory and each segment alone.
        stats: [`ARMTCache.stats`] at the end.
    """

    ids: torch.Tensor
    segment_size: int
    group: int
    layers: dict[int, LayerRecord]
    loss: torch.Tensor
    loss_alone: torch.Tensor
    stats: dict[int, dict[str, Any]]

    @property
    def segments(self) -> int:
        """Whole segments, which were written."""
        return len(self.ids) // self.segment_size


@torch.no_grad()
def record(model: ARMTForCausalLM, ids: torch.Tensor, progress: Callable[[int], Any] = lambda tokens: None) -> Record:
    """
    Reads a text and writes down what the memories do.

    Args:
        model: in eval mode.
        ids: `(T,)`, more than one segment and a token.
        progress: called with the number of tokens of each segment that was read.

    Raises:
        ValueError: for a shorter text.
    """
    size = model.config.segment_size
    if len(ids) < size + 2:  # the last one is only predicted
        raise ValueError(
            f"the text has {len(ids)} tokens, but this model writes its memory after segments of {size} tokens: "
            f"only a text of at least {size + 2} shows what it does."
        )
    written, read = len(ids) // size, -(-len(ids) // size)
    group = -(-written // MOST_GROUPS)
    recorders = {layer: _Recorder(written, read, size, group) for layer in model.config.memory_layer_indices}
    cache, losses, losses_alone = ARMTCache(), [], []
    ids = ids.to(model.device)
    with _recording(model, recorders):
        for start in range(0, len(ids), size):
            piece, targets = ids[None, start : start + size], ids[start + 1 : start + size + 1]
            logits = model(piece, cache=cache, schedule="sequential").logits[0, : len(targets)]
            losses.append(nn.functional.cross_entropy(logits.float(), targets, reduction="none"))
            for recorder in recorders.values():
                recorder.number += 1
            progress(piece.shape[1])
    for start in range(0, len(ids), size):  # apart, since nothing of it is recorded
        piece, targets = ids[None, start : start + size], ids[start + 1 : start + size + 1]
        logits = model(piece, use_cache=False).logits[0, : len(targets)]
        losses_alone.append(nn.functional.cross_entropy(logits.float(), targets, reduction="none"))
    layers = {layer: recorder.finish() for layer, recorder in recorders.items()}
    loss, alone = (torch.cat(pieces).double().cpu() for pieces in (losses, losses_alone))
    return Record(ids.cpu(), size, group, layers, loss, alone, cache.stats())


class _Recorder:
    """Sees all reads and writes of one layer on one text."""

    def __init__(self, written: int, read: int, segment_size: int, group: int):
        self.segment_size, self.group = segment_size, group
        self.columns, rows = -(-written // group), -(-read // group)
        self.number = 0  # of the segment that is read
        self.found, self.replayed = LayerRecord(), None
        self.sums, self.counts = torch.zeros(rows, self.columns, dtype=torch.double), torch.zeros(rows, 1)

    def read(self, terms: ReadTerms) -> None:
        if self.replayed is None:  # nothing is written yet
            return
        weights = self.replayed.read(terms)[: self.segment_size]  # without memory tokens
        row = self.number // self.group
        self.sums[row] += weights.sum(0).cpu()
        self.counts[row] += len(weights)
        self.found.last_weights = weights

    def write(self, state: MemoryState, terms: WriteTerms) -> None:
        if self.replayed is None:
            self.replayed = ReplayedWrites(terms.k, self.columns)
        self.replayed.write(terms, one_hot_of_segment(self.number // self.group, terms, self.columns))
        self.found.A_norm.append(state.A.norm().item())
        self.found.gamma.append(terms.gamma.mean().item())
        if state.z is not None:
            self.found.z_norm.append(state.z.norm().item())

    def finish(self) -> LayerRecord:
        self.found.weights = self.sums / self.counts  # 0 / 0 where nothing was read
        self.found.last_weights = self.found.last_weights.cpu()
        return self.found


@contextmanager
def _recording(model: ARMTForCausalLM, recorders: dict[int, _Recorder]) -> Iterator[None]:
    """Shows the recorders what the memories do. Not for several threads: the memory modules are changed meanwhile."""
    memories = {layer: model.memory[str(layer)] for layer in recorders}
    for layer, memory in memories.items():
        _watch(memory, recorders[layer])
    try:
        yield
    finally:
        for memory in memories.values():
            del memory.read, memory.write


def _watch(memory: nn.Module, recorder: _Recorder) -> None:
    read, write = memory.read, memory.write

    def watched_read(x, state):
        x, terms = read(x, state)
        recorder.read(terms)
        return x, terms

    def watched_write(y, state, first=None):
        state, terms = write(y, state, first)
        recorder.write(state, terms)
        return state, terms

    memory.read, memory.write = watched_read, watched_write
