"""A function of buffers as a CUDA graph."""

import time
from collections.abc import Callable

import torch
from transformers.utils import logging

from .compilation_armt import is_passing


logger = logging.get_logger(__name__)


class Replay:
    """
    A function without arguments and result, which works on buffers that stay where they are. It is called the first
    time (and compiled, if it is to be), captured the second time, and replayed from then on.

    Args:
        function: the function; run without gradients.
        captures: False to call it every time.
        pool: of memory, shared by graphs that are never replayed at the same time; None for one of its own.

    Attributes:
        seconds: what compilation and capture took: the time of the calls that were not replayed.
    """

    def __init__(self, function: Callable[[], None], captures: bool, pool=None):
        self.function, self.captures, self.pool = function, captures, pool
        self.calls, self.capture_at, self.graph, self.seconds = 0, 1, None, 0.0

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        start = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            if self.captures and self.calls >= self.capture_at:
                self._capture()
            if self.graph is None:
                self.function()
            else:
                self.graph.replay()
        if self.captures or not self.calls:
            self.seconds += time.perf_counter() - start
        self.calls += 1

    def _capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            # What other threads do on the device meanwhile does not matter.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.function()
        except Exception as error:
            if is_passing(error):
                self.capture_at = 2 * self.calls + 1  # not every time: trying takes its time too
            else:
                self.captures = False
                logger.warning(f"a call cannot be captured as a CUDA graph ({error}); it runs without.")
        else:
            self.graph = graph
