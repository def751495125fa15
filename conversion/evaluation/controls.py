"""
The answers of a batch of samples, beside those that the same model gives with its memory off, with another sample's
memory, without the facts, and by its backbone alone.

All of them end at the same place: the open segment, in which the question stands, is read and answered on what was
left behind by the whole segments before it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from ...cache_armt import ARMTCache
from ..checkpoints import backbone_only
from ..tasks import Task
from .answering import answer, answer_with_full_attention, read_rows
from .subject import Subject


T = TypeVar("T")

MEMORY = "memory"

CONTROLS = {
    "off": "memory off",
    "swapped": "memory swapped",
    "deleted": "fact deleted",
    "backbone": "backbone",
}
"""Controls by their name on the command line, with the one they have in results."""

BACKBONE_TOKENS = {"cuda": 2**17, "cpu": 2**13}  # in one call with full attention


@dataclass
class Answers:
    """
    Attributes:
        texts: by control, of each sample, None where it does not apply to it.
        tokens, seconds: read and generated with memory, and how long it took.
        stats: [`ARMTCache.stats`] after the last whole segments.
    """

    texts: dict[str, list[str | None]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    stats: dict[int, dict[str, Any]] = field(default_factory=dict)


def answer_samples(
    subject: Subject,
    task: Task,
    samples: Sequence[dict[str, Any]],
    controls: Collection[str],
    progress: Callable[[int], Any] = lambda tokens: None,
    controls_only: bool = False,
) -> Answers:
    """
    Reads samples side by side and lets the model answer, with memory and under controls.

    Args:
        samples: of the task; their `input_ids` may be of different lengths.
        controls: keys of `CONTROLS`. A sample in one segment has no memory to switch off or to swap: there both answer
            as the model does.
        progress: called with numbers of tokens, as whole texts are read.
        controls_only: no answers with memory; the text is read only where a control needs it.
    """
    size, stop_ids = subject.segment_size, subject.stop_ids
    limits = (size, task.max_new_tokens, stop_ids)
    prompts = [np.asarray(sample["input_ids"][: sample["prompt_length"]]) for sample in samples]
    bodies, ends = split(prompts, size)
    result = Answers()
    texts: dict[str, list[list[int] | None]] = {}
    if not controls_only or "swapped" in controls:
        started = now(subject)
        memory = read(subject, bodies, progress)
        if not controls_only:
            texts[MEMORY] = ids = answer(subject.model, ends, memory.fork(), *limits, progress)
            result.seconds = now(subject) - started
            result.tokens = sum(map(len, prompts)) + sum(map(len, ids))
            result.stats = memory.stats()
        if "swapped" in controls:
            others = partners(samples)
            chosen = torch.tensor([row if other is None else other for row, other in others.items()])
            if memory.tokens:  # there are no rows where nothing was read
                memory.batch_select_indices(chosen)
            ids = answer(subject.model, ends, memory, *limits)
            texts[CONTROLS["swapped"]] = [None if others[row] is None else ids[row] for row in others]
        del memory
    if "off" in controls:
        texts[CONTROLS["off"]] = answer(subject.model, ends, ARMTCache(), *limits)
    if "deleted" in controls and any(len(sample["fact_spans"]) for sample in samples):
        without, without_ends = split([task.prompt_without_facts(sample) for sample in samples], size)
        texts[CONTROLS["deleted"]] = answer(
            subject.model, without_ends, read(subject, without, progress), *limits, progress
        )
    if "backbone" in controls:
        texts[CONTROLS["backbone"]] = answer_by_backbone(subject, task, prompts)
    for name, rows in in_order(texts).items():
        result.texts[name] = [None if row is None else task.decode(row) for row in rows]
    return result


def in_order(by_control: dict[str, T]) -> dict[str, T]:
    """What there is of memory and controls, as results list them."""
    return {name: by_control[name] for name in (MEMORY, *CONTROLS.values()) if name in by_control}


def split(prompts: Sequence[np.ndarray], segment_size: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The whole segments of prompts, and what comes after them: 1 to `segment_size` tokens."""
    borders = [(len(prompt) - 1) // segment_size * segment_size for prompt in prompts]
    pairs = list(zip(prompts, borders, strict=True))
    return [prompt[:border] for prompt, border in pairs], [prompt[border:] for prompt, border in pairs]


def read(subject: Subject, bodies: Sequence[np.ndarray], progress: Callable[[int], Any]) -> ARMTCache:
    """What whole segments leave behind; empty if there are none."""
    cache = ARMTCache()
    if any(map(len, bodies)):
        cache.expendable = True
        read_rows(subject.model, bodies, cache, subject.segment_size, progress)
        cache.expendable = False
    return cache


def partners(samples: Sequence[dict[str, Any]]) -> dict[int, int | None]:
    """For each row another one, of another group and with another answer; None if there is none."""
    count = len(samples)
    result: dict[int, int | None] = {}
    for row, sample in enumerate(samples):
        others = ((row + step) % count for step in range(1, count))
        result[row] = next(
            (
                other
                for other in others
                if samples[other]["group"] != sample["group"] and samples[other]["answer"] != sample["answer"]
            ),
            None,
        )
    return result


def answer_by_backbone(subject: Subject, task: Task, prompts: Sequence[np.ndarray]) -> list[list[int]]:
    """Answers of the backbone alone, a few rows at a time: it holds keys and values of all tokens."""
    rows = max(1, BACKBONE_TOKENS[subject.model.device.type] // max(map(len, prompts)))
    ids: list[list[int]] = []
    with backbone_only(subject.model) as backbone:
        for start in range(0, len(prompts), rows):
            part = prompts[start : start + rows]
            ids += answer_with_full_attention(backbone, part, task.max_new_tokens, subject.stop_ids)
    return ids


def now(subject: Subject) -> float:
    """Seconds, when all work on the device is done."""
    if subject.model.device.type == "cuda":
        torch.cuda.synchronize(subject.model.device)
    return time.perf_counter()
