"""
The batches of a stage: the same ones whatever the number of processes and workers, and from any batch on.

Batch n of a stage comes from lane n modulo `LANES`, each of which is a stream of the task with a seed of its own, and
has a length of its own. So a worker that takes some of the lanes knows what the others do, and one that begins in the
middle knows how many samples were taken before.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..tasks import Task
from .collating import collate


# Divisible by every allowed number of workers.
LANES = 8

# Seconds to wait for a batch.
PATIENCE = 900

Draw = Callable[[int, np.random.Generator], np.ndarray]
"""Takes a number of tokens and a generator, returns so many token ids of some text."""


@dataclass
class StageBatches(IterableDataset):
    """
    Batches without end.

    Args:
        task: makes the samples.
        lengths: in tokens; each batch has one of them.
        batch_size: samples of a batch, of all processes together.
        seed: several numbers.
        first: number of the batch to begin with.
        process, processes: of the samples of a batch, each process gets an equal share.
        background: text that some batches start after.
        background_lengths: in tokens; one of them for each of these batches.
        background_share: how many batches these are.
        plain: short text beside the batch.
        plain_shape: number of these texts, of all processes together, and their tokens.
    """

    task: Task
    lengths: list[int]
    batch_size: int
    seed: tuple[int, ...]
    first: int = 0
    process: int = 0
    processes: int = 1
    background: Draw | None = None
    background_lengths: list[int] | None = None
    background_share: float = 0.0
    plain: Draw | None = None
    plain_shape: tuple[int, int] = (0, 0)

    def rng(self, number: int) -> np.random.Generator:
        """For what is drawn for batch `number`, first of all its length."""
        return np.random.default_rng([*self.seed, number])

    def length_of(self, rng: np.random.Generator) -> int:
        return self.lengths[int(rng.integers(len(self.lengths)))]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        Yields the tensors of [`collate`] for this process, `tokens`, the number of those of the whole batch, and, if
        there are such texts, `background` `(1, tokens)` and `plain` `(texts of this process, tokens)`.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # A data loader takes from its workers in turn.
        begin, streams = self.first + worker, {}
        before = range(begin % workers, self.first, workers)
        taken = Counter((number % LANES, self.length_of(self.rng(number))) for number in before)
        for number in count(begin, workers):
            rng = self.rng(number)
            key = number % LANES, self.length_of(rng)
            if key not in streams:
                streams[key] = self.stream(*key, skip=taken[key])
            samples = next(streams[key])
            mine = self.share(self.batch_size)
            batch = collate(samples["input_ids"][mine], samples["labels"][mine])
            yield batch | {"tokens": sum(map(len, samples["input_ids"]))} | self.texts(rng)

    def stream(self, lane: int, length: int, skip: int) -> Iterator[dict[str, list]]:
        """Batches of one lane and length, without the first `skip`."""
        seed = int(np.random.SeedSequence([*self.seed, lane]).generate_state(1)[0])
        # `iter` makes batches, and does not look for workers, of which each would get other shards.
        batches = self.task.train(length, seed).iter(self.batch_size)
        for _ in range(skip):
            next(batches)
        return batches

    def share(self, rows: int) -> slice:
        """Which of so many rows are this process's."""
        size = rows // self.processes
        return slice(self.process * size, (self.process + 1) * size)

    def texts(self, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        texts = {}
        if self.background is not None and rng.random() < self.background_share:
            length = self.background_lengths[int(rng.integers(len(self.background_lengths)))]
            texts["background"] = torch.from_numpy(self.background(length, rng).astype(np.int64))[None]
        if self.plain is not None:
            rows, length = self.plain_shape
            ids = np.stack([self.plain(length, rng) for _ in range(rows)])
            texts["plain"] = torch.from_numpy(ids[self.share(rows)].astype(np.int64))
        return texts


def load_batches(dataset: StageBatches, workers: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """
    Batches made in the background by so many processes, on `device` without waiting for it.

    Raises:
        RuntimeError: if no batch comes within `PATIENCE` seconds.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=as_arrays,
        num_workers=workers,
        prefetch_factor=max(2, LANES // workers) if workers else None,
        timeout=PATIENCE if workers else 0,
        generator=torch.Generator(),  # else a loader takes a number from the generator that dropout uses
    )
    for batch in loader:
        yield {
            name: to_device(value, device) if isinstance(value, np.ndarray) else value for name, value in batch.items()
        }


def as_arrays(batch: dict[str, Any]) -> dict[str, Any]:
    """
    Tensors as arrays, which come from a worker as bytes. Tensors would come as files that both sides open, with
    threads for it on both sides: slower for small batches, and a worker can be stuck in it for ever.
    """
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
