"""How many samples are read side by side."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice, repeat
from typing import Any, TypeVar

import torch

from ..checkpoints import armt_model
from .subject import Subject


T = TypeVar("T")

MOST_ROWS = {"cuda": 1024, "cpu": 32}
HOST_TOKENS = 2**30  # of all rows
SHARE = 0.5  # of the free memory of a GPU


def rows_for(subject: Subject, tokens: int, count: int) -> int:
    """
    Rows that fit side by side.

    Args:
        tokens: of a sample.
        count: of the samples.
    """
    device = subject.model.device
    rows = min(MOST_ROWS[device.type], max(2, HOST_TOKENS // tokens))
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        rows = min(rows, int(free * SHARE) // row_bytes(subject))
    return max(1, min(rows, count))


def row_bytes(subject: Subject) -> int:
    """About what a row takes on the device: its state, several times, its open segment, and one layer's work on it."""
    config = armt_model(subject.model).config
    backbone = config.text_config
    hidden, layers = backbone.hidden_size, backbone.num_hidden_layers
    state = len(config.memory_layer_indices) * 2 * config.dpfp_nu * config.d_mem * (hidden + 1) * 4
    positions = config.segment_size + config.num_mem_tokens
    widest = 4 * (getattr(backbone, "intermediate_size", None) or 4 * hidden) + 8 * hidden
    keys_and_values = 4 * layers * hidden
    return 5 * state + 4 * positions * (widest + keys_and_values) + 16 * backbone.vocab_size


def even_sizes(count: int, most: int) -> list[int]:
    """Sizes of batches of at most `most` samples, as equal as they can be: none is left alone."""
    batches = -(-count // most)
    return [count // batches + (number < count % batches) for number in range(batches)]


def in_batches(
    run: Callable[[list[T]], Any], samples: Iterable[T], most: int, count: int | None = None
) -> Iterator[tuple[list[T], Any]]:
    """
    Runs samples in batches, smaller ones from where the memory of the device does not suffice.

    Args:
        run: takes a batch.
        samples: to be taken as they are needed.
        most: samples of a batch.
        count: how many samples there are, None if nobody knows.

    Yields:
        Each batch with what `run` returned.
    """
    stream = iter(samples)
    sizes = iter(even_sizes(count, most)) if count else repeat(most)
    while batch := list(islice(stream, next(sizes, 0))):
        start = 0
        for size in even_sizes(len(batch), most):
            for part, result in halved_if_too_large(run, batch[start : start + size]):
                most = min(most, len(part)) if len(part) < size else most
                yield part, result
            start += size


def halved_if_too_large(run: Callable[[list[T]], Any], batch: list[T]) -> Iterator[tuple[list[T], Any]]:
    """Runs a batch, in halves where the memory of the device does not suffice; yields what was run with its result."""
    try:
        result = run(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        result = None
    if result is not None:
        yield batch, result
        return
    torch.cuda.empty_cache()
    middle = len(batch) // 2
    yield from halved_if_too_large(run, batch[:middle])
    yield from halved_if_too_large(run, batch[middle:])
