"""
Equal layers as one: their weights in one tensor, and one call for all of them.

The weights of a group of layers are laid out side by side once, and every layer's parameter keeps its values there:
nothing is held twice, and whatever changes a parameter in place changes the stack. Whether parameters still lie side
by side is seen from their addresses, so a model that was moved, copied or loaded anew is laid out again when it is
next needed.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.multiprocessing.reductions import StorageWeakRef

from .attachment_armt import MEMORY_HOOKS
from .diagonal_attention_armt import CannotStack, use_attention


# By the address of every tensor in a stack, the memory of the stack, which lasts as long as one of its tensors.
_stacks: dict[int, StorageWeakRef] = {}


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Equal tensors as one `(G, ...)` tensor that shares their memory, without gradients.

    Args:
        tensors: G parameters or buffers of one shape and dtype. Unless they lie side by side already, they are moved.

    Raises:
        CannotStack: if one of them is there twice.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first.detach()[None]
    size, address = first.nbytes, first.data_ptr()
    memory, storage = _stacks.get(address), None
    if memory is not None and all(
        tensor.data_ptr() == address + number * size and tensor.is_contiguous()
        for number, tensor in enumerate(tensors)
    ):
        storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
    with torch.inference_mode(False), torch.no_grad():  # a parameter must not become an inference tensor
        if storage is None:
            storage = _lay_out(tensors)
            address = storage.data_ptr()
        offset = (address - storage.data_ptr()) // first.element_size()
        strides = torch.empty(first.shape, device="meta").stride()
        stack = torch.empty(0, dtype=first.dtype, device=first.device)
        return stack.set_(storage, offset, (len(tensors), *first.shape), (first.numel(), *strides))


def _lay_out(tensors: Sequence[torch.Tensor]) -> torch.UntypedStorage:
    """
    Moves tensors side by side. Each gets a storage object of its own on its part of the memory, so that whoever saves,
    shares or compares it finds a tensor like any other.
    """
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise CannotStack("its layers share a weight")
    storage = torch.stack([tensor.detach() for tensor in tensors]).untyped_storage()
    size = tensors[0].nbytes
    for number, tensor in enumerate(tensors):
        part = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = part.set_(storage[number * size : (number + 1) * size], 0, tensor.shape)
    for address in [address for address, memory in list(_stacks.items()) if memory.expired()]:
        _stacks.pop(address, None)
    memory = StorageWeakRef(storage)
    _stacks.update((tensor.data_ptr(), memory) for tensor in tensors if size)
    return storage


class _Stack(torch.autograd.Function):
    """[`stacked`] parameters, which receive their gradients."""

    @staticmethod
    def forward(ctx, *parameters: torch.Tensor) -> torch.Tensor:
        return stacked(parameters)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient.unbind(0)


def trainable_stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[`stacked`], through which gradients flow if any of the tensors wants one."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        stacked(tensors)  # moved before autograd looks at them
        return _Stack.apply(*tensors)
    return stacked(tensors)


# What tells a layer where it stands, which does not change what it computes; a probe makes sure.
_POSITION = {"layer_idx", "layer_index", "layer_id", "layer_number", "block_idx", "target_name"}
_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}


def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """
    A module and all below it with their names, each once. The diagonal schedule looks at all layers in every call, for
    which `named_modules` is too slow.
    """
    waiting, seen = [("", module)], set()
    while waiting:
        name, part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield name, part
            below = part._modules.items()
            waiting += [(f"{name}.{key}" if name else key, child) for key, child in below if child is not None]


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module and all below it, each once."""
    tensors, seen = {}, set()
    for name, part in walk(module):
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[f"{name}.{key}" if name else key] = tensor
    return tensors


def kind(module: nn.Module) -> tuple:
    """
    All that a layer or a memory computes with besides the values of its tensors, as far as it can be compared. Those
    of one kind can be run as one.

    Raises:
        CannotStack: if a weight is not an ordinary tensor in one place (quantized, offloaded, sharded) that may be
            moved, or if somebody hooks into the module.
    """
    described = []
    for name, part in walk(module):
        if "_hf_hook" in vars(part):
            raise CannotStack("its layers are driven by the device hooks of accelerate")
        if "_checkpoint_wrapped_module" in part._modules:  # they would be run again one by one
            raise CannotStack("its layers are wrapped for activation checkpointing")
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            hook = getattr(hook, "func", hook)
            if hook not in MEMORY_HOOKS and not str(getattr(hook, "__module__", "")).startswith("transformers."):
                raise CannotStack(f"there are hooks on {name or 'its layers'}")
        for attribute, value in vars(part).items():
            if attribute not in _OF_EVERY_MODULE and attribute not in _POSITION:
                described.append((name, attribute, _describe(value)))
        described.append((name, type(part)))
    for name, tensor in named_tensors(module).items():
        if type(tensor) not in (nn.Parameter, torch.Tensor) or type(tensor.data) is not torch.Tensor:
            raise CannotStack(f"{name} is a {type(tensor).__name__}, not an ordinary tensor")
        if tensor.device.type == "meta":
            raise CannotStack(f"{name} is offloaded")
        storage = tensor.untyped_storage()
        if storage.nbytes() > tensor.nbytes:  # as DeepSpeed and FSDP keep it
            raise CannotStack(f"{name} is a part of a larger tensor, from which it must not be moved")
        if tensor.device.type == "cpu" and storage.is_shared():
            raise CannotStack(f"{name} is in memory that processes share, from which it must not be moved")
        described.append((name, tuple(tensor.shape), tensor.dtype, tensor.device))
    return tuple(described)


def _describe(value):
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, dict):
        return tuple((key, _describe(entry)) for key, entry in value.items() if key not in _POSITION)
    if isinstance(value, (list, tuple, set)):
        return tuple(_describe(entry) for entry in value)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return value.__module__, value.__qualname__
    return type(value)


class LayerGroup:
    """
    Layers of one kind, run as one. It keeps the code of a layer, and none of its parameters and buffers.

    Args:
        layers: the layers, of one [`kind`].

    Attributes:
        names: of a layer's parameters and buffers.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        # A copy of the first layer in which every weight is missing: calls bring the weights, and the model's own
        # modules, which other threads may be using, are never touched.
        tensors = [*layers[0].parameters(), *layers[0].buffers()]
        memo = {}
        for tensor in tensors:
            empty = torch.empty_like(tensor, device="meta")
            parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        self._layer = copy.deepcopy(layers[0], memo)
        if tensors:
            use_attention(self._layer, tensors[0].device)
        for module in self._layer.modules():  # the hooks that attach memories would find none
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
                setattr(module, hooks, OrderedDict())
            module._forward_pre_hooks_with_kwargs = OrderedDict()
        self.names = list(named_tensors(layers[0]))

    def weights(self, layers: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
        """The weights of layers of this kind, `(G, ...)` each."""
        of_layers = [named_tensors(layer) for layer in layers]
        return {name: trainable_stack([tensors[name] for tensors in of_layers]) for name in self.names}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Runs without dropout."""
        modes = [module.training for module in self._layer.modules()]
        self._layer.eval()
        try:
            yield
        finally:
            for module, mode in zip(self._layer.modules(), modes, strict=True):
                module.training = mode

    def __call__(
        self,
        weights: dict[str, torch.Tensor],
        x: torch.Tensor,
        own: dict[int, torch.Tensor],
        call: Callable[[dict[int, torch.Tensor]], tuple[tuple, dict]],
    ) -> torch.Tensor:
        """
        Runs all layers.

        Args:
            weights: `(G, ...)` each.
            x: `(G, B, P, D)`, each layer's input.
            own: tensors `(G, ...)` that the layers are called with.
            call: takes one layer's share of `own`, returns the further arguments, `(args, kwargs)`, of its call.

        Returns:
            `(G, B, P, D)`.
        """

        def run(weights, x, own):
            args, kwargs = call(own)
            output = functional_call(self._layer, weights, (x, *args), kwargs)
            return output[0] if isinstance(output, tuple) else output

        if len(x) == 1:
            first = {name: tensor[0] for name, tensor in weights.items()}
            return run(first, x[0], {place: tensor[0] for place, tensor in own.items()})[None]
        return vmap(run, randomness="different")(weights, x, own)
