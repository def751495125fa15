"""The fast way to keep what moves along a diagonal: in buffers that stay in place, so that graphs can be captured."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from .cells_armt import GroupInputs, LayerState, pick_lanes
from .groups_armt import LayerGroups
from .replay_armt import Replay
from .statistics_armt import LayerStatistics
from .transfer_armt import on_device


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel


class BufferedCells:
    """
    Hidden states and memories between the calls of a pipeline that needs no gradients; the same methods as
    [`FunctionalCells`], which says what they do.

    On a GPU compiled calls are captured as CUDA graphs when they come again: replaying one costs the host next to
    nothing. A graph knows its tensors by their address, so buffers and graphs outlive the call that made them, and the
    next one takes them over if all weights are where they were.

    Args:
        model: the model.
        groups: its layers in groups.
        inputs: of each group.
        lanes: W.
        collect: whether statistics are kept.
    """

    captures = True

    def __init__(
        self,
        model: "ARMTPreTrainedModel",
        groups: LayerGroups,
        inputs: list[GroupInputs],
        lanes: int,
        collect: bool,
    ):
        self.model, self.groups, self.lanes = model, groups, lanes
        self.key = _key(model, lanes, collect)
        # What is not a weight is given anew with every call, and copied to where it was.
        self.inputs = [
            of_group._replace(**{name: _copies(getattr(of_group, name)) for name in ("shared", "own")})
            for of_group in inputs
        ]
        config, self.device = model.config, model.device
        positions = config.segment_size + config.num_mem_tokens
        self.place = {layer: (n, i) for n, group in enumerate(groups.groups) for i, layer in enumerate(group.indices)}
        self.x, self.y, self.state, self.flags, self.flags_now = [], [], [], [], []
        for group in groups.groups:
            size = len(group.indices)
            shape = (size, lanes, positions, config.text_config.hidden_size)
            self.x.append(torch.zeros(shape, dtype=model.dtype, device=self.device))
            self.y.append(torch.zeros(shape, dtype=model.dtype, device=self.device))
            state = None
            if group.like is not None:
                state = group.like.zero_state(lanes, self.device)
                statistics = LayerStatistics.new(lanes, state.A) if collect else ()
                state = LayerState(*state, *statistics).map(lambda t, size=size: t.expand(size, *t.shape).clone())
            self.state.append(state)
            # Of every cell: whether its row is new to the memory, and whether it writes.
            self.flags.append(torch.tensor([False, True], device=self.device)[:, None, None].repeat(1, size, lanes))
            self.flags_now.append([[[usual] * lanes for _ in range(size)] for usual in (False, True)])
        self.calls: dict[tuple[int, int, int], Replay] = {}
        self.moves: dict[tuple[int, int], tuple[list, list]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.stream = None

    @classmethod
    def take(
        cls, model: "ARMTPreTrainedModel", groups: LayerGroups, inputs: list[GroupInputs], lanes: int, collect: bool
    ) -> "BufferedCells":
        """Buffers for a call: those of an earlier one if they fit, else new ones."""
        with model.fast.lock:
            idle = groups.idle.pop() if groups.idle else None
        with torch.inference_mode(False), torch.no_grad():
            if idle is not None and idle.key == _key(model, lanes, collect):
                with idle._on_device():
                    if idle.stream is not None:  # another thread's
                        torch.cuda.current_stream().wait_stream(idle.stream)
                    if idle._takes_over(inputs):
                        return idle
            del idle
            return cls(model, groups, inputs, lanes, collect)

    def _takes_over(self, inputs: list[GroupInputs]) -> bool:
        """Brings what was computed from the weights up to date, unless the weights themselves have moved."""
        pairs = [pair for both in zip(self.inputs, inputs, strict=True) for pair in _pairs(*both)]
        for name, old, new in pairs:
            if old.shape != new.shape or old.dtype != new.dtype:
                return False
            if name in ("weights", "memory") and old.data_ptr() != new.data_ptr():
                return False
        for name, old, new in pairs:
            if name not in ("weights", "memory"):
                old.copy_(new)
        return True

    def give_back(self) -> None:
        """Leaves the buffers to the next call."""
        if self.model.fast.enabled:
            if self.device.type == "cuda":
                with self._on_device():
                    self.stream = torch.cuda.current_stream()
            with self.model.fast.lock:
                self.groups.idle[:] = [self]

    def _on_device(self) -> AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def enter(self, x: torch.Tensor) -> None:
        group, i = self.place[0]
        self.x[group][i].copy_(x)

    def begin(self, layer: int, lanes: list[int], state: LayerState) -> None:
        group, i = self.place[layer]
        index = None if lanes == list(range(self.lanes)) else on_device(lanes, self.device)
        for old, new in zip(self.state[group], state, strict=True):
            if old is not None and index is None:
                old[i].copy_(new)
            elif old is not None:
                old[i].index_copy_(0, index, new)

    def remembered(self, layer: int, lanes: list[int]) -> LayerState:
        group, i = self.place[layer]
        return pick_lanes(self.state[group].map(lambda tensor: tensor[i]), lanes).map(torch.clone)

    def run(self, group: int, first: int, last: int, new_rows: list[list[bool]], writes: list[list[bool]]) -> None:
        cells, key = self.groups.groups[group], (group, first, last)
        if cells.like is not None:
            self._set_flags(group, first, last, new_rows, writes)
        with self._on_device():
            if cells.compiled:
                if key not in self.calls:
                    call = partial(cells.run_in_place, *self._arguments(group, first, last, flagged=True))
                    self.calls[key] = Replay(call, self.device.type == "cuda", self.pool)
                with self.groups.compiling((group, last - first, self.key)):
                    self.calls[key]()
            else:
                flagged = self.flags_now[group] != self._usual(group)
                cells.run_in_place(*self._arguments(group, first, last, flagged))

    def _arguments(self, group: int, first: int, last: int, flagged: bool) -> tuple:
        """What layers `first` to `last - 1` of a group are called with."""
        part, state = slice(first, last), self.state[group]
        inputs = self.inputs[group].part(first, last)
        flags = self.flags[group][:, part] if flagged and state is not None else (None, None)
        return (
            inputs.weights,
            inputs.memory,
            None if state is None else state.map(lambda tensor: tensor[part]),
            self.x[group][part],
            self.y[group][part],
            inputs.shared,
            inputs.own,
            self.model.config.num_mem_tokens,
            flags[0],
            flags[1],
        )

    def _usual(self, group: int) -> list:
        size = len(self.groups.groups[group].indices)
        return [[[usual] * self.lanes] * size for usual in (False, True)]

    def _set_flags(self, group: int, first: int, last: int, new_rows: list, writes: list) -> None:
        for n, flags in enumerate((new_rows, writes)):
            if self.flags_now[group][n][first:last] != flags:
                self.flags_now[group][n][first:last] = flags
                self.flags[group][n, first:last] = on_device(flags, self.device)

    def leaving(self) -> torch.Tensor:
        group, i = self.place[len(self.place) - 1]
        return self.y[group][i].clone()

    def advance(self, low: int, high: int) -> None:
        if (low, high) not in self.moves:
            self.moves[low, high] = self._moves(low, min(high, len(self.place) - 2))
        sources, destinations = self.moves[low, high]
        if len(sources) == 1:
            destinations[0].copy_(sources[0])
        elif sources:
            torch._foreach_copy_(destinations, sources)

    def _moves(self, low: int, high: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What is copied where when the outputs of layers `low` to `high` become inputs; neighbours as one."""
        runs: list[list[int]] = []
        for layer in range(low, high + 1):
            (group, i), (other, j) = self.place[layer], self.place[layer + 1]
            if runs and runs[-1][:2] == [group, other] and (i - runs[-1][2]) == (j - runs[-1][3]) == runs[-1][4]:
                runs[-1][4] += 1
            else:
                runs.append([group, other, i, j, 1])
        sources = [self.y[group][i : i + n] for group, _, i, _, n in runs]
        return sources, [self.x[other][j : j + n] for _, other, _, j, n in runs]


def _key(model: "ARMTPreTrainedModel", lanes: int, collect: bool) -> tuple:
    config = model.config
    return lanes, config.segment_size, config.num_mem_tokens, collect, model.dtype, model.device


def _copies(tensors: dict) -> dict:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _pairs(old: GroupInputs, new: GroupInputs) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Tensors of two inputs, with the field they are in; the halves of memory weights are a field of their own."""
    pairs = []
    for field in GroupInputs._fields:
        before, now = getattr(old, field) or {}, getattr(new, field) or {}
        if before.keys() != now.keys():
            return [("weights", torch.empty(0), torch.empty(1))]
        for key, tensor in before.items():
            pairs.append(("halves" if str(key).endswith(".halves") else field, tensor, now[key]))
    return pairs
