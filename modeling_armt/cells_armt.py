"""The cells (segment, layer) of equal layers: read, layer, write, for all of them in one call."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from .memory_armt import MemoryState
from .native_armt import NativeCall
from .stacked_memory_armt import StackedMemory, memory_weights
from .stacking_armt import LayerGroup
from .statistics_armt import LayerStatistics, read_extremes
from .transfer_armt import on_device


Tensors = dict[int, torch.Tensor]


class LayerState(NamedTuple):
    """What the layers of a call remember, `(G, W, ...)` each for W lanes; [`LayerStatistics`] outside of training."""

    A: torch.Tensor | None
    z: torch.Tensor | None
    reads: torch.Tensor | None = None
    peaks: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    marks: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        return LayerState(*(None if tensor is None else function(tensor) for tensor in self))


def pick_lanes(state: LayerState, lanes: list[int]) -> LayerState:
    """`(lanes, ...)`, some lanes of a layer's `(W, ...)` memory."""
    if lanes == list(range(len(state.A))):
        return state
    index = on_device(lanes, state.A.device)
    return state.map(lambda tensor: tensor[index])


class GroupInputs(NamedTuple):
    """What the calls of a group have in common; all but `shared` are `(G, ...)`."""

    weights: dict[str, torch.Tensor]
    memory: dict[str, torch.Tensor] | None
    shared: Tensors  # further arguments of the layers, by place: the same for all
    own: Tensors  # those that differ

    def part(self, first: int, last: int) -> "GroupInputs":
        """The inputs of some of the layers."""
        if first == 0 and last == len(next(iter(self.weights.values()))):
            return self
        pick = slice(first, last)
        weights, memory, own = (
            None if tensors is None else {key: tensor[pick] for key, tensor in tensors.items()}
            for tensors in (self.weights, self.memory, self.own)
        )
        return GroupInputs(weights, memory, self.shared, own)


class CellGroup:
    """
    The cells of equal layers.

    Args:
        indices: of the layers in the decoder.
        layers: the layers.
        memories: theirs, None for layers without.
        call: how the decoder calls the first of them.
        compiled: whether to compile what is run.
    """

    def __init__(
        self, indices: list[int], layers: list[nn.Module], memories: list | None, call: NativeCall, compiled: bool
    ):
        self.indices = indices
        self.layers = LayerGroup(layers)
        self.like = None if memories is None else memories[0]
        self.structure = call.structure
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in call.leaves]
        self.tensor_places = [n for n, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor)]
        self.compiled = compiled
        # While the layers' stand-in is called, it has the weights of one call.
        self._lock = threading.RLock()
        self._call, self._call_in_place = self._run, self._run_in_place
        if compiled:
            self._call = torch.compile(self._run, dynamic=False)
            self._call_in_place = torch.compile(self._run_in_place, dynamic=False)

    def run(self, *args) -> tuple[torch.Tensor, LayerState | None]:
        """[`CellGroup._run`], compiled if it is to be."""
        with self._lock:
            return self._call(*args)

    def run_in_place(self, *args) -> None:
        """[`CellGroup._run_in_place`], compiled if it is to be."""
        with self._lock:
            self._call_in_place(*args)

    def parts(self, first: int, last: int, captured: bool) -> Iterator[tuple[int, int]]:
        """
        Cuts a range of the group's layers into calls. Every size is compiled apart, so there are few sizes; small ones
        are nearly as fast per cell.

        Args:
            captured: few calls, that come again, are better than large ones: a graph costs the host nothing.
        """
        whole = len(self.indices)
        while first < last:
            size = last - first
            if self.compiled and size < whole:
                size = next(
                    n for n in self._sizes(4 if captured else 2) if n <= size and (first % n == 0 or not captured)
                )
            yield first, first + size
            first += size

    def _sizes(self, ratio: int) -> list[int]:
        """1 and its multiples by `ratio`, the largest first."""
        sizes = [1]
        while sizes[0] * ratio < len(self.indices):
            sizes.insert(0, sizes[0] * ratio)
        return sizes

    def inputs(self, model: nn.Module, layers: Sequence[nn.Module], calls: list[NativeCall]) -> GroupInputs:
        """
        What the group needs of a model.

        Args:
            model: an ARMT model.
            layers: all layers of its decoder.
            calls: how the decoder calls all of them.
        """
        layers = [layers[i] for i in self.indices]
        memory = None
        if self.like is not None:
            halves = model.dtype == torch.bfloat16 and model.device.type == "cuda"
            memory = memory_weights([model.memory[str(i)] for i in self.indices], halves)
        return GroupInputs(self.layers.weights(layers), memory, *self.arguments([calls[i] for i in self.indices]))

    def arguments(self, calls: list[NativeCall]) -> tuple[Tensors, Tensors]:
        """By place in a call: tensors that all layers are called with, and those that differ, `(G, ...)`."""
        shared, own = {}, {}
        for place in self.tensor_places:
            leaves = [call.leaves[place] for call in calls]
            if all(leaf is leaves[0] or torch.equal(leaf, leaves[0]) for leaf in leaves):
                shared[place] = leaves[0]
            else:
                own[place] = torch.stack(leaves)
        return shared, own

    def run_layers(self, weights: dict, x: torch.Tensor, shared: Tensors, own: Tensors) -> torch.Tensor:
        """The layers alone: `(G, W, P, D)` to `(G, W, P, D)`."""

        def call(own: Tensors):
            leaves = list(self.constants)
            for place, tensor in (*shared.items(), *own.items()):
                leaves[place] = tensor
            return tree_unflatten(leaves, self.structure)

        return self.layers(weights, x, own, call)

    def _run(
        self,
        weights: dict[str, torch.Tensor],
        memory_weights: dict[str, torch.Tensor] | None,
        state: LayerState | None,
        x: torch.Tensor,
        shared: Tensors,
        own: Tensors,
        num_mem_tokens: int,
        first: torch.Tensor | None,
        writes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, LayerState | None]:
        """
        Reads, runs and writes the cells of G layers and W lanes.

        Args:
            weights, memory_weights: `(G, ...)` each.
            state: before the segments.
            x: `(G, W, P, D)`.
            shared, own: further arguments of the layers.
            num_mem_tokens: m; the last m positions are the memory tokens.
            first: `(G, W)` bool, the cells whose row has never written; None if all have.
            writes: `(G, W)` bool, the cells that write; None if all do.

        Returns:
            `(G, W, P, D)` and the state after the segments.
        """
        if memory_weights is None:
            return self.run_layers(weights, x, shared, own), state
        memory, old = StackedMemory(self.like, memory_weights), MemoryState(state.A, state.z)
        read, terms = memory.read(x, old)
        statistics = None
        if state.reads is not None:
            new_rows = None if first is None else first[..., None]
            known = LayerStatistics(state.reads, state.peaks, state.sums, state.marks, state.last)
            statistics = known.after_read(read_extremes(x, terms, state.reads), new_rows)
        del terms  # not kept while the layers run
        y = self.run_layers(weights, read, shared, own)
        new, terms = memory.write(y[:, :, -num_mem_tokens:], old, first)
        if statistics is not None:
            statistics = statistics.after_write(new.A, terms, first, writes)
        return y, LayerState(*(new if writes is None else new.where(writes, old)), *(statistics or ()))

    def _run_in_place(self, weights, memory_weights, state: LayerState | None, x, y: torch.Tensor, *args) -> None:
        """[`CellGroup._run`] whose results go to `y` and to where the state was."""
        output, new = self._run(weights, memory_weights, state, x, *args)
        y.copy_(output)
        for old, value in zip(state or (), new or (), strict=True):
            if old is not None:
                old.copy_(value)
