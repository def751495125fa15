"""The associative memories of several layers as one: the same equations with one more dimension in front."""

from collections.abc import Sequence

import torch
from torch import nn

from .memory_armt import AssociativeMemory, MemoryEquations, MemoryNorm, rms_norm
from .stacking_armt import CannotStack, trainable_stack


class _SplitProduct(torch.autograd.Function):
    """
    x W^T in float32 for bfloat16 x and float32 W, at the speed of bfloat16: W = W_high + W_low, both bfloat16, leaves
    out 2^-17 of W, and every product is summed in float32.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, halves: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, halves)
        product = torch.bmm(x, halves.mT, out_dtype=torch.float32)
        return product[..., : weight.shape[1]] + product[..., weight.shape[1] :]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, halves = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        to_weight = torch.bmm(gradient.mT, x, out_dtype=torch.float32) if ctx.needs_input_grad[1] else None
        return torch.bmm(gradient, halves[:, : gradient.shape[-1]]), to_weight, None


def split(weight: torch.Tensor) -> torch.Tensor:
    """`(G, out, in)` float32 as `(G, 2 out, in)` bfloat16: high parts, then low parts."""
    return torch.cat(_two_halves(weight), dim=1)


def _two_halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = x.to(torch.bfloat16)
    return high, (x - high).to(torch.bfloat16)


PROJECTIONS = ("memory_query", "memory_key", "memory_value", "memory_beta")
NORMS = ("memory_read_norm", "memory_write_norm")


def memory_weights(memories: Sequence[AssociativeMemory], halves: bool) -> dict[str, torch.Tensor]:
    """
    The weights of G memories, `(G, ...)` each.

    Args:
        memories: of equal shapes.
        halves: whether to add what is needed to multiply bfloat16 inputs with float32 weights.

    Raises:
        CannotStack: if a projection is not a plain linear, nor one that PEFT trains a copy of.
    """
    weights = {}
    for name in (*PROJECTIONS, *NORMS):
        modules = [getattr(memory, name) for memory in memories]
        if modules[0] is None:
            continue
        modules = [_plain(module, name) for module in modules]
        weight = weights[f"{name}.weight"] = trainable_stack([module.weight for module in modules])
        if modules[0].bias is not None:
            weights[f"{name}.bias"] = trainable_stack([module.bias for module in modules])
        if halves and weight.dtype == torch.float32 and name in PROJECTIONS:
            weights[f"{name}.halves"] = split(weight.detach())
    return weights


def _plain(module: nn.Module, name: str) -> nn.Linear | MemoryNorm:
    if hasattr(module, "modules_to_save"):  # PEFT's wrapper around a module that is trained in full
        adapters = module.active_adapters
        module = module.original_module if module.disable_adapters else module.modules_to_save[adapters[0]]
    if type(module) not in (nn.Linear, MemoryNorm) or hasattr(module, "_hf_hook"):
        raise CannotStack(f"{name} is a {type(module).__module__}.{type(module).__name__}, not a plain linear layer")
    return module


class StackedMemory(MemoryEquations):
    """
    The memories of G layers. Reads and writes as one memory does, but on `(G, B, P, D)` and states `(G, B, K, D)`.

    Args:
        like: one of the memories.
        weights: what [`memory_weights`] returns.
    """

    memory_query, memory_key, memory_value, memory_beta = PROJECTIONS
    memory_read_norm, memory_write_norm = NORMS

    def __init__(self, like: AssociativeMemory, weights: dict[str, torch.Tensor]):
        for name in ("nu", "normalize_features", "gamma_eps", "denom_eps", "correction", "use_denom", "write_guard"):
            setattr(self, name, getattr(like, name))
        self.weights = weights
        self.state_dtype = torch.promote_types(weights["memory_query.weight"].dtype, torch.float32)

    def _answer(self, query: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        if A.shape[-1] == 1:
            return (query * A.mT).sum(-1, keepdim=True)
        if "memory_value.halves" not in self.weights or torch.is_grad_enabled():
            return query @ A
        # As in the projections, but both factors have two halves; the product of the low ones is left out.
        (high, low), (A_high, A_low) = (_two_halves(tensor.flatten(0, 1)) for tensor in (query, A))
        both = torch.bmm(torch.cat([high, low], dim=1), A_high, out_dtype=torch.float32)
        rest = torch.bmm(high, A_low, out_dtype=torch.float32)
        return (both[:, : high.shape[1]] + both[:, high.shape[1] :] + rest).unflatten(0, query.shape[:2])

    def _update(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if "memory_value.halves" not in self.weights or torch.is_grad_enabled():
            return k.mT @ v
        (k_high, k_low), (v_high, v_low) = (_two_halves(tensor.flatten(0, 1)) for tensor in (k, v))
        left, right = torch.cat([k_high, k_low, k_high], dim=1), torch.cat([v_high, v_high, v_low], dim=1)
        return torch.bmm(left.mT, right, out_dtype=torch.float32).unflatten(0, k.shape[:2])

    def _normed(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" not in self.weights:
            return x
        return rms_norm(x, self.weights[f"{name}.weight"][:, None, None], self.weights[f"{name}.bias"][:, None])

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        rows = x.flatten(1, 2)
        if x.dtype == torch.bfloat16 and f"{name}.halves" in self.weights and weight.shape[1] > 1:
            y = _SplitProduct.apply(rows, weight, self.weights[f"{name}.halves"])
        elif weight.shape[1] == 1:
            y = (rows.to(weight.dtype) * weight).sum(-1, keepdim=True)
        else:
            y = rows.to(weight.dtype) @ weight.mT
        y = y.unflatten(1, x.shape[1:3])
        return (y if bias is None else y + bias[:, None, None]).to(self.state_dtype)
