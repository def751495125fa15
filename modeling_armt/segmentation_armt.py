"""
How a batch is cut into segments: index arithmetic on the host, no model.

Every row is cut from its own real tokens, so that neither padding nor its neighbours move its segment borders
(invariant: batch independence). A call is read in steps; a step takes from every row as many real tokens as its open
segment still has room for, packs them to the left, and appends the memory tokens to those rows whose segment ends:

    row 0   | t t t t t M M |      the segment closes: memory tokens follow
    row 1   | t t t . . . . |      the row has no more tokens; the rest is filler that nobody looks at, since attention
    row 2   | . . . . . . . |      is causal and filler comes last
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .transfer_armt import on_device


@dataclass
class Step:
    """One pass through the backbone. Lists have an entry per row."""

    start: list[int]  # index of the first token taken, among the row's real tokens in this call
    taken: list[int]  # real tokens taken
    opened: list[int]  # tokens that the row's open segment held before the step
    closes: list[bool]  # whether the row's segment ends with this step, so that its memory is written
    num_mem_tokens: int
    rows: list[int] | None = None  # which rows of the batch the entries stand for; None: all, in order

    @property
    def width(self) -> int:
        """Positions of the packed input, P."""
        return max(n + self.num_mem_tokens * c for n, c in zip(self.taken, self.closes, strict=True))

    @property
    def open_after(self) -> list[int]:
        rows = zip(self.taken, self.opened, self.closes, strict=True)
        return [0 if closes else opened + taken for taken, opened, closes in rows]

    @property
    def is_uniform(self) -> bool:
        """Whether all rows do the same, so that no masks or gathers are needed."""
        return all(len(set(rows)) == 1 for rows in (self.start, self.taken, self.opened, self.closes))


class RealTokens:
    """
    Where the real tokens of a call are.

    Args:
        batch_size, num_columns: shape of the call's input.
        mask: `(B, T)`, nonzero where there is a real token; None if all are.

    Attributes:
        counts: real tokens per row.
        columns: `(B, T)`, column of each row's i-th real token (past `counts[b]` of the padding), None without it.
        rank: `(B, T)`, for every column the index of the last real token at or before it, -1 before the first; None
            without padding.
        real: `(B, T)` bool, which columns hold a real token; None without padding.
    """

    def __init__(self, batch_size: int, num_columns: int, mask: torch.Tensor | None = None):
        self.batch_size, self.num_columns = batch_size, num_columns
        self.columns = self.rank = self.real = None
        self.counts = [num_columns] * batch_size
        if mask is not None:
            real = mask != 0
            counts = real.sum(1).tolist()
            if counts != self.counts:
                self.counts, self.real = counts, real
                self.columns = (~real).to(torch.uint8).argsort(dim=1, stable=True)
                self.rank = real.cumsum(1) - 1

    def pack(self, source: torch.Tensor, step: Step, fill: float = 0) -> torch.Tensor:
        """
        Takes a step's tokens out of a `(B, T, ...)` tensor.

        Returns:
            `(rows of the step, max(step.taken), ...)`, packed to the left; past a row's tokens `fill`.
        """
        length = max(step.taken)
        if self.columns is None and step.is_uniform and step.rows is None:
            return source[:, step.start[0] : step.start[0] + length]
        rows = on_device(step.rows or range(self.batch_size), source.device)[:, None]
        start = on_device(step.start, source.device)[:, None]
        index = start + torch.arange(length, device=source.device)
        valid = index < start + on_device(step.taken, source.device)[:, None]
        index = index.clamp(max=self.num_columns - 1)
        if self.columns is not None:
            index = self.columns.to(source.device)[rows, index]
        valid = valid.view(*valid.shape, *[1] * (source.dim() - 2))
        return torch.where(valid, source[rows, index], fill)

    def next_of(self, labels: torch.Tensor) -> torch.Tensor:
        """`(B, T)`: for each row's i-th real token the label of the one after it, -100 where there is none."""
        if self.columns is not None:
            labels = labels.masked_fill(~self.real.to(labels.device), -100).gather(1, self.columns.to(labels.device))
        return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def count_targets(labels: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor | int) -> torch.Tensor:
    """
    The number of targets in all batches of an optimizer step. Trainers count what stock models predict, all labels
    behind the first column. Nothing predicts a row's first token here, wherever it stands, nor padding: the number
    shrinks by as much as this batch has fewer targets.

    Args:
        labels, targets: `(B, T)` of this batch, -100 where there is none.
        counted: labels behind the first column, of all batches.
    """
    stock, own = (labels[:, 1:] != -100).sum(), (targets != -100).sum()
    counted = torch.as_tensor(counted, device=labels.device)
    return torch.where(own > 0, counted * (own / stock.clamp(min=1)), counted)


def plan_steps(
    counts: list[int],
    opened: list[int],
    segment_size: int,
    num_mem_tokens: int,
    cached: bool,
    max_columns: int | None = None,
) -> Iterator[Step]:
    """
    Cuts rows into steps.

    Args:
        counts: real tokens to read, per row.
        opened: tokens that each row's open segment already holds, below `segment_size`; zeros unless `cached`.
        segment_size, num_mem_tokens: as in the configuration.
        cached: whether somebody may go on from where this call ends. If not, a segment that fills up with a row's last
            token stays open: nobody would read what it wrote.
        max_columns: what the backbone can hold in a pass, the open segments' columns included; None for no limit.
    """
    start = [0] * len(counts)
    while any(s < n for s, n in zip(start, counts, strict=True)):
        room = (max_columns or 2 * segment_size + num_mem_tokens) - max(opened) - num_mem_tokens
        taken = [min(n - s, segment_size - o, room) for n, s, o in zip(counts, start, opened, strict=True)]
        closes = [
            t > 0 and o + t == segment_size and (cached or s + t < n)
            for t, o, s, n in zip(taken, opened, start, counts, strict=True)
        ]
        step = Step(start, taken, opened, closes, num_mem_tokens)
        yield step
        start = [s + t for s, t in zip(start, taken, strict=True)]
        opened = step.open_after if cached else [0] * len(counts)


def plan_pipeline(
    counts: list[int],
    opened: list[int],
    segment_size: int,
    num_mem_tokens: int,
    cached: bool,
    lanes: int,
) -> list[Step]:
    """
    Cuts rows into steps for a schedule that works on many segments at once.

    First one step that fills up the segments that are open; then steps with `rows`, each of which takes a segment from
    some rows; then one step for what is left over. Rows queue for the lanes of the steps in the middle: the next row
    enters a lane where another ends. Without a cache nobody goes on from the end, and what is left over may take part
    in the middle, as segments that are not written.

    Args:
        counts, opened, segment_size, num_mem_tokens, cached: as for [`plan_steps`].
        lanes: rows of a step in the middle, at most.
    """
    batch_size, steps, start = len(counts), [], [0] * len(counts)
    if any(opened):
        taken = [min(n, segment_size - o) if o else 0 for n, o in zip(counts, opened, strict=True)]
        if any(taken):
            closes = [t > 0 and o + t == segment_size for t, o in zip(taken, opened, strict=True)]
            steps.append(Step(start, taken, opened, closes, num_mem_tokens))
            start, opened = taken, steps[0].open_after
    left = [0 if o else n - s for n, s, o in zip(counts, start, opened, strict=True)]
    segments = [n // segment_size if cached else -(-n // segment_size) for n in left]
    queues: list[list[int]] = [[] for _ in range(min(lanes, sum(n > 0 for n in segments)))]
    emptiest = [(0, lane) for lane in range(len(queues))]  # a heap
    for row in sorted(range(batch_size), key=lambda row: -segments[row]):  # the longest first, to the emptiest lane
        if segments[row]:
            load, lane = emptiest[0]
            queues[lane].append(row)
            heapq.heapreplace(emptiest, (load + segments[row], lane))
    places = [[(row, number) for row in queue for number in range(segments[row])] for queue in queues]
    places.sort(key=len, reverse=True)  # lanes that are done are the last ones
    for number in range(len(places[0]) if places else 0):
        rows, numbers = zip(*[place[number] for place in places if number < len(place)], strict=True)
        first = [start[row] + n * segment_size for row, n in zip(rows, numbers, strict=True)]
        taken = [min(segment_size, counts[row] - f) for row, f in zip(rows, first, strict=True)]
        closes = [cached or f + segment_size < counts[row] for row, f in zip(rows, first, strict=True)]
        steps.append(Step(first, taken, [0] * len(rows), closes, num_mem_tokens, list(rows)))
    start = [s + min(n * segment_size, max(c - s, 0)) for s, n, c in zip(start, segments, counts, strict=True)]
    taken = [n - s for n, s in zip(counts, start, strict=True)]
    if any(taken):
        steps.append(Step(start, taken, opened, [False] * batch_size, num_mem_tokens))
    return steps


class OutputColumns:
    """
    Puts what the steps return back into the columns of the input. A padding column gets what its row's last real token
    before it got, so that the last column of every row is what `generate` samples from.

    Args:
        tokens: where the call's real tokens are.
        first, last: the columns wanted, `first <= column < last`.
    """

    def __init__(self, tokens: RealTokens, first: int, last: int):
        self.first, self.last = first, last
        self.tokens = tokens
        self.source = self.bounds = None
        if tokens.rank is not None:
            self.source = tokens.rank[:, first:last]  # (B, L)
            ends = torch.stack([self.source[:, 0], self.source[:, -1]], dim=1)
            self.bounds = [(low, high + 1) for low, high in ends.tolist()]
        self.steps: list[Step] = []
        self.pieces: list[tuple[torch.Tensor, ...]] = []
        self.empty: tuple[torch.Tensor, ...] = ()

    def wants(self, step: Step) -> bool:
        """Whether any of the step's tokens is asked for."""
        bounds = self.bounds or [(self.first, self.last)] * self.tokens.batch_size
        rows = zip(step.start, step.taken, step.rows or range(len(bounds)), strict=True)
        return any(t > 0 and start < bounds[row][1] and start + t > bounds[row][0] for start, t, row in rows)

    def add(self, step: Step, tensors: tuple[torch.Tensor, ...]) -> None:
        """Takes the `(B, P, ...)` results of a step; dropped unless wanted."""
        self.empty = tuple(tensor[:, :0] for tensor in tensors)
        if self.wants(step):
            self.steps.append(step)
            self.pieces.append(tuple(tensor[:, : max(step.taken)] for tensor in tensors))

    def collect(self, before: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """
        The results in the wanted columns, one `(B, last - first, ...)` tensor for each that `add` was given.

        Args:
            before: `(B, ...)`, what columns before a row's first real token get in the first result; zeros if None.
        """
        if not self.pieces:  # nothing but padding was asked for
            shape = (self.tokens.batch_size, self.last - self.first, -1)
            filled = [tensor.new_zeros(*shape[:2], tensor.shape[-1]) for tensor in self.empty]
            return (*([before[:, None].expand(shape)] if before is not None else filled[:1]), *filled[1:])
        pieces = list(zip(*self.pieces, strict=True))
        if self.source is None and all(step.is_uniform and step.rows is None for step in self.steps):
            offset = self.first - self.steps[0].start[0]
            joined = [torch.cat(tensors, dim=1) for tensors in pieces]
            return tuple(tensor[:, offset : offset + self.last - self.first] for tensor in joined)
        joined = [torch.cat([tensor.flatten(0, 1) for tensor in tensors]) for tensors in pieces]
        index = self._index(joined[0].device)
        known = index >= 0
        results = []
        for number, tensor in enumerate(joined):
            fill = tensor.new_zeros(()) if before is None or number else before[:, None].to(tensor)
            results.append(torch.where(known[..., None], tensor[index.clamp(min=0)], fill))
        return tuple(results)

    def _index(self, device: torch.device) -> torch.Tensor:
        """`(B, L)`, where in the flattened and joined pieces each wanted column's token is; -1 for columns without."""
        source = self.source
        if source is None:
            source = torch.arange(self.first, self.last).expand(self.tokens.batch_size, -1)
        source = source.to(device)
        index, offset = torch.full_like(source, -1), 0
        for step in self.steps:
            width, number = max(step.taken), len(step.taken)
            rows = slice(None) if step.rows is None else on_device(step.rows, device)
            start = on_device(step.start, device)[:, None]
            inside = (source[rows] >= start) & (source[rows] < start + on_device(step.taken, device)[:, None])
            place = offset + width * torch.arange(number, device=device)[:, None] + source[rows] - start
            index[rows] = torch.where(inside, place, index[rows])
            offset += width * number
        return index
