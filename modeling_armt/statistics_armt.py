"""
The health of the memories, followed while they are read and written.

One segment takes A to (I - M) A + what it stores, with M = sum_m beta k k^T / (k . z + eps) over its memory tokens.
Two things can go wrong. A grows, segment after segment, where M has eigenvalues above 2: when several similar keys
meet a small k . z that still exceeds |k|^2, gamma is 0, z stays as it is, and so does M. And a read is a spike where
q . z is next to nothing but q A is not. What is kept here shows both; it is running extremes and sums of what reads
and writes compute anyway, as tensors, so that collecting waits for no device and can be part of a CUDA graph.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .memory_armt import MemoryState, ReadTerms, WriteTerms, expansion_bound


NONE = -float("inf")  # of what was not met yet
# The names of all columns, as they stand in a memory file.
COLUMNS = {
    "reads": ("min_qz", "max_read_ratio"),
    "peaks": ("min_denominator", "min_kz_ratio", "lambda_max"),
    "sums": ("gamma", "zero_gammas", "writes"),
    "marks": ("later_norm", "earlier_norm", "next_mark"),
    "last": ("lambda_last",),
}
SMALLEST = ("min_qz", "min_denominator", "min_kz_ratio")  # kept as the largest of the negatives
NEED_Z = ("min_denominator", "min_qz", "min_kz_ratio", "lambda_max", "lambda_last")


def read_extremes(x: torch.Tensor, terms: ReadTerms, like: torch.Tensor) -> torch.Tensor:
    """
    What the statistics keep the extremes of, for each position that reads.

    Args:
        x: `(B, P, D)`, what was read for.
        terms: of the read.
        like: has the dtype and device of the result.

    Returns:
        `(B, P, 2)`: the negative of q . z + eps, and |read| / |x|.
    """
    with torch.no_grad():
        dtype = like.dtype
        size = torch.linalg.vector_norm(x, dim=-1, dtype=dtype).clamp(min=torch.finfo(dtype).tiny)
        ratio = (torch.linalg.vector_norm(terms.answer, dim=-1, dtype=dtype) / size).to(like.device)
        least = torch.full_like(ratio, NONE) if terms.denominator is None else -terms.denominator
        return torch.stack((least, ratio), dim=-1)


class LayerStatistics(NamedTuple):
    """What is kept of one layer; `COLUMNS` names the columns."""

    reads: torch.Tensor  # (B, 2), extremes over positions that read
    peaks: torch.Tensor  # (B, 3), extremes over memory tokens written, but in a row's first write
    sums: torch.Tensor  # (B, 3), over writes: mean gamma, share of gammas that are 0, 1
    # (B, 3): |A| after writes number next_mark / 2 and next_mark / 4, and next_mark, the write whose |A| is kept next
    marks: torch.Tensor
    last: torch.Tensor  # (B, 1), of the last write

    @classmethod
    def new(cls, rows: int, like: torch.Tensor) -> "LayerStatistics":
        """Of rows that have read and written nothing."""
        empty = {"sums": 0.0, "marks": 0.0}
        return cls(*(like.new_full((rows, len(COLUMNS[name])), empty.get(name, NONE)) for name in COLUMNS))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerStatistics":
        """The statistics with `function` applied to every tensor."""
        return LayerStatistics(*map(function, self))

    def after_read(self, seen: torch.Tensor, ignore: torch.Tensor | None = None) -> "LayerStatistics":
        """
        The statistics with a read taken in.

        Args:
            seen: `(B, P, 2)`, see [`read_extremes`].
            ignore: bool, broadcastable to `(B, P)`, positions that do not count.
        """
        with torch.no_grad():
            if ignore is not None:
                seen = seen.masked_fill(ignore.to(seen.device)[..., None], NONE)
            # Not `_replace`, which torch 2.11 does not compile.
            return LayerStatistics(self.reads.maximum(seen.amax(-2)), self.peaks, self.sums, self.marks, self.last)

    def after_write(
        self, A: torch.Tensor, terms: WriteTerms, first: torch.Tensor | None, writes: torch.Tensor | None
    ) -> "LayerStatistics":
        """
        The statistics with a write taken in.

        Args:
            A: `(B, K, D)`, after the write.
            terms: of the write.
            first: `(B,)` bool, rows that write for the first time; None if none does.
            writes: `(B,)` bool, rows that write; None if all do.
        """
        with torch.no_grad():
            sums, (peaks, last) = self._sums_after(terms, writes), self._peaks_after(terms, first, writes)
            # Marks are at writes 1, 2, 4, 8, ...: the earlier one is never far from the middle of what was written.
            number, norm = sums[..., 2:], torch.linalg.vector_norm(A, dim=(-2, -1))[..., None]
            due = number >= self.marks[..., 2:]
            if writes is not None:
                due = due & writes[..., None]
            marks = torch.where(due, torch.cat((norm, self.marks[..., :1], 2 * number), dim=-1), self.marks)
            return LayerStatistics(self.reads, peaks, sums, marks, last)

    def _sums_after(self, terms: WriteTerms, writes: torch.Tensor | None) -> torch.Tensor:
        gamma = terms.gamma
        share = torch.stack((gamma, (gamma == 0).to(gamma), torch.ones_like(gamma)), dim=-1).mean(-2)
        return self.sums + (share if writes is None else share * writes[..., None])

    def _peaks_after(
        self, terms: WriteTerms, first: torch.Tensor | None, writes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if terms.denominator is None:
            return self.peaks, self.last
        least = torch.stack((terms.denominator, terms.overlap), dim=-1).amin(-2)
        bound = expansion_bound(terms.k, terms.beta, terms.denominator)
        seen = torch.cat((-least, bound[..., None]), dim=-1)
        for rows in (first, None if writes is None else ~writes):
            seen = seen if rows is None else seen.masked_fill(rows[..., None], NONE)
        last = seen[..., 2:] if writes is None else torch.where(writes[..., None], seen[..., 2:], self.last)
        return self.peaks.maximum(seen), last

    def columns(self) -> dict[str, torch.Tensor]:
        """`(B,)` each, by name; infinite what a row has not met."""
        return {
            name: -tensor[:, i] if name in SMALLEST else tensor[:, i]
            for kind, tensor in self._asdict().items()
            for i, name in enumerate(COLUMNS[kind])
        }

    def set_column(self, name: str, values: torch.Tensor) -> None:
        """Sets one column, in place, to `(B,)` values as `columns` returns them."""
        for kind, tensor in self._asdict().items():
            if name in COLUMNS[kind]:
                tensor[:, COLUMNS[kind].index(name)] = (-values if name in SMALLEST else values).to(tensor)


def summary(state: MemoryState, statistics: LayerStatistics | None) -> dict[str, list[float | None] | None]:
    """
    Health of one layer's memory, by row.

    Args:
        state: the memory as it is.
        statistics: what was collected on the way here; None if nothing was.

    Returns:
        What `ARMTCache.stats` says. None stands for all rows where nothing was collected, or there is no denominator
        that the quantity needs, and for a row that has not met the quantity yet.
    """
    norm = torch.linalg.vector_norm(state.A, dim=(-2, -1))
    found = {"A_norm": norm.tolist(), "z_norm": None if state.z is None else state.z.norm(dim=-1).tolist()}
    names = ("mean_gamma", "zero_gamma_share", "max_read_ratio", "A_growth")
    if statistics is None:
        return found | dict.fromkeys((*names, *NEED_Z))
    c = statistics.columns()
    written = c["writes"].clamp(min=1)
    since = c["writes"] - c["next_mark"] / 4
    growth = 1000 * torch.log2(norm / c["earlier_norm"]) / since
    found["mean_gamma"] = (c["gamma"] / written).tolist()
    found["zero_gamma_share"] = (c["zero_gammas"] / written).tolist()
    found["max_read_ratio"] = _numbers(c["max_read_ratio"])
    found["A_growth"] = _numbers(growth.masked_fill((c["earlier_norm"] == 0) | (since <= 0), NONE))
    c["min_denominator"] = c["min_denominator"].minimum(c["min_qz"])  # of writes, and of reads
    return found | {name: None if state.z is None else _numbers(c[name]) for name in NEED_Z}


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [None if value in (NONE, -NONE) else value for value in values.tolist()]
