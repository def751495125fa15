"""Reading prompts of any length in batches, and greedy answers to them."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ...cache_armt import ARMTCache
from ...modeling_armt import ARMTForCausalLM


Model = ARMTForCausalLM | PeftModel

# Tokens of all rows that reach the model in one call.
BLOCK_TOKENS = {"cuda": 2**25, "cpu": 2**15}


@torch.no_grad()
def read_rows(
    model: Model,
    rows: Sequence[np.ndarray],
    cache: ARMTCache,
    segment_size: int,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> torch.Tensor:
    """
    Reads texts of different lengths side by side, block by block, so that no more than a block of them is on the
    device.

    Args:
        rows: `(T,)` ids of each row, of any length, 0 included, but not all empty.
        cache: from where they go on; advanced.
        segment_size: the model's.
        progress: called after each block with the number of tokens it had.

    Returns:
        `(B, vocabulary)` logits of each row's last token.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    size = max(1, BLOCK_TOKENS[model.device.type] // (len(rows) * segment_size)) * segment_size
    for start in range(0, longest, size):
        width = min(size, longest - start)
        block = np.zeros((len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            part = row[start : start + width]
            block[number, : len(part)] = part
        left = (lengths - start).clamp(0, width)
        mask = None
        if int(left.min()) < width:
            mask = (torch.arange(width) < left[:, None]).long().to(model.device)
        ids = torch.from_numpy(block).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, cache=cache, logits_to_keep=1).logits
        progress(int(left.sum()))
    return logits[:, -1]


@torch.no_grad()
def answer(
    model: Model,
    prompts: Sequence[np.ndarray],
    cache: ARMTCache,
    segment_size: int,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    progress: Callable[[int], Any] = lambda tokens: None,
) -> list[list[int]]:
    """
    Greedy answers.

    Args:
        prompts: `(T,)` ids of each row, at least one; what is left of them to be read.
        cache: what was read before; advanced past the answers.
        segment_size, progress: as for [`read_rows`].
        max_new_tokens: of each answer.
        stop_ids: ids that end an answer, and are not part of it.

    Returns:
        The ids of each row's answer.
    """
    newest = read_rows(model, prompts, cache, segment_size, progress).argmax(-1)
    columns = [newest]
    ended = is_one_of(newest, stop_ids)
    while len(columns) < max_new_tokens and not bool(ended.all()):
        newest = model(input_ids=newest[:, None], cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
        columns.append(newest)
        ended |= is_one_of(newest, stop_ids)
    return [until(row, stop_ids) for row in torch.stack(columns, dim=1).tolist()]


@torch.no_grad()
def answer_with_full_attention(
    backbone: PreTrainedModel, prompts: Sequence[np.ndarray], max_new_tokens: int, stop_ids: Collection[int] = ()
) -> list[list[int]]:
    """As [`answer`], by a plain model that sees the whole prompt at once."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        ids[number, longest - len(prompt) :] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        mask[number, longest - len(prompt) :] = 1
    output = backbone.generate(
        ids.to(backbone.device),
        attention_mask=mask.to(backbone.device),
        max_new_tokens=max_new_tokens,
        # What a checkpoint recommends for chats is not greedy.
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=min(stop_ids, default=0),
    )
    return [until(row, stop_ids) for row in output[:, longest:].tolist()]


def is_one_of(ids: torch.Tensor, some: Collection[int]) -> torch.Tensor:
    """Which of the ids are among some."""
    return torch.isin(ids, torch.tensor(sorted(some), dtype=ids.dtype, device=ids.device))


def until(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    """The ids before the first one that stops."""
    return ids[: next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))]
