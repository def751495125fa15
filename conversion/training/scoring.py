"""The score of a model by teacher forcing: one forward pass a batch instead of generation."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def exact_matches(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which answers a model gives right, from one forward pass over texts with their answers. The token with the largest
    logit is right at every place of the answer if and only if greedy generation from the prompt gives the answer.

    Args:
        model: a causal language model that takes `logits_to_keep`.
        batch: `input_ids`, `labels` (-100 but for the answers) and, with padding, `attention_mask`, each `(B, T)`.

    Returns:
        `(B,)` bool, whether all of the answer is right, and `(B,)` its loss, the sum over its tokens.
    """
    labels = batch["labels"]
    answers = (labels != -100).any(0).nonzero()
    first = max(1, int(answers.min()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    logits = model(**inputs, logits_to_keep=labels.shape[1] - first + 1, use_cache=False).logits[:, :-1]
    targets = labels[:, first:]
    right = (logits.argmax(-1) == targets) | (targets == -100)
    loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return right.all(1), loss.sum(1)


@torch.no_grad()
def totals(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], exact: bool) -> torch.Tensor:
    """
    What a validation adds up to, so that processes can be added too.

    Args:
        model: in eval mode.
        batches: as [`exact_matches`] takes them, on the model's device.
        exact: whether there are right answers; if not, only the loss counts, and its logits are never held at once.

    Returns:
        `(4,)` float64: right answers, samples, loss, tokens that have a loss.
    """
    total = torch.zeros(4, dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        tokens = (batch["labels"][:, 1:] != -100).sum()
        if exact:
            right, loss = exact_matches(model, batch)
            right, loss = right.sum(), loss.sum()
        else:
            loss = model(**batch, return_logits=False, use_cache=False).loss * tokens
            right = torch.zeros_like(tokens)
        count = torch.full_like(tokens, len(batch["labels"]))
        total += torch.stack([value.to(total.device, torch.float32) for value in (right, count, loss, tokens)])
    return total
