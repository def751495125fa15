"""What makes one model fast: compiled code, captured graphs and their buffers, as far as they exist."""

import threading


class FastPaths:
    """
    Belongs to one model object. It is not part of the model: never saved, and a copy of the model starts without.

    Attributes:
        enabled: whether `compile_armt` was called.
        lock: held by whoever uses what follows.
        diagonal: groups of layers for the diagonal schedule, as far as they were needed.
        refused: why some layers cannot be grouped.
        decode: the prepared decode step, None before its first use.
    """

    def __init__(self, enabled: bool = False):
        self.enabled = enabled
        self.lock = threading.RLock()
        self.diagonal: list = []
        self.refused: dict[tuple, str] = {}
        self.decode = None

    @property
    def cold_start_s(self) -> float:
        """Seconds that preparation, compilation and capture have taken so far, before anything was fast."""
        return sum(groups.cold_start_s for groups in self.diagonal) + getattr(self.decode, "prepare_seconds", 0.0)

    def __deepcopy__(self, memo) -> "FastPaths":
        return FastPaths(self.enabled)

    def __reduce__(self):
        return FastPaths, (self.enabled,)
