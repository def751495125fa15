"""
What a text leaves behind: the associative state of every layer, and the keys and values of the segment still open.

`generate` sees [`ARMTCache`], whose length is the number of columns read. Inside it the backbone sees [`SegmentKeys`],
whose length is the number of positions in the open segment, at most `segment_size`: that is all that ever grows.
No tensor is modified in place, so copies share them and cost nothing, and a cache changes all at once: whoever forks
or saves it meanwhile, in another thread too, gets what it held before or after. (While a text is decoded by compiled
code, its tensors are in that code's buffers: they come back, copied, as soon as anybody asks for them.)
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Contents(NamedTuple):
    """All that an [`ARMTCache`] holds, which says what it is."""

    states: dict[int, MemoryState | None]
    statistics: dict[int, LayerStatistics]
    keys: SegmentKeys | None
    last_hidden: torch.Tensor | None
    opened: list[int]
    segments: list[int]
    tokens: list[int]
    columns: int
    lent_to: Any = None


class ARMTCache(Cache):
    """
    The whole memory of a batch of texts. Made by a model's forward (`use_cache=True`) and passed back to it as
    `cache`; `ARMTCache()` is empty.

    Attributes:
        states: [`MemoryState`] by layer, None before the first write.
        statistics: [`LayerStatistics`] by layer, outside of training.
        keys: [`SegmentKeys`] of the open segments, None if none is open.
        last_hidden: `(B, D)`, the backbone's last hidden state at each row's last real token.
        opened: tokens in each row's open segment.
        segments: segments each row has written.
        tokens: real tokens each row has read.
        columns: columns of input read in this conversation, padding included: what `generate` calls the length.
        lent_to: who has the tensors in its buffers (`give_back(cache)` makes it return them), None if nobody has.
    """

    # Whether its owner gives it up if a call fails, so that the call need not keep what it replaces.
    expendable = False

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._contents = Contents({}, {}, None, None, [], [], [], 0)

    def contents(self) -> Contents:
        """What the cache holds, all of it of one moment."""
        while True:
            contents = self._contents  # looked at once: another thread may replace it
            if contents.lent_to is None:
                return contents
            contents.lent_to.give_back(self)

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
        come from here on. Neither side sees what the other reads. Costs no memory (where gradients are on, a copy of
        what was read in inference mode, since such tensors take part in no training).
        """
        return self._with(self._map(_trainable)._replace(columns=0))

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
        states, statistics, *_ = self.contents()
        layers = {layer: state for layer, state in states.items() if state is not None}
        return {layer: summary(state, statistics.get(layer)) for layer, state in layers.items()}

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
        self._contents = self._contents._replace(
            states=None, statistics=None, keys=None, last_hidden=None, lent_to=borrower
        )

    def count(self, **numbers: Any) -> None:
        """Sets numbers (`tokens`, ...) while the tensors are lent."""
        self._contents = self._contents._replace(**numbers)

    def receive(self, tensors: dict[str, Any]) -> None:
        """The end of `lend`: what the tensors have become, by name."""
        self._contents = self._contents._replace(**tensors, lent_to=None)

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_contents": self.contents()}

    def become(self, other: "ARMTCache") -> None:
        """Takes over all that `other` holds."""
        self._contents = other.contents()

    def _with(self, contents: Contents) -> "ARMTCache":
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__, _contents=contents)
        return new

    def _select(self, rows: torch.Tensor) -> None:
        index = rows.tolist()
        new = self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        opened, segments, tokens = ([numbers[i] for i in index] for numbers in (new.opened, new.segments, new.tokens))
        keys = new.keys
        if keys is not None:  # the row with the longest open segment may be gone
            length = max(opened, default=0)
            keys = keys.map(lambda states: states[:, :, -length:]) if length else None
        self._contents = new._replace(opened=opened, segments=segments, tokens=tokens, keys=keys)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Contents:
        """What the cache holds, with `function` applied to every tensor."""
        contents = self.contents()
        states = {i: None if state is None else state.map(function) for i, state in contents.states.items()}
        return contents._replace(
            states=states,
            statistics={i: statistics.map(function) for i, statistics in contents.statistics.items()},
            keys=None if contents.keys is None else contents.keys.map(function),
            last_hidden=None if contents.last_hidden is None else function(contents.last_hidden),
        )


def _trainable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if torch.is_grad_enabled() and tensor.is_inference() else tensor


def _part(name: str, lent: bool) -> property:
    """One of the [`Contents`] as an attribute; `lent`: what has to come back from whoever has it in its buffers."""
    return property(
        lambda cache: getattr(cache.contents() if lent else cache._contents, name),
        lambda cache, value: setattr(cache, "_contents", cache.contents()._replace(**{name: value})),
    )


for _name in Contents._fields:
    setattr(ARMTCache, _name, _part(_name, lent=_name in ("states", "statistics", "keys", "last_hidden")))
