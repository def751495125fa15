"""What several test files do with a model."""

from collections.abc import Sequence

import torch
from families import PAD
from transformers import PreTrainedModel

from modeling_armt import ARMTCache


def read_in_chunks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    sizes: Sequence[int],
    mask: torch.Tensor | None = None,
    cache: ARMTCache | None = None,
) -> tuple[torch.Tensor, ARMTCache]:
    """Logits of all columns and the final cache of a text that is read in several calls."""
    assert sum(sizes) == ids.shape[1]
    pieces, end = [], 0
    for size in sizes:
        start, end = end, end + size
        seen = None if mask is None else mask[:, :end]
        output = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), cache


def pad_left(rows: Sequence[torch.Tensor], columns: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)` of rows that end in the last column."""
    columns = columns or max(len(row) for row in rows)
    ids, mask = torch.full((len(rows), columns), PAD), torch.zeros(len(rows), columns, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, columns - len(row) :] = row
        mask[number, columns - len(row) :] = 1
    return ids, mask


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; nan if either has one."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0
