"""The loss of texts, segment by segment: with memory, and with what could stand in for it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ...cache_armt import ARMTCache
from ..checkpoints import armt_model, backbone_only
from ..tasks.text import loss_by_position
from .controls import MEMORY, now
from .intervals import Score, intervals
from .subject import Subject


LOSS_CONTROLS = {
    "off": "memory off",
    "carried": "carried tokens",
    "backbone": "full attention",
}
"""Controls by their name on the command line, with the one they have in results."""

LOGITS = {"cuda": 2**29, "cpu": 2**25}  # numbers that exist at once


@dataclass
class Losses:
    """
    Attributes:
        by_control: of each sample the loss of its token at each position, in nats, NaN where there is none.
        tokens, seconds: read with memory, and how long it took.
        stats: [`ARMTCache.stats`] at the end.
    """

    by_control: dict[str, list[np.ndarray]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    stats: dict[int, dict[str, Any]] = field(default_factory=dict)


@torch.no_grad()
def losses_of(
    subject: Subject,
    samples: Sequence[dict[str, Any]],
    controls: Collection[str],
    progress: Callable[[int], Any] = lambda tokens: None,
) -> Losses:
    """
    Reads samples side by side.

    Args:
        samples: with `input_ids` and `labels`.
        controls: keys of `LOSS_CONTROLS`. `off` reads each segment alone; `carried` with the last `num_mem_tokens`
            tokens before it in front, which are as many positions as the memory has; both with the same weights as
            with memory. `backbone` is the untouched backbone, which sees the whole text.
        progress: called with numbers of tokens, as they are read with memory.
    """
    model, size = armt_model(subject.model), subject.segment_size
    lengths = [len(sample["input_ids"]) for sample in samples]
    ids = torch.zeros(len(samples), max(lengths), dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        ids[row, : lengths[row]] = torch.from_numpy(np.asarray(sample["input_ids"], dtype=np.int64))
        targets[row, : lengths[row]] = torch.from_numpy(np.asarray(sample["labels"], dtype=np.int64))
    text = Text(ids, targets, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None], model.device)
    result, found = Losses(tokens=sum(lengths)), {}

    started, cache = now(subject), ARMTCache()
    step = segments_at_once(subject, len(samples)) * size
    values = text.no_losses()
    for start in range(0, ids.shape[1], step):
        block = text.block(start, start + step, slice(None))
        logits = subject.model(**block, cache=cache).logits
        text.fill(values, logits, start, slice(None))
        progress(int(text.real[:, start : start + step].sum()))
    result.seconds, result.stats = now(subject) - started, cache.stats()
    found[MEMORY] = values

    for name, context in (("off", 0), ("carried", model.config.num_mem_tokens)):
        if name in controls:
            found[LOSS_CONTROLS[name]] = values = text.no_losses()
            for start in range(0, ids.shape[1], size):
                rows = text.real[:, start].nonzero().squeeze(1)
                before = min(context, start)
                # The backbone's own call, with what was trained of it.
                block = text.block(start - before, start + size, rows)
                text.fill(values, model.model(**block, use_cache=False).logits[:, before:], start, rows)
    if "backbone" in controls:
        found[LOSS_CONTROLS["backbone"]] = values = text.no_losses()
        vocabulary = model.num_embeddings
        some = max(1, LOGITS[model.device.type] // (ids.shape[1] * vocabulary))
        with backbone_only(subject.model) as backbone:
            for rows in torch.arange(len(samples)).split(some):
                block = text.block(0, ids.shape[1], rows)
                text.fill(values, backbone(**block, use_cache=False).logits, 0, rows)
    result.by_control = {
        name: [values[row, :length].numpy() for row, length in enumerate(lengths)] for name, values in found.items()
    }
    return result


@dataclass
class Text:
    """
    A batch of texts.

    Attributes:
        ids, labels: `(B, T)`, -100 where there is no loss.
        real: `(B, T)` bool, which columns are not padding.
        device: of the model.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    real: torch.Tensor
    device: torch.device

    def no_losses(self) -> torch.Tensor:
        return torch.full(self.ids.shape, float("nan"))

    def block(self, start: int, end: int, rows: torch.Tensor | slice) -> dict[str, torch.Tensor]:
        """What a model takes of these columns."""
        real = self.real[rows, start:end]
        block = {"input_ids": self.ids[rows, start:end].to(self.device)}
        return block if bool(real.all()) else block | {"attention_mask": real.long().to(self.device)}

    def fill(self, values: torch.Tensor, logits: torch.Tensor, start: int, rows: torch.Tensor | slice) -> None:
        """Puts the losses of what `(rows, L, vocabulary)` logits of columns from `start` on predict into `values`."""
        labels = self.labels[rows, start + 1 : start + 1 + logits.shape[1]]
        logits = logits[:, : labels.shape[1]].float()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels.to(self.device), reduction="none", ignore_index=-100
        )
        values[rows, start + 1 : start + 1 + labels.shape[1]] = losses.cpu().masked_fill(labels == -100, float("nan"))


def segments_at_once(subject: Subject, rows: int) -> int:
    """Segments whose logits are held at a time."""
    model = armt_model(subject.model)
    of_segment = rows * subject.segment_size * model.num_embeddings
    return max(1, LOGITS[model.device.type] // of_segment)


def rows_with_logits(subject: Subject, rows: int) -> int:
    """As many of the rows as have logits of a segment at a time."""
    model = armt_model(subject.model)
    of_row = subject.segment_size * model.num_embeddings
    return max(1, min(rows, LOGITS[model.device.type] // of_row))


def summarize_losses(
    by_control: dict[str, list[np.ndarray]], groups: Sequence[Any], segment_size: int
) -> dict[str, Any]:
    """
    What results.json says of losses, in nats a token, with intervals by group.

    Args:
        by_control: as in [`Losses`], of all samples.
        groups: of the samples: the documents that they are of.

    Returns:
        By control, `loss_by_segment`, and `memory_minus_by_segment`, the paired difference of the loss with memory to
        that of the control: memory helps where it is below 0. `loss` and `memory_minus` are the same for all tokens
        from the second segment on; absent if no sample has one.
    """
    means = {name: by_segment(values, segment_size) for name, values in by_control.items()}
    later = {name: later_mean(values, segment_size) for name, values in by_control.items()}
    some = ~np.isnan(later[MEMORY])  # samples with more than one segment
    result: dict[str, Any] = {
        "loss_by_segment": {name: intervals(values, groups) for name, values in means.items()},
        "memory_minus_by_segment": {
            name: intervals(means[MEMORY] - values, groups) for name, values in means.items() if name != MEMORY
        },
    }
    if not some.any():
        return result
    groups = [group for group, there in zip(groups, some, strict=True) if there]

    def one(values: np.ndarray) -> Score:
        return intervals(values[some, None], groups)[0]

    result["loss"] = {name: one(values) for name, values in later.items()}
    result["memory_minus"] = {name: one(later[MEMORY] - later[name]) for name in later if name != MEMORY}
    return result


def by_segment(losses: Sequence[np.ndarray], segment_size: int) -> np.ndarray:
    """`(n, segments)` mean loss of each sample in each segment, NaN where it has none."""
    rows = [loss_by_position([loss], segment_size)[0] for loss in losses]
    result = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        result[number, : len(row)] = row
    return result


def later_mean(losses: Sequence[np.ndarray], segment_size: int) -> np.ndarray:
    """`(n,)` mean loss of each sample from its second segment on, NaN if it has none there."""
    later = [loss[segment_size:] for loss in losses]
    return np.array([np.nan if np.isnan(loss).all() else np.nanmean(loss) for loss in later])
