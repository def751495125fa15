"""
The sequential schedule: one segment after the other through the backbone's own forward.

It works for every backbone and every batch, and is what other schedules are compared with.
"""

import inspect
from typing import TYPE_CHECKING

import torch
from torch import nn

from .attachment_armt import SegmentPass
from .cache_armt import SegmentKeys
from .compatibility_armt import CACHE
from .memory_armt import MemoryState
from .segmentation_armt import RealTokens, Step
from .statistics_armt import LayerStatistics
from .transfer_armt import on_device


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

States = dict[int, MemoryState | None]


def embed_tokens(model: "ARMTPreTrainedModel", source: torch.Tensor, tokens: RealTokens, step: Step) -> torch.Tensor:
    """`(rows of the step, max(step.taken), D)`, its tokens on the model's device, or the embeddings given for them."""
    embedding = model.get_input_embeddings()
    packed = tokens.pack(source, step)
    if source.is_floating_point():
        return packed
    return embedding(packed if embedding.weight.is_meta else packed.to(embedding.weight.device))


def embed_memory_tokens(model: "ARMTPreTrainedModel", like: torch.Tensor) -> torch.Tensor:
    """`(m, D)` memory tokens, with device and dtype of `like`."""
    weight = model.memory_tokens.weight  # on the meta device if it is offloaded; then its hook moves the index
    index = torch.arange(weight.shape[0], device=like.device if weight.is_meta else weight.device)
    return model.memory_tokens(index).to(like.device, like.dtype)


def embed_step(model: "ARMTPreTrainedModel", source: torch.Tensor, tokens: RealTokens, step: Step) -> torch.Tensor:
    """`(B, P, D)` input of a step: its tokens, and the memory tokens of the segments that close."""
    packed = embed_tokens(model, source, tokens, step)
    if not any(step.closes):
        return packed
    memory_tokens = embed_memory_tokens(model, packed)
    if step.is_uniform:
        return torch.cat([packed, memory_tokens.expand(len(packed), -1, -1)], dim=1)
    packed = nn.functional.pad(packed, (0, 0, 0, step.width - packed.shape[1]))
    number = torch.arange(step.width, device=packed.device) - on_device(step.taken, packed.device)[:, None]
    place = (number >= 0) & (number < step.num_mem_tokens)
    place &= on_device(step.closes, packed.device)[:, None]
    return torch.where(place[..., None], memory_tokens[number.clamp(0, step.num_mem_tokens - 1)], packed)


def run_segment(
    model: "ARMTPreTrainedModel",
    inputs_embeds: torch.Tensor,
    step: Step,
    states: States,
    segments: list[int],
    keys: SegmentKeys | None,
    cached: bool,
    statistics: dict[int, LayerStatistics] | None,
    output_hidden_states: bool,
) -> tuple[tuple[torch.Tensor, ...], States, SegmentKeys | None]:
    """
    One pass of the backbone over one step. Changes no argument but `statistics`, so that a checkpoint may run it
    twice.

    Args:
        inputs_embeds: `(B, P, D)`.
        states: before the step.
        segments: segments each row has written.
        keys: of the open segments; None if none is open.
        cached: whether somebody may go on from here, so that the keys of segments that stay open are needed.
        statistics: by layer, replaced if given.

    Returns:
        Last hidden state and, if asked for, those of all layers, the new states, the new keys.
    """
    width, device = inputs_embeds.shape[1], inputs_embeds.device
    length, kwargs = 0, {"use_cache": False}
    if cached and (keys is not None or any(step.open_after)):
        keys = SegmentKeys() if keys is None else keys.map(lambda tensor: tensor)
        length = keys.get_seq_length()
        kwargs = {"use_cache": True, CACHE: keys}
        if len(set(step.opened)) > 1:  # to the backbone: a left-padded batch
            opened = on_device(step.opened, device)[:, None]
            columns = torch.arange(length + width, device=device)
            kwargs["attention_mask"] = (columns >= length - opened).long()
            accepted = inspect.signature(model.decoder.forward).parameters
            if "position_ids" in accepted or "inputs_embeds" not in accepted:  # the latter: hidden behind **kwargs
                last = model.config.segment_size + step.num_mem_tokens - 1  # filler may lie beyond
                kwargs["position_ids"] = (opened + columns[:width]).clamp(max=last)
    segment = _segment_pass(model, step, states, segments, width, device, statistics)
    with segment.active():
        outputs = model.decoder(
            inputs_embeds=inputs_embeds, output_hidden_states=output_hidden_states, return_dict=True, **kwargs
        )
    hidden_states = (outputs.last_hidden_state, *(outputs.hidden_states if output_hidden_states else ()))
    return hidden_states, segment.states, keys if keys is None else keys.after(step, length)


def _segment_pass(
    model: "ARMTPreTrainedModel",
    step: Step,
    states: States,
    segments: list[int],
    width: int,
    device: torch.device,
    statistics: dict[int, LayerStatistics] | None,
) -> SegmentPass:
    segment = SegmentPass(model.memory, dict(states), step.num_mem_tokens)
    if any(step.closes):
        starts = {taken for taken, closes in zip(step.taken, step.closes, strict=True) if closes}
        ends = [opened + taken for opened, taken in zip(step.opened, step.taken, strict=True)]
        segment.ends = ends[0] if len(set(ends)) == 1 else on_device(ends, device)[:, None]
        # Rows that do not write need some column too, any within the input.
        columns = [min(taken, width - step.num_mem_tokens) for taken in step.taken]
        segment.write_at = starts.pop() if len(starts) == 1 else on_device(columns, device)
        if not all(step.closes):
            segment.writing_rows = on_device(step.closes, device)
    if not all(segments) and any(state is not None for state in states.values()):
        segment.unwritten_rows = on_device([n == 0 for n in segments], device)
    segment.statistics = statistics
    if statistics is not None and not step.is_uniform:
        used = [n + step.num_mem_tokens * c for n, c in zip(step.taken, step.closes, strict=True)]
        segment.filler = torch.arange(width, device=device) >= on_device(used, device)[:, None]
    return segment


def last_of_rows(hidden: torch.Tensor, step: Step, before: torch.Tensor | None) -> torch.Tensor:
    """`(B, D)`, the hidden state at each row's last real token so far."""
    if step.is_uniform and step.taken[0] > 0:
        return hidden[:, step.taken[0] - 1]
    taken = on_device(step.taken, hidden.device)
    last = hidden[torch.arange(len(taken), device=hidden.device), (taken - 1).clamp(min=0)]
    return torch.where((taken > 0)[:, None], last, 0 if before is None else before.to(last))
