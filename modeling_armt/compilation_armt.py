"""What makes one model fast: compiled code, captured graphs and their buffers, as far as they exist."""

import threading
from collections.abc import Callable

import torch


_SIGNS = ("out of memory", "allocate memory", "not enough memory", "alloc_failed", "no space left")


def is_passing(error: BaseException | None) -> bool:
    """Whether what failed may work another time, since there was only no memory (or disk) left for it."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(s in str(error).lower() for s in _SIGNS):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False


class FastPaths:
    """
    Belongs to one model object. It is not part of the model: never saved, and a copy of the model starts without.

    Attributes:
        enabled: whether `compile_armt` was called.
        lock: held by whoever uses what follows.
        diagonal: groups of layers for the diagonal schedule, as far as they were needed.
        refused: why some layers cannot be grouped.
        decode: the prepared decode step, None before its first use.
        postponed: the conversation for which there was no memory to prepare one (or None, as of a weak reference).
    """

    def __init__(self, enabled: bool = False):
        self.enabled = enabled
        self.lock = threading.RLock()
        self.diagonal: list = []
        self.refused: dict[tuple, str] = {}
        self.decode = None
        self.postponed: Callable = lambda: None

    @property
    def cold_start_s(self) -> float:
        """Seconds that preparation, compilation and capture have taken so far, before anything was fast."""
        return sum(groups.cold_start_s for groups in self.diagonal) + getattr(self.decode, "prepare_seconds", 0.0)

    def __deepcopy__(self, memo) -> "FastPaths":
        return FastPaths(self.enabled)

    def __reduce__(self):
        return FastPaths, (self.enabled,)
