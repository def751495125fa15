"""
When a model decodes at fixed shapes, and whose conversation lies in the buffers.

The buffers belong to the model's [`DecodeStep`], a conversation to its [`ARMTCache`]. While it is decoded, the
cache's tensors are in the buffers; whoever asks the cache for them, and another conversation that wants the buffers,
makes them move back. Whatever does not fit (a family, a device, a kind of call) goes the way of all other calls.
"""

import operator
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .cache_armt import ARMTCache
from .compilation_armt import is_passing
from .decode_probe_armt import find_decode_step, unsuitable


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

logger = logging.get_logger(__name__)

# Where it is worth while. On a CPU the step as it is wins nothing; compiled, 10 to 30 percent of a small model's time.
DEVICES = {"cuda"}
COMPILES = True
# Where the host has time while a token is read.
READS_AHEAD = {"cuda"}


def decode(
    model: "ARMTPreTrainedModel",
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None,
    cache: ARMTCache,
) -> torch.Tensor | None:
    """
    Reads one more column into a cache that has read something.

    Args:
        input_ids: `(B, 1)`.
        attention_mask: `(B, 1)`, or with the columns read before.

    Returns:
        Logits `(B, 1, vocabulary)`, or None if this call has to go the usual way.
    """
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] != 1 or len(cache.tokens) != len(input_ids):
        return None
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(input_ids.device.type):
        return None
    if input_ids.device.type == "cpu":  # elsewhere a look at the ids would wait for the device
        low, high = torch.aminmax(input_ids)
        if low < 0 or high >= model.num_embeddings:
            return None
    real = None
    if attention_mask is not None:
        if attention_mask.shape not in ((len(input_ids), 1), (len(input_ids), cache.columns + 1)):
            return None
        real = (attention_mask[:, -1] != 0).tolist()
    fast = model.fast
    if cache.lent_to is not None and cache.lent_to is not fast.decode:
        cache.contents()  # before the lock is taken: two models that wait for each other would wait for ever
    with fast.lock:
        if not isinstance(fast.decode, FixedShapes) or not fast.decode.fits():
            if fast.decode is _PREPARING or fast.postponed() is cache:
                return None
            if isinstance(fast.decode, FixedShapes):
                fast.decode.give_back()
            fast.decode = _PREPARING
            try:
                fast.decode = FixedShapes(model)
            except Exception as error:
                if not is_passing(error):
                    raise
                fast.postponed = weakref.ref(cache)
                logger.warning(
                    f"there is no room to prepare fast decoding ({error}); the next conversation tries again."
                )
                return None
            finally:
                if fast.decode is _PREPARING:
                    fast.decode = None
        return fast.decode.read(input_ids, real, cache)


def read_ahead(model: "ARMTPreTrainedModel", input_ids: torch.LongTensor, cache: ARMTCache) -> None:
    """[`FixedShapes.begin`], if this conversation is decoded at fixed shapes."""
    if isinstance(model.fast.decode, FixedShapes) and cache.lent_to is model.fast.decode:
        model.fast.decode.begin(input_ids, cache)


def undo_ahead(model: "ARMTPreTrainedModel") -> None:
    """[`FixedShapes.undo`]"""
    if isinstance(model.fast.decode, FixedShapes):
        model.fast.decode.undo()


def _mark(ids: torch.Tensor) -> int | torch.Tensor:
    """What tells later whether somebody changed ids in place; tensors of inference mode do not count changes."""
    return ids.clone() if ids.is_inference() else ids._version


def _is_same(ids: torch.Tensor, before: torch.Tensor, mark: int | torch.Tensor) -> bool:
    """
    Whether ids are those that `before` was, by where they lie: comparing values waits for what the device was asked to
    do before.
    """
    if isinstance(mark, torch.Tensor):
        return torch.equal(ids, mark)
    return ids.data_ptr() == before.data_ptr() and ids.shape == before.shape and ids._version == mark


_PREPARING = object()


class FixedShapes:
    """
    A model's decode step as prepared for the model as it is now, and the conversation in its buffers.

    Attributes:
        reason: why this model cannot decode at fixed shapes; None if it can.
        step: the [`DecodeStep`]; None if it cannot.
        prepare_seconds: what preparation, compilation and capture took so far.
        begun: the ids of the column that was read ahead, and their mark; None if there is none.
    """

    def __init__(self, model: "ARMTPreTrainedModel"):
        start = time.perf_counter()
        self.lock = model.fast.lock
        self.seen = _Fingerprint(model)
        self.owner, self.stream, self.side = (lambda: None), None, None
        self.all_real, self.begun = True, None
        self.step, self.reason = None, "it wins nothing on this device"
        if model.get_input_embeddings().weight.device.type not in DEVICES:
            self._seconds = 0.0
            return
        self.reason = unsuitable(model)
        if self.reason is None:
            self.step, self.reason = find_decode_step(model, COMPILES)
        if self.reason is not None:
            logger.warning(
                f"{model.config.text_config.model_type} cannot decode at fixed shapes ({self.reason}); it decodes the "
                "usual way, which is slower."
            )
        self._seconds = time.perf_counter() - start

    @property
    def prepare_seconds(self) -> float:
        return self._seconds + (0.0 if self.step is None else self.step.prepare_seconds)

    def fits(self) -> bool:
        """Whether the model still is the one that was prepared. Weights that have moved are found here."""
        change = self.seen.change()
        if change == "moved" and self.step is not None:
            self.undo()
            self.step.recapture()
        return change != "changed"

    def read(self, input_ids: torch.LongTensor, real: list[bool] | None, cache: ARMTCache) -> torch.Tensor | None:
        """One column, see [`decode`]."""
        if self.step is None:
            return None
        # Asked before the stream waits for what was begun.
        begun = self.begun is not None and _is_same(input_ids, *self.begun)
        with self._on_device():
            return self._read(input_ids, real, cache, begun)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Work on the buffers follows what was done on them before, also if threads use streams of their own."""
        device = self.step.device
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self.stream is not None and stream != self.stream:
                stream.wait_stream(self.stream)
            self.stream = stream
            yield

    def _read(
        self, input_ids: torch.LongTensor, real: list[bool] | None, cache: ARMTCache, begun: bool
    ) -> torch.Tensor | None:
        step = self.step
        if self.owner() is not cache or cache.lent_to is not self:
            if cache.last_hidden is None:  # nothing but padding so far
                return None
            self.give_back()
            self.begun = None  # of a cache that is gone
            if step.batch_size != len(input_ids):
                step.resize(len(input_ids))
            step.load(cache)
            cache.lend(self)
            self.owner = weakref.ref(cache)
        real = None if real is None or all(real) else real
        if not begun or real is not None:
            self.undo()
        # Made before anything changes: it may be what there is no memory for.
        logits = None if step.logits is None else torch.empty_like(step.logits)
        if self.begun is None:
            self._take(input_ids, real)
        with self._undone_if_it_fails(cache):
            if self.begun is None:
                step.step()
            # The next step overwrites them.
            logits = step.logits.clone() if logits is None else logits.copy_(step.logits)
            self._count(cache, real)
        self.begun = None
        return logits

    @contextmanager
    def _undone_if_it_fails(self, cache: ARMTCache) -> Iterator[None]:
        """Around a step and what follows, up to where the cache is told of it."""
        try:
            yield
        except BaseException:
            self.begun = None
            self.step.restore(cache.opened)
            raise

    def _take(self, input_ids: torch.LongTensor, real: list[bool] | None) -> None:
        """Hands a column to the step; without padding that is nothing but the ids."""
        self.step.ids.copy_(input_ids)
        if real is not None:
            self.all_real = False
            self.step.real.copy_(torch.tensor(real))
        elif not self.all_real:
            self.step.real.fill_(True)
            self.all_real = True

    def _count(self, cache: ARMTCache, real: list[bool] | None) -> None:
        """Writes the segments that are full, and advances what the host knows."""
        taken = [1] * len(cache.tokens) if real is None else real
        opened = [n + r for n, r in zip(cache.opened, taken, strict=True)]
        full = [row for row, n in enumerate(opened) if n == self.step.segment_size]
        if full:
            self.step.flush(full)
        cache.count(
            opened=[0 if row in full else n for row, n in enumerate(opened)],
            segments=[n + (row in full) for row, n in enumerate(cache.segments)],
            tokens=[n + r for n, r in zip(cache.tokens, taken, strict=True)],
            columns=cache.columns + 1,
        )

    def begin(self, input_ids: torch.LongTensor, cache: ARMTCache) -> None:
        """
        Reads the column that comes next before anybody asks for it, on a stream of its own, so that the host's work
        between two tokens costs the device nothing. The next call with these ids finds it done; whatever else happens
        undoes it.

        Args:
            input_ids: `(B, 1)`, real in all rows.
        """
        with self.lock:
            known = self.owner() is cache and cache.lent_to is self and self.begun is None and self.all_real
            if known and self.step.device.type in READS_AHEAD and self.step.is_ready:
                mark = _mark(input_ids)
                with self._beside(), self._on_device(), self._undone_if_it_fails(cache):
                    self.step.ids.copy_(input_ids)
                    self.step.step()
                    self.begun = input_ids, mark

    def undo(self) -> None:
        """Takes back what was read ahead."""
        with self.lock:
            begun, self.begun = self.begun, None  # the ids stay until the device is done with them
            if begun is not None:
                with self._on_device():
                    self.step.restore()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        device = self.step.device
        if device.type != "cuda":
            yield
            return
        if self.side is None:
            self.side = torch.cuda.Stream(device)
        with torch.cuda.stream(self.side):
            yield

    def __del__(self):
        if getattr(self, "step", None) is not None:
            self.step.clear()

    def give_back(self, cache: ARMTCache | None = None) -> None:
        """Moves the conversation out of the buffers, into its cache; `cache`: if it is this one."""
        with self.lock:
            owner = self.owner()
            if owner is not None and owner.lent_to is self and cache in (None, owner):
                self.undo()
                with self._on_device():
                    owner.receive(self.step.unload(owner.opened, owner.segments))
                self.owner = lambda: None


class _Fingerprint:
    """
    What a prepared step relies on: which modules a model consists of, where their tensors are, which adapters are on.
    Looked at before every token, so it keeps to what C code compares.
    """

    def __init__(self, model: "ARMTPreTrainedModel"):
        modules = list(model.modules())
        self._children = [module._modules for module in modules if module._modules]
        self._children_were = [dict(children) for children in self._children]
        places = [(place, name) for m in modules for place in (m._parameters, m._buffers) for name in place]
        self._places = [*zip(*((place, name) for place, name in places if place[name] is not None), strict=True)]
        self._pointers, self._kinds = self._look()
        self._adapters = [vars(module) for module in modules if "merged_adapters" in vars(module)]
        self._adapters_were = self._adapters_are()

    def _look(self) -> tuple[list[int], list[tuple]]:
        tensors = list(map(operator.getitem, *self._places))
        return list(map(torch.Tensor.data_ptr, tensors)), [(t.dtype, t.device, t.shape) for t in tensors]

    def _adapters_are(self) -> list[tuple]:
        names = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
        return [tuple(str(adapter.get(name)) for name in names) for adapter in self._adapters]

    def change(self) -> str | None:
        """ "changed" if a step has to be prepared anew, "moved" if only addresses are others, None if nothing is."""
        if self._children != self._children_were or (self._adapters and self._adapters_are() != self._adapters_were):
            return "changed"
        try:
            if list(map(torch.Tensor.data_ptr, map(operator.getitem, *self._places))) == self._pointers:
                return None
            self._pointers, kinds = self._look()
        except (KeyError, TypeError):  # gone, or None
            return "changed"
        return "moved" if kinds == self._kinds else "changed"
