"""A decoder's own forward around other layers: what it does before, between and after them, without running them."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from .attachment_armt import find_decoder_layers, segments_of


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel


class StandIn(nn.Module):
    """Stands in for a decoder layer: a decoder that looks at it (which kind of mask it wants) sees the layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["layer"] = layer  # not as a submodule

    def __getattr__(self, name: str):
        return getattr(self.__dict__["layer"], name)


def with_layers(decoder: nn.Module, num_layers: int, layers: Sequence[nn.Module]) -> nn.Module:
    """
    A shallow copy of a decoder that runs `layers` in place of its own. The decoder itself is not touched, so threads
    do not meet; everything but the list of layers is shared.

    Call it as `type(decoder).forward(copy, ...)`: an instance may carry a forward that is bound to the original.

    Args:
        decoder: a backbone without its head.
        num_layers: how many layers it has.
        layers: as many others.
    """
    own = find_decoder_layers(decoder, num_layers)
    *path, last = next(name for name, module in decoder.named_modules() if module is own).split(".")
    outer = result = _shallow(decoder)
    for name in path:
        outer._modules[name] = outer = _shallow(outer._modules[name])
    outer._modules[last] = nn.ModuleList(layers)
    return result


def _shallow(module: nn.Module) -> nn.Module:
    new = copy.copy(module)
    new._modules = dict(module._modules)
    return new


def evaluating(module: nn.Module) -> nn.Module:
    """A copy of a module in evaluation mode, on the same weights; the module itself is not touched."""
    new = _shallow(module)
    new._modules = {name: None if child is None else evaluating(child) for name, child in module._modules.items()}
    new.training = False
    return new


class NativeCall(NamedTuple):
    """How a decoder called one of its layers."""

    x: torch.Tensor
    leaves: list[Any]  # its other arguments, flattened
    structure: Any
    output: Any


class _Recorder(StandIn):
    """Records how its layer is called, and answers in the layer's place or runs it."""

    def __init__(self, layer: nn.Module, calls: list[NativeCall], answer: Callable | None):
        super().__init__(layer)
        self.__dict__.update(calls=calls, answer=answer)

    def forward(self, *args, **kwargs):
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        output = self.layer(x, *args, **kwargs) if self.answer is None else self.answer(x)
        leaves, structure = tree_flatten((args, kwargs))
        self.calls.append(NativeCall(x, leaves, structure, output))
        return output


def native_pass(
    model: "ARMTPreTrainedModel", embeds: torch.Tensor, answers: Sequence[Callable] | None = None
) -> tuple[list[NativeCall], torch.Tensor]:
    """
    Runs the decoder's own forward on `(B, P, D)` embeddings of whole segments, without memories.

    Args:
        answers: what each layer is replaced by; None runs the layers, without dropout.

    Returns:
        The calls of all layers, and the last hidden state.

    Raises:
        RuntimeError: if the decoder does not run every layer exactly once.
    """
    num_layers = model.config.text_config.num_hidden_layers
    calls: list[NativeCall] = []
    layers = find_decoder_layers(model.decoder, num_layers)
    if answers is None:
        recorders = [_Recorder(evaluating(layer), calls, None) for layer in layers]
    else:
        recorders = [_Recorder(layer, calls, answer) for layer, answer in zip(layers, answers, strict=True)]
    decoder = with_layers(model.decoder, num_layers, recorders)
    with segments_of(model.config.segment_size):
        output = type(decoder).forward(decoder, inputs_embeds=embeds, use_cache=False, return_dict=True)
    if len(calls) != num_layers:
        raise RuntimeError("its decoder does not run every layer exactly once")
    return calls, output.last_hidden_state
