"""Samples of a task as a batch of tensors."""

from collections.abc import Sequence

import numpy as np
import torch


def collate(input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """
    Pads samples on the right.

    Args:
        input_ids, labels: of the samples, each as long as the other.

    Returns:
        `input_ids` and `labels` `(B, T)`, and `attention_mask` `(B, T)` if there is padding: a model that is given
        none need not look for it.
    """
    lengths = [len(ids) for ids in input_ids]
    longest = max(lengths)
    ids = np.zeros((len(lengths), longest), dtype=np.int64)
    targets = np.full_like(ids, -100)
    for row, (of_row, labels_of_row) in enumerate(zip(input_ids, labels, strict=True)):
        ids[row, : lengths[row]] = of_row
        targets[row, : lengths[row]] = labels_of_row
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(targets)}
    if min(lengths) < longest:
        batch["attention_mask"] = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return batch
