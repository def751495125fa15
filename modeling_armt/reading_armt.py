"""
Reading a batch: steps in order, in one of two schedules, and the cache's part in it.

The sequential schedule takes every step through the backbone's own forward; the diagonal one works on many segments at
once. Both return the same.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from .cache_armt import ARMTCache
from .diagonal_armt import Pipeline
from .groups_armt import Prepared
from .memory_armt import MemoryState
from .segmentation_armt import RealTokens, Step
from .sequential_armt import embed_step, last_of_rows, run_segment


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

Outputs = tuple[torch.Tensor, ...]


def draft(cache: ARMTCache, tokens: RealTokens) -> ARMTCache:
    """
    What a call reads into in the place of its cache, which takes it over ([`ARMTCache.become`]) when nothing can fail
    any more: the loss and the logits of a text may be what there is no memory left for.
    """
    work = cache.fork()
    work.columns = cache.columns
    if work.batch_size == 1 < tokens.batch_size:  # one memory, many questions
        work.batch_repeat_interleave(tokens.batch_size)
    if cache.expendable:
        cache.states = {}
    return work


def run_steps(
    model: "ARMTPreTrainedModel",
    source: torch.Tensor,
    tokens: RealTokens,
    steps: list[Step],
    work: ARMTCache | None = None,
    bptt_segments: int | None = None,
    output_hidden_states: bool = False,
    prepared: Prepared | None = None,
    grad_from: int = 0,
    wants: Callable[[Step], bool] = lambda step: True,
) -> Iterator[tuple[Step, Outputs]]:
    """
    Reads a batch step by step.

    Args:
        model: the model that reads.
        source: `(B, T)` token ids or `(B, T, D)` embeddings, on any device.
        tokens, steps: where its real tokens are, and how they are cut. Steps with `rows` go through the diagonal
            schedule, others through the sequential one.
        work: where the batch comes from, a [`draft`]. Advanced when the iterator is exhausted, of no use if it is not.
        bptt_segments: detach the memory every so many steps.
        output_hidden_states: yield the hidden states of all layers too.
        prepared: the diagonal schedule, if there are steps for it.
        grad_from: steps before this one run without gradients.
        wants: whether the outputs of a step matter; of other steps they may be left out.

    Yields:
        Each step with `(last hidden state, hidden states of all layers ...)`, each `(rows of the step, P, D)`; empty
        where they are left out.
    """
    states: dict[int, MemoryState | None] = dict.fromkeys(model.config.memory_layer_indices)
    segments = [0] * tokens.batch_size
    if work is not None:
        states |= work.states
        work.states = {}  # so that none is held that is replaced
        segments = work.segments or segments
    statistics = None if work is None or model.training else work.statistics
    number = 0
    while number < len(steps):
        # Windows end with the text, so that its last tokens see a full one; a call is a window of its own.
        if bptt_segments is not None and (number == 0 or (len(steps) - number) % bptt_segments == 0):
            states = {layer: None if s is None else s.map(torch.Tensor.detach) for layer, s in states.items()}
            if work is not None and work.keys is not None:
                work.keys = work.keys.map(torch.Tensor.detach)
        gradients = torch.is_grad_enabled() and number >= grad_from
        step = steps[number]
        if step.rows is None:
            with torch.set_grad_enabled(gradients):
                outputs, states, keys = model.checkpointed(
                    run_segment,
                    model,
                    embed_step(model, source, tokens, step),
                    step,
                    states,
                    segments,
                    None if work is None else work.keys,
                    work is not None,
                    statistics,
                    output_hidden_states,
                )
            segments = [n + closes for n, closes in zip(segments, step.closes, strict=True)]
            if work is not None:
                work.keys, work.opened = keys, step.open_after
                work.last_hidden = last_of_rows(outputs[0], step, work.last_hidden)
            yield step, outputs
            number += 1
        else:
            stretch = _stretch(steps, number, bptt_segments, grad_from)
            pipeline = Pipeline(
                model, source, tokens, prepared, stretch, states, segments, statistics, work is not None, wants
            )
            run, states = pipeline.run(), {}
            for _ in stretch:
                with torch.set_grad_enabled(gradients):
                    item = next(run)
                yield item
            with torch.set_grad_enabled(gradients):
                next(run, None)  # lets it collect the states
            states, segments = pipeline.states, pipeline.segments
            if work is not None:
                work.opened = work.opened or [0] * tokens.batch_size
                work.last_hidden = _last_hidden(work.last_hidden, pipeline.last_hidden, tokens.batch_size)
            number += len(stretch)
    if work is not None:
        work.states, work.segments = states, segments
        work.tokens = [a + b for a, b in zip(work.tokens or [0] * tokens.batch_size, tokens.counts, strict=True)]
        work.columns += tokens.num_columns


def _stretch(steps: list[Step], number: int, bptt_segments: int | None, grad_from: int) -> list[Step]:
    """The steps from `number` on that can go through one pipeline: up to where gradients begin or are cut."""
    end = number + 1
    while end < len(steps) and steps[end].rows is not None and end != grad_from:
        if bptt_segments is not None and (len(steps) - end) % bptt_segments == 0:
            break
        end += 1
    return steps[number:end]


def _last_hidden(before: torch.Tensor | None, of_rows: dict[int, torch.Tensor], batch_size: int) -> torch.Tensor:
    """`(B, D)`, with the rows replaced that have read something."""
    some = next(iter(of_rows.values()))
    rows = [
        of_rows.get(row, torch.zeros_like(some) if before is None else before[row].to(some))
        for row in range(batch_size)
    ]
    return torch.stack(rows)
