"""
When a model decodes at fixed shapes, and whose conversation lies in the buffers.

The buffers belong to the model's [`DecodeStep`], a conversation to its [`ARMTCache`]. While it is decoded, the cache's
tensors are in the buffers; whoever asks the cache for them, and another conversation that wants the buffers, makes them
move back. Whatever does not fit (a family, a device, a kind of call) goes the way of all other calls.
"""

import operator
import time
import weakref
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .cache_armt import ARMTCache
from .decode_step_armt import DecodeStep


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

logger = logging.get_logger(__name__)

# Devices on which a step is compiled. On a CPU that takes long and wins little.
COMPILED_DEVICES = {"cuda"}
# What equal computations may differ by, relative to the norm of the logits.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


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
        if low < 0 or high >= model.get_input_embeddings().num_embeddings:
            return None
    real = None
    if attention_mask is not None:
        if attention_mask.shape not in ((len(input_ids), 1), (len(input_ids), cache.columns + 1)):
            return None
        real = (attention_mask[:, -1] != 0).tolist()
    fast = model.fast
    if cache.lent_to is not None and cache.lent_to is not fast.decode:
        cache.take_back()  # before the lock is taken: two models that wait for each other would wait for ever
    with fast.lock:
        if not isinstance(fast.decode, FixedShapes) or not fast.decode.fits():
            if fast.decode is _PREPARING:
                return None
            if isinstance(fast.decode, FixedShapes):
                fast.decode.give_back()
            fast.decode = _PREPARING
            try:
                fast.decode = FixedShapes(model)
            finally:
                if fast.decode is _PREPARING:
                    fast.decode = None
        return fast.decode.read(input_ids, real, cache)


_PREPARING = object()


class FixedShapes:
    """
    A model's decode step as prepared for the model as it is now, and the conversation in its buffers.

    Attributes:
        reason: why this model cannot decode at fixed shapes; None if it can.
        step: the [`DecodeStep`]; None if it cannot.
        prepare_seconds: what preparation, compilation and capture took so far.
    """

    def __init__(self, model: "ARMTPreTrainedModel"):
        start = time.perf_counter()
        self.lock = model.fast.lock
        self.seen = _Fingerprint(model)
        self.owner, self.stream = (lambda: None), None
        self.all_real = True
        self.step, self.reason = None, _unsuitable(model)
        if self.reason is None:
            self.step, self.reason = prepare(model)
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
            self.step.recapture()
        return change != "changed"

    def read(self, input_ids: torch.LongTensor, real: list[bool] | None, cache: ARMTCache) -> torch.Tensor | None:
        """One column, see [`decode`]."""
        step = self.step
        if step is None:
            return None
        if step.device.type == "cuda":  # threads may use streams of their own
            stream = torch.cuda.current_stream(step.device)
            if self.stream is not None and stream != self.stream:
                stream.wait_stream(self.stream)
            self.stream = stream
        if self.owner() is not cache or cache.lent_to is not self:
            if cache.last_hidden is None or max(cache.opened) >= step.segment_size:
                return None
            self.give_back()
            if step.batch_size != len(input_ids):
                step.resize(len(input_ids))
            step.load(cache)
            cache.lend(self)
            self.owner = weakref.ref(cache)
        step.ids.copy_(input_ids)
        if real is None or all(real):
            if not self.all_real:
                step.real.fill_(True)
            self.all_real, real = True, None
        else:
            step.real.copy_(torch.tensor(real))
            self.all_real = False
        step.step()
        self._count(cache, real)
        return step.logits.clone() if step.captures else step.logits

    def _count(self, cache: ARMTCache, real: list[bool] | None) -> None:
        """Advances what the host knows, and writes the segments that are full."""
        counts = cache.__dict__
        if real is None:
            counts["opened"] = [n + 1 for n in cache.opened]
            counts["tokens"] = [n + 1 for n in cache.tokens]
        else:
            counts["opened"] = [n + r for n, r in zip(cache.opened, real, strict=True)]
            counts["tokens"] = [n + r for n, r in zip(cache.tokens, real, strict=True)]
        counts["columns"] += 1
        size = self.step.segment_size
        if size in cache.opened:
            full = [row for row, n in enumerate(cache.opened) if n == size]
            self.step.flush(full)
            counts["opened"] = [0 if n == size else n for n in cache.opened]
            counts["segments"] = [n + (row in full) for row, n in enumerate(cache.segments)]

    def __del__(self):
        if getattr(self, "step", None) is not None:
            self.step.__dict__.clear()  # compiled code refers to itself: without this, weights and buffers would stay

    def give_back(self, cache: ARMTCache | None = None) -> None:
        """Moves the conversation out of the buffers, into its cache; `cache`: if it is this one."""
        with self.lock:
            owner = self.owner()
            if owner is not None and owner.lent_to is self and cache in (None, owner):
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


# Whether a model can


def _unsuitable(model: "ARMTPreTrainedModel") -> str | None:
    """Why not to try: where weights are fetched, spread or unpacked in ways that a fixed step would not follow."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(hasattr(module, "_hf_hook") for module in model.modules()) or any(t.is_meta for t in tensors):
        return "its weights are offloaded or dispatched"
    if len({tensor.device for tensor in tensors}) > 1:
        return "its weights are on several devices"
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.model, "hf_quantizer", None) is not None:
        return "its weights are quantized"
    return None


@torch.no_grad()
def prepare(model: "ARMTPreTrainedModel") -> tuple[DecodeStep | None, str | None]:
    """
    A decode step that does what the model does, or the reason why there is none: tried on a random memory and a few
    tokens, one of them padding, with the end of a segment among them.
    """
    config = model.config.text_config
    kinds = ["full", "sliding"] if getattr(config, "sliding_window", None) is None else ["sliding", "full"]
    kinds.insert(0 if len(set(getattr(config, "layer_types", None) or ())) > 1 else 2, "by kind")
    if not getattr(config, "layer_types", None):
        kinds.remove("by kind")
    if getattr(config, "sliding_window", None) is None:
        kinds.remove("sliding")
    reason = "its keys cannot be told"
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        opened = max(model.config.segment_size - 2, 1)
        ids = torch.randint(model.get_input_embeddings().num_embeddings, (2, opened + 4), generator=generator)
        ids, first = ids.to(device), torch.zeros(2, opened, dtype=torch.long, device=device)
        first[0], first[1, -1] = 1, 1
        cache = model(ids[:, :opened], attention_mask=first, use_cache=True, logits_to_keep=1).past_key_values
        like = cache.keys
        if like is None:  # a segment of a single token
            like = model.decoder(ids[:, :1], use_cache=True).past_key_values
        columns = [(ids[:, opened + n, None], [True, n != 1]) for n in range(4)]
        _fill(model, cache, generator)
        other = cache.fork()
        expected = []
        for tokens, real in columns:
            mask = torch.tensor(real, device=device)[:, None]
            expected.append(model(tokens, attention_mask=mask, past_key_values=other).logits)
        expected = [torch.stack(expected), *(state.A for state in other.states.values()), other.last_hidden]
        for masks in kinds:
            try:
                step = DecodeStep(model, like, masks, compiles=False, captures=False)
                found = _try(step, cache.fork(), columns)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            error = max(((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))
            if error <= TOLERANCE.get(step.dtype, HALF_TOLERANCE):
                on_gpu = device.type == "cuda"
                return DecodeStep(model, like, masks, device.type in COMPILED_DEVICES, on_gpu), None
            reason = f"its results differ by {error:.1e} from those of its own forward"
    return None, reason


def _fill(model: "ARMTPreTrainedModel", cache: ARMTCache, generator: torch.Generator) -> None:
    """Random memories, since those of a fresh conversion would add nothing."""
    scale = model.memory_tokens.weight.float().std().item()
    for index in cache.states:
        empty = model.memory[str(index)].zero_state(2, cache.last_hidden.device)
        A = scale * torch.randn(empty.A.shape, generator=generator)
        z = None if empty.z is None else 0.5 + torch.rand(empty.z.shape, generator=generator)
        filled = {"A": A, "z": z}
        cache.states[index] = type(empty)(**{n: None if t is None else t.to(empty.A) for n, t in filled.items()})
    cache.segments = [1, 1]


def _try(step: DecodeStep, cache: ARMTCache, columns: list) -> list[torch.Tensor]:
    step.resize(2)
    step.load(cache)
    opened, logits = cache.opened, []
    for tokens, real in columns:
        step.ids.copy_(tokens)
        step.real.copy_(torch.tensor(real))
        step.step()
        logits.append(step.logits.clone())
        opened = [n + r for n, r in zip(opened, real, strict=True)]
        full = [row for row, n in enumerate(opened) if n == step.segment_size]
        if full:
            step.flush(full)
        opened = [0 if n == step.segment_size else n for n in opened]
    return [torch.stack(logits), *(state.A for state in step.states.values()), step.last_hidden]
