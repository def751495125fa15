"""
The open segment at a fixed size: keys and values by slot, where a slot is a position in the segment.

    slot   0 ... S - 1   the segment's tokens
           S ... S+m-1   its memory tokens, when the segment is full
           last          trash: where the keys of padding go, and all that padding sees

Shapes never change, so that a step can be compiled and captured; what a row may see is said by masks of 0 and the
least number of the dtype.
"""

import copy
import hashlib
from functools import partial

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_armt import SegmentKeys


# What takes the place of a backbone's attention; in that of sdpa, which overlooks what it does not know, as it does.
# The registry is the process's: each copy of this file has names of its own (a digest, since transformers looks for
# words like "flash" in them).
_COPY = hashlib.sha256(__name__.encode()).hexdigest()[:12]
ATTENTION, SDPA_ATTENTION = f"armt_static_attention_{_COPY}", f"armt_static_sdpa_{_COPY}"
# Slots that are read or left out together, and into how many parts all rows' work is cut to keep a GPU busy.
BLOCK, PARTS = 128, 1024


class StaticKeys(Cache):
    """
    What one pass of the backbone sees as its cache: writes the pass's keys into the slots, returns all slots.

    Args:
        keys, values: by layer, `(B, heads, slots, head_dim)`, written in place.
        rows: `(n,)`, the rows that the pass works on.
        slots: `(n, P)`, where its keys go.
        all_rows: whether `rows` are all rows in order, so that nothing needs to be gathered.
    """

    def __init__(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        rows: torch.Tensor,
        slots: torch.Tensor,
        all_rows: bool,
    ):
        super().__init__(layers=[])
        self.keys, self.values, self.rows, self.slots, self.all_rows = keys, values, rows, slots, all_rows

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Takes `(n, heads, P, head_dim)`; returns `(n, heads, slots, head_dim)`."""
        keys, values, rows = self.keys[layer_idx], self.values[layer_idx], self.rows
        keys[rows[:, None], :, self.slots] = key_states.transpose(1, 2)
        values[rows[:, None], :, self.slots] = value_states.transpose(1, 2)
        return (keys, values) if self.all_rows else (keys[rows], values[rows])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def slot_masks(
    position: torch.Tensor, real: torch.Tensor | None, num_slots: int, dtype: torch.dtype, spans: dict[str, tuple]
) -> dict[str, torch.Tensor]:
    """
    Additive masks over the slots.

    Args:
        position: `(n, P)`, places in the segment.
        real: `(n,)` bool, rows that are not padding; None if no row is.
        num_slots: slots, the trash slot included.
        spans: by name, `(window, chunk)`: how many positions back a position sees, itself included, and the size of
            the chunks it cannot look out of; None for no limit.

    Returns:
        By name, `(n, 1, P, slots)`: 0 where a position sees a slot.
    """
    slot, place = torch.arange(num_slots, device=position.device), position[..., None]
    masks = {}
    for name, (window, chunk) in spans.items():
        seen = slot <= place
        if window is not None:
            seen = seen & (slot > place - window)
        if chunk is not None:
            seen = seen & (slot // chunk == place // chunk)
        if real is not None:
            seen = torch.where(real[:, None, None], seen, slot == num_slots - 1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        masks[name] = mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    return masks


def static_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    unknown: tuple[str, ...] = ("softcap", "s_aux", "position_bias"),
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention to the slots: query heads that share keys are rows of one product, so keys are never repeated.

    Args:
        query: `(B, heads, P, head_dim)`.
        key, value: `(B, key heads, slots, head_dim)`.
        attention_mask: `(B, 1, P, slots)`, added to the scores.
        unknown: arguments that would change the result.

    Returns:
        `(B, P, heads, head_dim)`, and no weights.
    """
    extras = [name for name in unknown if kwargs.get(name) is not None]
    if extras:
        raise NotImplementedError(f"attention with {', '.join(extras)}")
    batch_size, heads, length, width = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    query = query.reshape(batch_size, key_heads, groups * length, width)
    scaling = width**-0.5 if scaling is None else scaling
    exact = torch.promote_types(query.dtype, torch.float32)
    if length > 1 or not torch.compiler.is_compiling():
        mask = attention_mask.expand(-1, groups, -1, -1).reshape(batch_size, 1, groups * length, -1)
        output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    elif query.is_cuda and query.dtype != torch.float64:
        output = blockwise_attention(query, key, value, attention_mask, scaling)
    else:
        scores = (query @ key.transpose(2, 3)).to(exact) * scaling + attention_mask
        output = scores.softmax(-1).to(query.dtype) @ value
    return output.reshape(batch_size, heads, length, -1).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, static_attention)
ALL_ATTENTION_FUNCTIONS.register(SDPA_ATTENTION, partial(static_attention, unknown=("position_bias",)))


def blockwise_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """
    Attention of one position, to be compiled. Reads no block of slots behind the last one that a row sees.

    Args:
        query: `(B, key heads, groups, head_dim)`, the query heads that share keys side by side.
        key, value: `(B, key heads, slots, head_dim)`.
        mask: `(B, 1, 1, slots)`, added to the scores.

    Returns:
        As `query`.
    """
    batch_size, key_heads, groups, _ = query.shape
    slots = mask.shape[3]
    blocks = -(-slots // BLOCK)
    of_slot = torch.arange(slots, dtype=torch.int32, device=mask.device) // BLOCK
    seen = ((mask[:, 0, 0] > torch.finfo(mask.dtype).min / 2) * (of_slot + 1)).amax(-1)[:, None, None].to(torch.int32)
    number = torch.arange(blocks, dtype=torch.int32, device=mask.device).expand(batch_size, 1, 1, -1).contiguous()
    block_mask = BlockMask.from_kv_blocks(seen, number, BLOCK_SIZE=BLOCK, seq_lengths=(groups, slots))
    parts = max(1, min(blocks, PARTS // (batch_size * key_heads)))

    def masked(score, row, head, place, slot):
        return score + mask[row, 0, 0, slot]

    return flex_attention(
        query, key, value, score_mod=masked, block_mask=block_mask, scale=scaling, kernel_options={"SPLIT_KV": parts}
    )


def bare_layer(layer: nn.Module) -> nn.Module:
    """
    A copy of a decoder layer whose parameters are the layer's own, but whose hooks may be taken away and whose
    attention is [`static_attention`] if the backbone lets one choose (eager attention stays what it is).
    """
    configs = {}

    def bare(module: nn.Module) -> nn.Module:
        new = copy.copy(module)
        new._modules = {name: None if child is None else bare(child) for name, child in module._modules.items()}
        new._forward_hooks, new._forward_pre_hooks = module._forward_hooks.copy(), module._forward_pre_hooks.copy()
        config = module.__dict__.get("config")
        implementation = getattr(config, "_attn_implementation", None)
        if implementation not in (None, "eager"):
            if id(config) not in configs:
                configs[id(config)] = copy.copy(config)
                name = SDPA_ATTENTION if implementation == "sdpa" else ATTENTION
                configs[id(config)]._attn_implementation_internal = name
            new.__dict__["config"] = configs[id(config)]
        return new

    return bare(layer)


def load_keys(keys: SegmentKeys | None, opened: list[int], buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Moves right-aligned open segments into slots. `opened`: tokens in each row's open segment."""
    length = 0 if keys is None else keys.get_seq_length()
    for number, pair in enumerate(buffers):
        for buffer, name in zip(pair, ("keys", "values"), strict=True):
            # Also what is never seen: a nan of an earlier text would come through a mask.
            buffer[:, :, length:].zero_()
            if length:
                states = getattr(keys.layers[number], name)
                if min(opened) < length:
                    first = length - torch.tensor(opened, device=buffer.device)
                    columns = (first[:, None] + torch.arange(length, device=buffer.device)).clamp(max=length - 1)
                    states = torch.take_along_dim(states, columns[:, None, :, None], dim=2)
                buffer[:, :, :length].copy_(states)


def unload_keys(opened: list[int], buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> SegmentKeys | None:
    """The open segments as the rest of the package wants them, in memory of their own; None if nothing is open."""
    length = max(opened)
    if length == 0:
        return None
    keys = SegmentKeys()
    for pair in buffers:
        if min(opened) < length:
            first = length - torch.tensor(opened, device=pair[0].device)
            slots = (torch.arange(length, device=first.device) - first[:, None]).clamp(min=0)[:, None, :, None]
            pair = [torch.take_along_dim(buffer, slots, dim=2) for buffer in pair]
        else:
            pair = [buffer[:, :, :length].clone() for buffer in pair]
        layer = DynamicLayer()
        layer.lazy_initialization(*pair)
        layer.keys, layer.values = pair
        keys.layers.append(layer)
    return keys
