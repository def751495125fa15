"""A decoder's own forward around other layers: what it does before, between and after them, without running them."""

import copy
from collections.abc import Sequence

from torch import nn

from .attachment_armt import find_decoder_layers


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
