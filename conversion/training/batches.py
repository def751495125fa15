"""
The batches of a stage: the same ones whatever the number of processes and workers, and from any batch on.

Batch n of a stage comes from lane n modulo `LANES`, each of which is a stream of the task with a seed of its own, and
has a length of its own. So a worker that takes some of the lanes knows what the others do, and one that begins in the
middle knows how many samples were taken before.
"""

from collections import Counter
from collections.abc import Iterator
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
    """

    task: Task
    lengths: list[int]
    batch_size: int
    seed: tuple[int, ...]
    first: int = 0
    process: int = 0
    processes: int = 1

    def length_of(self, number: int) -> int:
        """In tokens, of batch `number`."""
        return self.lengths[int(np.random.default_rng([*self.seed, number]).integers(len(self.lengths)))]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the tensors of [`collate`] for this process, and `tokens` of the whole batch."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # A data loader takes from its workers in turn.
        begin, streams = self.first + worker, {}
        before = range(begin % workers, self.first, workers)
        taken = Counter((number % LANES, self.length_of(number)) for number in before)
        size = self.batch_size // self.processes
        mine = slice(self.process * size, (self.process + 1) * size)
        for number in count(begin, workers):
            key = number % LANES, self.length_of(number)
            if key not in streams:
                streams[key] = self.stream(*key, skip=taken[key])
            samples = next(streams[key])
            batch = collate(samples["input_ids"][mine], samples["labels"][mine])
            yield batch | {"tokens": sum(map(len, samples["input_ids"]))}

    def stream(self, lane: int, length: int, skip: int) -> Iterator[dict[str, list]]:
        """Batches of one lane and length, without the first `skip`."""
        seed = int(np.random.SeedSequence([*self.seed, lane]).generate_state(1)[0])
        # `iter` makes batches, and does not look for workers, of which each would get other shards.
        batches = self.task.train(length, seed).iter(self.batch_size)
        for _ in range(skip):
            next(batches)
        return batches


def load_batches(dataset: StageBatches, workers: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Batches made in the background by so many processes, on `device` without waiting for it."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, LANES // workers) if workers else None,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        yield {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
