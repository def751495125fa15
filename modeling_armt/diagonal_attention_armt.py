"""
What the layers of a diagonal call in place of transformers' sdpa attention, which lets torch choose the kernel.

That choice can only be steered for the whole process, for other models and threads too. So the kernels are called here
by their own names. cuDNN's is the fastest where it runs, but fails in the backward pass under vmap (torch 2.11); so
does the efficient one's, compiled, on lengths off 32.
"""

import sys

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# Of its own for every copy of this code: two checkpoints in one process may bring different ones.
ATTENTION = f"armt_diagonal_attention.{__name__}"
HALVES = (torch.float16, torch.bfloat16)


class CannotStack(ValueError):
    """Layers that cannot be run as one, with the reason."""


def diagonal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention of one layer, inside of vmap.

    Args:
        query: `(B, heads, P, head_dim)`.
        key, value: `(B, key heads, P, head_dim)`.
        attention_mask: `(B or 1, heads or 1, P, P)`: bool, True where a position sees another one, or added to the
            scores; None for a causal one.

    Returns:
        `(B, P, heads, head_dim)`, and no weights.
    """
    if position_bias is not None:
        raise NotImplementedError("attention with position_bias")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = torch.zeros_like(attention_mask, dtype=query.dtype)
        attention_mask = mask.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        attention_mask = attention_mask.to(query.dtype)
    output = attend(query, key, value, attention_mask, dropout, causal, scaling)
    return output.transpose(1, 2).contiguous(), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """The first kernel that takes the call, `(B, heads, P, head_dim)`: cuDNN, flash, efficient, plain products."""
    operators, gradients = torch.ops.aten, torch.is_grad_enabled()
    widths, length = {tensor.shape[-1] for tensor in (query, key, value)}, query.shape[2]
    if query.is_cuda and query.dtype != torch.float64 and not any(width % 8 for width in widths):
        if mask is None and query.dtype in HALVES and len(widths) == 1:
            if not gradients and not dropout and max(widths) <= 128:
                arguments = (query, key, value, None, False, 0.0, causal)
                return operators._scaled_dot_product_cudnn_attention(*arguments, scale=scale)[0]
            if max(widths) <= (192 if gradients else 256):
                arguments = (query, key, value, dropout, causal)
                return operators._scaled_dot_product_flash_attention(*arguments, scale=scale)[0]
        if length % (32 if gradients else 8) == 0:
            repeats = query.shape[1] // key.shape[1]
            if repeats > 1:
                key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            if mask is not None:  # the kernel wants every row's, also where vmap has one for the rows of all layers
                rows = query.new_zeros(len(query), 1, *mask.shape[2:]) + mask
                mask = rows.expand(-1, query.shape[1], -1, -1)
            arguments = (query, key, value, mask, gradients, dropout, causal)
            return operators._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]
    arguments = (query, key, value, mask, dropout, causal)
    grouped = query.shape[1] != key.shape[1]
    return operators._scaled_dot_product_attention_math(*arguments, scale=scale, enable_gqa=grouped)[0]


def use_attention(layer: nn.Module, device: torch.device) -> None:
    """
    Lets a layer, which is nobody else's, call [`diagonal_attention`] where it would call transformers' sdpa attention.
    On devices that have other kernels torch goes on to choose.

    Raises:
        CannotStack: if it calls torch's attention by itself, on a device where the choice matters.
    """
    if device.type == "cuda":
        known = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        known = device.type == "cpu"
    for module in layer.modules() if known else ():
        config = module.__dict__.get("config")
        if getattr(config, "_attn_implementation", None) == "sdpa":
            if hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
                config._attn_implementation_internal = ATTENTION
            elif device.type == "cuda":
                raise CannotStack("its attention leaves the kernel to torch")


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, diagonal_attention)
