"""
The diagonal schedule (arXiv 2506.05229): the cells (segment, layer) of one diagonal at once.

Layer l at segment s needs layer l - 1 at segment s and the memory that layer l had after segment s - 1. So the cells
with equal s + l do not need each other. A diagonal is one call for each group of equal layers (`stacking_armt.py`),
which reads, runs and writes all of its cells; what leaves layer l enters layer l + 1 on the next diagonal:

    diagonal     0    1    2    3    4    5
    layer 2                s0   s1   s2   s3
    layer 1           s0   s1   s2   s3
    layer 0      s0   s1   s2   s3              at both ends only the layers that have a segment are run

Segments of several rows go side by side, in lanes, and where a row ends in a lane another one begins.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from .attachment_armt import find_decoder_layers
from .buffered_cells_armt import BufferedCells
from .cells_armt import LayerState
from .functional_cells_armt import FunctionalCells
from .groups_armt import Prepared
from .memory_armt import MemoryState
from .native_armt import native_pass
from .segmentation_armt import RealTokens, Step
from .sequential_armt import embed_memory_tokens, embed_tokens
from .statistics_armt import LayerStatistics
from .transfer_armt import on_device


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

# Positions that are embedded at once.
EMBEDDED = 16 * 1024


class Pipeline:
    """
    Reads a stretch of steps that [`plan_pipeline`] made, in the diagonal schedule.

    Args:
        model, source, tokens: as for [`run_steps`].
        prepared: what [`prepare`] returned.
        steps: steps with `rows`; the first has the most rows.
        states, segments: the memories of all rows, and how many segments each row has written.
        statistics: by layer, replaced if given.
        cached: whether somebody may go on from the end.
        wants: whether anybody looks at the outputs of a step.

    Attributes:
        states, segments: after the stretch, once `run` is exhausted.
        last_hidden: by row, `(D,)`, the last hidden state of its last token.
    """

    def __init__(
        self,
        model: "ARMTPreTrainedModel",
        source: torch.Tensor,
        tokens: RealTokens,
        prepared: Prepared,
        steps: list[Step],
        states: dict[int, MemoryState | None],
        segments: list[int],
        statistics: dict[int, LayerStatistics] | None,
        cached: bool,
        wants: Callable[[Step], bool],
    ):
        self.model, self.source, self.tokens, self.steps = model, source, tokens, steps
        self.groups, self.calls, self.one_by_one = prepared
        self.states, self.segments, self.statistics = dict(states), list(segments), statistics
        self.cached, self.wants = cached, wants
        self.lanes = len(steps[0].rows)
        self.last_hidden: dict[int, torch.Tensor] = {}
        rows = [step.rows + [-1] * (self.lanes - len(step.rows)) for step in steps]
        nobody = [-1] * self.lanes
        # By step, the lanes in which a row begins, and those in which one ends.
        lanes, before, after = range(self.lanes), [nobody, *rows[:-1]], [*rows[1:], nobody]
        self.begins = [[w for w in lanes if a[w] != b[w] >= 0] for a, b in zip(before, rows, strict=True)]
        self.ends = [[w for w in lanes if b[w] != a[w] >= 0] for a, b in zip(rows, after, strict=True)]
        self.rows = rows
        self.new_rows = [self._never_written(step) for step in range(len(steps))]
        self.writes = [[w < len(s.closes) and s.closes[w] for w in lanes] for s in steps]
        # By layer, rows that have ended with their memories, `(rows, ...)`.
        self.ended: dict[int, list[tuple[list[int], LayerState]]] = {layer: [] for layer in states}
        self.waiting = dict.fromkeys(states, len(segments))  # rows that have not begun

    def run(self) -> Iterator[tuple[Step, tuple[torch.Tensor, ...]]]:
        """Yields each step with its outputs, `(last hidden state,)`, which is empty if nobody wants it."""
        model, steps, groups = self.model, self.steps, self.groups
        num_layers, length = len(self.calls), len(steps)
        layers = find_decoder_layers(model.decoder, num_layers)
        gradients = torch.is_grad_enabled()
        with model.fast.lock, torch.inference_mode(False), torch.set_grad_enabled(gradients):
            inputs = [group.inputs(model, layers, self.calls) for group in groups.groups]
        entering = self._entering()
        if gradients:
            cells = FunctionalCells(model, groups, inputs)
        else:
            cells = BufferedCells.take(model, groups, inputs, self.lanes, self.statistics is not None)
        for number, low, high in self._waves(num_layers, length):
            if low == 0:
                cells.enter(next(entering))
            for group, of_group in enumerate(groups.groups):
                active = [i for i, layer in enumerate(of_group.indices) if low <= layer <= high]
                if active:
                    for first, last in of_group.parts(active[0], active[-1] + 1, cells.captures):
                        self._run_cells(cells, group, of_group.indices[first:last], first, last, number)
            if high == num_layers - 1:
                done = number - high
                yield steps[done], self._leaving(steps[done], done, cells.leaving())
            cells.advance(low, high)
        self._collect()
        cells.give_back()

    def _waves(self, num_layers: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Which cells are run together: layers `low` to `high`, each at the step that is `number` less the layer."""
        if self.one_by_one:
            for step in range(length):
                yield from ((step + layer, layer, layer) for layer in range(num_layers))
        else:
            for number in range(length + num_layers - 1):
                yield number, max(0, number - length + 1), min(num_layers - 1, number)

    def _run_cells(
        self, cells: FunctionalCells | BufferedCells, group: int, layers: list[int], first: int, last: int, number: int
    ) -> None:
        """Cells of one group on diagonal `number`, with what happens before and after to the rows in them."""
        if layers[0] not in self.states:
            cells.run(group, first, last, [], [])
            return
        steps = [number - layer for layer in layers]
        for layer, step in zip(layers, steps, strict=True):
            if self.begins[step]:
                rows = [self.rows[step][w] for w in self.begins[step]]
                cells.begin(layer, self.begins[step], self._initial(layer, rows))
                self.waiting[layer] -= len(rows)
                if not self.waiting[layer]:
                    self.states[layer] = None  # it lives in the cells now
        cells.run(group, first, last, [self.new_rows[s] for s in steps], [self.writes[s] for s in steps])
        for layer, step in zip(layers, steps, strict=True):
            if self.ends[step]:
                rows = [self.rows[step][w] for w in self.ends[step]]
                self.ended[layer].append((rows, cells.remembered(layer, self.ends[step])))

    def _never_written(self, step: int) -> list[bool]:
        """By lane, whether a row begins there that has no memory yet."""
        flags = [False] * self.lanes
        for w in self.begins[step]:
            flags[w] = self.segments[self.rows[step][w]] == 0
        return flags

    # Rows that begin and end

    def _initial(self, layer: int, rows: list[int]) -> LayerState:
        """`(rows, ...)`, what is remembered of the rows when they begin."""
        state, memory = self.states[layer], self.model.memory[str(layer)]
        if state is None:
            state = memory.zero_state(len(rows), self.model.device)
        elif rows != list(range(len(state.A))):
            state = state.map(lambda tensor: tensor[rows])
        if self.statistics is None:
            return LayerState(*state)
        known = self.statistics.get(layer)
        if known is None:
            return LayerState(*state, *LayerStatistics.new(len(rows), state.A))
        return LayerState(*state, *known.map(lambda tensor: tensor[rows]))

    def _collect(self) -> None:
        """Leaves states, segments and statistics as they are after the stretch."""
        for step in self.steps:
            for row, closes in zip(step.rows, step.closes, strict=True):
                self.segments[row] += closes
        if not any(any(step.closes) for step in self.steps):
            return
        for layer, ended in self.ended.items():
            there = {row for rows, _ in ended for row in rows}
            others = [row for row in range(len(self.segments)) if row not in there]
            if others:
                ended.append((others, self._initial(layer, others)))
            A, z, *statistics = _in_order(ended)
            self.states[layer] = MemoryState(A, z)
            if self.statistics is not None:
                self.statistics[layer] = LayerStatistics(*statistics)

    # What the decoder does before its first layer and after its last one

    def _entering(self) -> Iterator[torch.Tensor]:
        """By step, `(W, P, D)`, the input of the first layer."""
        model, segment_size = self.model, self.model.config.segment_size
        width = segment_size + model.config.num_mem_tokens
        at_once = max(1, EMBEDDED // (self.lanes * width))
        for number in range(0, len(self.steps), at_once):
            steps = self.steps[number : number + at_once]
            # A lane without a row reads along with the first one.
            places = [(step, min(w, len(step.rows) - 1)) for step in steps for w in range(self.lanes)]
            rows, start, taken = zip(*((s.rows[w], s.start[w], s.taken[w]) for s, w in places), strict=True)
            some = [False] * len(rows)
            packed = Step(list(start), list(taken), [0] * len(rows), some, model.config.num_mem_tokens, list(rows))
            embeds = embed_tokens(model, self.source, self.tokens, packed)
            embeds = nn.functional.pad(embeds, (0, 0, 0, segment_size - embeds.shape[1]))
            memory_tokens = embed_memory_tokens(model, embeds).expand(len(embeds), -1, -1)
            calls = native_pass(model, torch.cat([embeds, memory_tokens], dim=1), self.groups.answers())[0]
            entering = calls[0].x.unflatten(0, (len(steps), self.lanes))
            del embeds, calls
            yield from entering
            del entering  # before the next ones are made

    def _leaving(self, step: Step, number: int, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of a step, from the `(W, P, D)` output of the last layer."""
        hidden = hidden[: len(step.rows)]
        wanted = self.wants(step)
        if wanted:
            hidden = self.groups.after_layers(self.model, hidden)
        for w in self.ends[number] if self.cached else ():
            last = hidden[w : w + 1, step.taken[w] - 1 : step.taken[w]]
            self.last_hidden[step.rows[w]] = (last if wanted else self.groups.after_layers(self.model, last))[0, 0]
        return (hidden if wanted else hidden[:, :0],)


def _in_order(parts: list[tuple[list[int], LayerState]]) -> LayerState:
    """The memories `(B, ...)` of all rows, from those of some rows each."""
    rows = [row for some, _ in parts for row in some]
    joined = parts[0][1]
    if len(parts) > 1:
        fields = zip(*(state for _, state in parts), strict=True)
        joined = LayerState(*(None if field[0] is None else torch.cat(field) for field in fields))
    if rows == sorted(rows):
        return joined
    order = on_device(sorted(range(len(rows)), key=rows.__getitem__), joined.A.device)
    return joined.map(lambda tensor: tensor[order])
