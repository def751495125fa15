"""How the layers of a model can be run as groups: found out once, checked against the layers one by one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from .attachment_armt import find_decoder_layers
from .cells_armt import CellGroup
from .native_armt import NativeCall, native_pass
from .stacking_armt import CannotStack, kind


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

# From so many positions on a diagonal gains nothing by more rows.
FULL_DIAGONAL = 16 * 1024


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
    def check(self, model: "ARMTPreTrainedModel", calls: list[NativeCall]) -> None:
        """Compares with the layers one by one. Raises CannotStack if a group does not do what its layers do."""
        layers = find_decoder_layers(model.decoder, len(calls))
        for group in self.groups:
            of_group = [calls[i] for i in group.indices]
            try:
                inputs = group.inputs(model, layers, calls)
                x = torch.stack([call.x for call in of_group])
                together = group.run_layers(inputs.weights, x, inputs.shared, inputs.own)
            except CannotStack:
                raise
            except Exception as error:  # whatever an operation raises that cannot be batched
                reason = str(error).strip().split("\n")[0]
                raise CannotStack(f"its layers cannot be run as one ({type(error).__name__}: {reason})") from error
            for call, y in zip(of_group, together, strict=True):
                alone = call.output[0] if isinstance(call.output, tuple) else call.output
                error = (y - alone).float().norm() / alone.float().norm().clamp(min=1e-30)
                if not error < (1e-3 if y.dtype in (torch.float32, torch.float64) else 5e-2):
                    raise CannotStack(f"layers {group.indices} do not compute the same when run as one")

    def answers(self) -> list[Callable]:
        """What stands in for each layer and returns its input, in the form that the decoder expects."""
        return [partial(_as_output, size) for size in self.tuple_sizes]


def _as_output(tuple_size: int, x: torch.Tensor):
    return (x, *[None] * (tuple_size - 1)) if tuple_size else x


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
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise CannotStack("it is spread over several devices")
    attention = config.text_config._attn_implementation
    kinds = [(kind(layer), str(i) in model.memory, attention) for i, layer in enumerate(layers)]
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (lanes, config.segment_size + config.num_mem_tokens, model.memory_tokens.embedding_dim)
    embeds = 0.02 * torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
    with fast.lock, torch.no_grad():
        if tuple(kinds) in fast.refused:
            raise CannotStack(fast.refused[tuple(kinds)])
        known = [entry for entry in fast.diagonal if [of_layer[:3] for of_layer in entry.kinds] == kinds]
        if known:
            calls, _ = native_pass(model, embeds, known[0].answers())
            kinds_now = [(*of_layer, *_describe_call(call)) for of_layer, call in zip(kinds, calls, strict=True)]
            for entry in known:
                if entry.kinds == kinds_now:
                    return Prepared(entry, calls)
        try:
            calls, _ = native_pass(model, embeds)
            kinds_now = [(*of_layer, *_describe_call(call)) for of_layer, call in zip(kinds, calls, strict=True)]
            groups = LayerGroups(model, calls, kinds_now)
            groups.check(model, calls)
        except CannotStack as error:
            fast.refused[tuple(kinds)] = str(error)
            raise
        calls = [call._replace(x=None, output=None) for call in calls]
        groups.cold_start_s += time.perf_counter() - started
        fast.diagonal.append(groups)
    return Prepared(groups, calls)


def _describe_call(call: NativeCall) -> tuple:
    leaves = ((leaf.dim(), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in call.leaves)
    return str(call.structure), *leaves
