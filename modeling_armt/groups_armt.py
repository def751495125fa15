"""How the layers of a model can be run as groups: found out once, checked against the layers one by one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .attachment_armt import find_decoder_layers
from .cells_armt import CellGroup
from .compilation_armt import is_passing
from .native_armt import NativeCall, native_pass
from .stacking_armt import CannotStack, kind, walk


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

# From so many positions on a diagonal gains nothing by more rows.
FULL_DIAGONAL = 16 * 1024
# Groups that are kept for when they are needed again: training and evaluation, with and without an adapter, ...
MOST_KEPT = 7


class LayerGroups:
    """
    The layers of a model in groups of equal ones.

    Args:
        model: the model.
        calls: how its decoder calls the layers, with their outputs.
        kinds: what can be told apart of each layer and its call.

    Attributes:
        cold_start_s: seconds that preparation and compilation have taken so far.
    """

    def __init__(self, model: "ARMTPreTrainedModel", calls: list[NativeCall], kinds: list[tuple]):
        self.kinds = kinds
        # By layer, the length of the tuple that it returns, 0 for a tensor.
        self.tuple_sizes = [len(call.output) if isinstance(call.output, tuple) else 0 for call in calls]
        self.cold_start_s = 0.0
        self.warm: set[tuple] = set()  # shapes that are compiled
        self.idle: list = []  # buffers that no call uses at the moment
        layers = find_decoder_layers(model.decoder, len(calls))
        members: dict[tuple, list[int]] = {}
        for number, of_layer in enumerate(kinds):
            members.setdefault(of_layer, []).append(number)
        self.groups = []
        for indices in members.values():
            memories = [model.memory[str(i)] for i in indices] if str(indices[0]) in model.memory else None
            self.groups.append(
                CellGroup(indices, [layers[i] for i in indices], memories, calls[indices[0]], model.fast.enabled)
            )

    @contextmanager
    def compiling(self, shape: tuple) -> Iterator[None]:
        """Around a call: lets it be compiled if its shape is new, and counts the time."""
        shape = (*shape, torch.is_grad_enabled())
        if shape in self.warm:
            yield
            return
        started = time.perf_counter()
        with torch._dynamo.config.patch(recompile_limit=256):
            yield
        self.cold_start_s += time.perf_counter() - started
        self.warm.add(shape)

    @torch.no_grad()
    def check(self, model: "ARMTPreTrainedModel", embeds: torch.Tensor, calls: list[NativeCall], last: torch.Tensor):
        """
        Compares with the decoder's own pass, without dropout.

        Args:
            embeds: `(W, P, D)`, what the decoder was given.
            calls: its calls of the layers.
            last: its last hidden state.

        Raises:
            CannotStack: if a group does not do what its layers do, or if the decoder does more than run one layer
                after the other.
        """
        layers = find_decoder_layers(model.decoder, len(calls))
        outputs = [call.output[0] if isinstance(call.output, tuple) else call.output for call in calls]
        for group in self.groups:
            inputs = group.inputs(model, layers, calls)
            x = torch.stack([calls[i].x for i in group.indices])
            with group.layers.evaluating():
                together = group.run_layers(inputs.weights, x, inputs.shared, inputs.own)
            for i, y in zip(group.indices, together, strict=True):
                if not _close(y, outputs[i]):
                    raise CannotStack(f"layers {group.indices} do not compute the same when run as one")
        others, _ = native_pass(model, 1.5 * embeds.flip(1), self.answers())
        for call, other in zip(calls, others, strict=True):
            if not all(map(_same, call.leaves, other.leaves)):
                raise CannotStack("its layers are called with something that depends on the text")
        if not all(torch.equal(call.x, output) for call, output in zip(calls[1:], outputs, strict=False)):
            raise CannotStack("its decoder does something between its layers")
        if not model.training and not _close(self.after_layers(model, outputs[-1]), last):
            raise CannotStack("what its decoder does after its layers depends on more than the last one")

    def after_layers(self, model: "ARMTPreTrainedModel", hidden: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of the `(B, P, D)` output of its last layer."""
        answers = self.answers()
        last = answers[-1]
        answers[-1] = lambda x: last(hidden)
        embeds = hidden.new_zeros(*hidden.shape[:2], model.memory_tokens.embedding_dim)
        return native_pass(model, embeds, answers)[1]

    def answers(self) -> list[Callable]:
        """What stands in for each layer and returns its input, in the form that the decoder expects."""
        return [partial(_as_output, size) for size in self.tuple_sizes]


def _as_output(tuple_size: int, x: torch.Tensor):
    return (x, *[None] * (tuple_size - 1)) if tuple_size else x


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    error = (a - b).float().norm() / b.float().norm().clamp(min=1e-30)
    return bool(error < (1e-3 if b.dtype in (torch.float32, torch.float64) else 5e-2))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


class Prepared(NamedTuple):
    """The groups of a model, for one call: with what its decoder calls the layers."""

    groups: LayerGroups
    calls: list[NativeCall]
    one_by_one: bool = False  # cell by cell, in the order of the sequential schedule


def lanes_for(model: "ARMTPreTrainedModel", rows: int) -> int:
    """How many rows are read side by side: as many as fill a diagonal, and all of them where gradients are wanted."""
    if torch.is_grad_enabled():
        return rows
    config = model.config
    positions = config.text_config.num_hidden_layers * (config.segment_size + config.num_mem_tokens)
    return min(rows, -(-FULL_DIAGONAL // positions))


def prepare(model: "ARMTPreTrainedModel", lanes: int) -> Prepared:
    """
    Finds out how a model's layers can be run as groups, or finds that again.

    Raises:
        CannotStack: saying what about the model is in the way.
    """
    started = time.perf_counter()
    config, fast = model.config, model.fast
    layers = find_decoder_layers(model.decoder, config.text_config.num_hidden_layers)
    if (
        len({tensor.device for _, part in walk(model) for tensor in part._parameters.values() if tensor is not None})
        > 1
    ):
        raise CannotStack("it is spread over several devices")
    autocast = torch.get_autocast_dtype(model.device.type) if torch.is_autocast_enabled(model.device.type) else None
    around = (config.text_config._attn_implementation, autocast)
    memory_kinds = {int(index): kind(memory) for index, memory in model.memory.items()}
    kinds = [(kind(layer), memory_kinds.get(index), around) for index, layer in enumerate(layers)]
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (lanes, config.segment_size + config.num_mem_tokens, model.memory_tokens.embedding_dim)
    embeds = 0.02 * torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
    with fast.lock, torch.no_grad():
        if tuple(kinds) in fast.refused:
            raise CannotStack(fast.refused[tuple(kinds)])
        known = [entry for entry in fast.diagonal if [of_layer[:3] for of_layer in entry.kinds] == kinds]
        if known:
            calls, _ = native_pass(model, embeds, known[0].answers())
            kinds_now = _kinds_of_calls(kinds, calls)
            for entry in known:
                if entry.kinds == kinds_now:
                    _keep(fast.diagonal, entry)
                    return Prepared(entry, calls)
        try:
            calls, last = native_pass(model, embeds)
            groups = LayerGroups(model, calls, _kinds_of_calls(kinds, calls))
            groups.check(model, embeds, calls, last)
        except Exception as error:  # whatever an operation raises that cannot be batched
            if is_passing(error):
                raise
            reason = str(error).strip().split("\n")[0]
            if not isinstance(error, CannotStack):
                reason = f"its layers cannot be run as one ({type(error).__name__}: {reason})"
            fast.refused = {**dict(list(fast.refused.items())[-MOST_KEPT:]), tuple(kinds): reason}
            raise CannotStack(reason) from error
        calls = [call._replace(x=None, output=None) for call in calls]
        groups.cold_start_s += time.perf_counter() - started
        _keep(fast.diagonal, groups)
    return Prepared(groups, calls)


def _keep(entries: list[LayerGroups], newest: LayerGroups) -> None:
    """Only the newest groups are kept, and only the last of them keeps buffers."""
    entries[:] = [entry for entry in entries if entry is not newest][-MOST_KEPT:] + [newest]
    for entry in entries[:-1]:
        entry.idle.clear()


def _kinds_of_calls(kinds: list[tuple], calls: list[NativeCall]) -> list[tuple]:
    return [(*of_layer, *_describe_call(call)) for of_layer, call in zip(kinds, calls, strict=True)]


def _describe_call(call: NativeCall) -> tuple:
    leaves = []
    for leaf in call.leaves:
        if isinstance(leaf, torch.Tensor):
            leaves.append((leaf.dim(), leaf.dtype))
        elif isinstance(leaf, (bool, int, float, str, type(None), torch.dtype)):
            leaves.append(leaf)
        else:
            raise CannotStack(f"its layers are called with a {type(leaf).__name__}")
    return str(call.structure), *leaves
