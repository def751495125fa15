"""
What a text leaves behind: the associative state of every layer, and the keys and values of the segment still open.

`generate` sees [`ARMTCache`], whose length is the number of columns read. Inside it the backbone sees [`SegmentKeys`],
whose length is the number of positions in the open segment, at most `segment_size`: that is all that ever grows.
No tensor is modified in place, so copies share them and cost nothing. (While a text is decoded by compiled code, its
tensors are in that code's buffers: they come back, copied, as soon as anybody asks for them.)
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .memory_armt import MemoryState
from .segmentation_armt import Step
from .statistics_armt import LayerStatistics, summary
from .transfer_armt import on_device


class SegmentKeys(DynamicCache):
    """
    Keys and values of the open segments, `(B, heads, L, head_dim)` per layer. Every row's tokens end at the last of
    the L columns, so that to the backbone an open segment looks like a left-padded batch, which all decoders know.
    """

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "SegmentKeys":
        """A copy with `function` applied to the keys and values of every layer."""
        new = copy.copy(self)
        new.layers = [copy.copy(layer) for layer in self.layers]
        for layer in new.layers:
            if layer.is_initialized:
                layer.keys, layer.values = function(layer.keys), function(layer.values)
        return new

    def after(self, step: Step, length_before: int) -> "SegmentKeys | None":
        """
        Drops the keys of closed segments and of filler, and moves the rest to the right again.

        Args:
            step: the step that was just read into these keys.
            length_before: L before it.
        """
        length = max(step.open_after)
        if length == 0:
            return None
        if step.is_uniform:
            return self
        device = self.layers[0].keys.device
        end = on_device([length_before + taken for taken in step.taken], device)
        columns = (end[:, None] - length + torch.arange(length, device=device)).clamp(min=0)

        def align(states: torch.Tensor) -> torch.Tensor:
            return torch.take_along_dim(states, columns.to(states.device)[:, None, :, None], dim=2)

        return self.map(align)


_LENT = ("states", "statistics", "keys", "last_hidden")


class ARMTCache(Cache):
    """
    The whole memory of a batch of texts. Made by a model's forward (`use_cache=True`) and passed back to it as
    `cache`; `ARMTCache()` is empty.

    Attributes:
        states: [`MemoryState`] by layer, None before the first write.
        keys: [`SegmentKeys`] of the open segments, None if none is open.
        opened: tokens in each row's open segment.
        segments: segments each row has written.
        tokens: real tokens each row has read.
        last_hidden: `(B, D)`, the backbone's last hidden state at each row's last real token.
        columns: columns of input read in this conversation, padding included: what `generate` calls the length.
        lent_to: who has the tensors in its buffers (`give_back(cache)` makes it return them), None if nobody has.
    """

    lent_to: Any = None
    # Whether its owner gives it up if a call fails, so that the call need not keep what it replaces.
    expendable = False

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.lent_to = None
        self.states: dict[int, MemoryState | None] = {}
        self.statistics: dict[int, LayerStatistics] = {}
        self.keys: SegmentKeys | None = None
        self.opened: list[int] = []
        self.segments: list[int] = []
        self.tokens: list[int] = []
        self.last_hidden: torch.Tensor | None = None
        self.columns = 0

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first input."""
        return len(self.tokens) or -1

    def __repr__(self) -> str:
        return f"ARMTCache(tokens={self.tokens}, segments={self.segments}, opened={self.opened})"

    def __len__(self) -> int:
        return len(self.states)

    def fork(self) -> "ARMTCache":
        """
        A new conversation on the same memory: it goes on from the same state, and `generate` takes only the ids that
        come from here on. Neither side sees what the other reads. Costs no memory.
        """
        new = self._map(lambda tensor: tensor)
        new.columns = 0
        return new

    def stats(self) -> dict[int, dict[str, list[float | None] | None]]:
        """
        Health of the memory, by layer, name and row; empty before the first write.

            A_norm, z_norm      norms of A and z
            A_growth            doublings of |A| per 1,000 segments, over about the later half of the text
            mean_gamma          of all memory tokens written
            zero_gamma_share    share of the memory tokens written whose gamma was 0, so that z took nothing of them
            lambda_max          over all writes but the first, the largest eigenvalue of the matrix
                                M = sum_m beta k k^T / (k . z + eps): an upper bound, usually 0 to 5% too large.
                                A grows exponentially where it stays above 2
            lambda_last         the same of the last write
            min_kz_ratio        smallest (k . z + eps) / |k|^2 of a write: gamma is 0 from 1 on
            min_qz              smallest q . z + eps that a read divided by
            min_denominator     smallest that a read or a write divided by
            max_read_ratio      largest |read| / |x|: what the memory added to a position, beside what was there

        None where a row has met nothing of the kind yet, for all rows if nothing was collected (nothing is in
        training) or if a memory without denominator has no such thing.
        """
        layers = {layer: state for layer, state in self.states.items() if state is not None}
        return {layer: summary(state, self.statistics.get(layer)) for layer, state in layers.items()}

    # What generate and its helpers ask of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.24

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    @property
    def is_initialized(self) -> bool:
        return bool(self.tokens)

    is_compileable = False
    is_croppable = False
    is_sliding: list[bool] = []
    is_linear: list[bool] = [False]  # generate cuts what was read before off the ids, unless all layers are

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the rows: beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the given rows, in the given order."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self._select(torch.arange(len(self.tokens)).repeat_interleave(repeats))

    def update(self, *args, **kwargs):
        raise NotImplementedError("an ARMTCache is advanced by the model's forward, not by attention layers.")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "an ARMTCache cannot be cropped: what is written to an associative memory cannot be taken back. Keep a "
            "cache.fork() from before the tokens you may want to undo."
        )

    # Lending

    def lend(self, borrower: Any) -> None:
        """Leaves the tensors to `borrower`, which has copied them to where it works on them."""
        for name in _LENT:
            del self.__dict__[name]
        self.lent_to = borrower

    def receive(self, tensors: dict[str, Any]) -> None:
        """The end of `lend`: what the tensors have become, by name."""
        self.__dict__.update(tensors, lent_to=None)

    def take_back(self) -> None:
        """Ends lending, if there is any."""
        borrower = self.lent_to
        if borrower is not None:
            borrower.give_back(self)

    def __getattr__(self, name: str):  # asked for what is not there
        if name in _LENT and self.lent_to is not None:
            self.take_back()
            return self.__dict__[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LENT:
            self.take_back()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        self.take_back()
        return self.__dict__.copy()

    # Copies

    def become(self, other: "ARMTCache") -> None:
        """Takes over all that `other` holds."""
        self.take_back()
        self.__dict__.update(other.__getstate__())

    def _select(self, rows: torch.Tensor) -> None:
        index = rows.tolist()
        self.become(self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device))))
        for name in ("opened", "segments", "tokens"):
            setattr(self, name, [getattr(self, name)[i] for i in index])
        if self.keys is not None:  # the row with the longest open segment may be gone
            length = max(self.opened, default=0)
            self.keys = self.keys.map(lambda states: states[:, :, -length:]) if length else None

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ARMTCache":
        """A copy with `function` applied to every tensor."""
        new = copy.copy(self)
        new.states = {layer: None if state is None else state.map(function) for layer, state in self.states.items()}
        new.statistics = {layer: statistics.map(function) for layer, statistics in self.statistics.items()}
        new.keys = None if self.keys is None else self.keys.map(function)
        new.last_hidden = None if self.last_hidden is None else function(self.last_hidden)
        return new
