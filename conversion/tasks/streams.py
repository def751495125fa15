"""Lazy data sets out of functions that make samples, in shards for the workers and processes of a data loader."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from datasets import IterableDataset


SIDES = ("train", "validation", "test")

# Numbers with many divisors: where processes do not share the shards evenly, `datasets` lets each make all samples.
SHARDS = 960
PARTS, PASSES = 120, 40

Samples = Iterator[dict[str, Any]]


def random_stream(samples: Callable[[np.random.Generator], Samples], seed: int) -> IterableDataset:
    """
    A stream of random samples without end.

    Args:
        samples: yields samples for ever, from the generator it is given; picklable.
        seed: the same stream for the same one.
    """
    return _dataset(partial(_random_shard, samples, seed), list(range(SHARDS)))


def _random_shard(samples: Callable[[np.random.Generator], Samples], seed: int, shard: int) -> Samples:
    for number, sample in enumerate(samples(np.random.default_rng([seed, shard]))):
        yield {"group": number * SHARDS + shard} | sample


def passes(samples: Callable[[np.ndarray, int], Samples], count: int, seed: int) -> IterableDataset:
    """
    Pass after pass over a finite number of things, each pass in an order of its own.

    Args:
        samples: yields samples for an array of things' numbers and the number of the pass; picklable.
        count: how many things there are.
        seed: of the orders.
    """
    # Workers take shards in turn, so all of them are in about the same pass.
    shards = [(number, part) for number in range(PASSES) for part in range(PARTS)]
    return _dataset(partial(_part_of_pass, samples, count, seed), shards).repeat(None)


def _part_of_pass(
    samples: Callable[[np.ndarray, int], Samples], count: int, seed: int, shard: tuple[int, int]
) -> Samples:
    number, part = shard
    return samples(np.random.default_rng([seed, number]).permutation(count)[part::PARTS], number)


def numbered(sample: Callable[[int], dict[str, Any]], count: int) -> IterableDataset:
    """`count` samples, each made from its number by a picklable function, in order."""
    blocks = np.linspace(0, count, min(count, PARTS) + 1, dtype=int).tolist()
    return _dataset(partial(_block, sample), list(zip(blocks, blocks[1:], strict=False)))


def _block(sample: Callable[[int], dict[str, Any]], block: tuple[int, int]) -> Samples:
    for number in range(*block):
        yield {"group": number} | sample(number)


def finite(samples: Callable[[], Samples]) -> IterableDataset:
    """What the iterator of a picklable function yields, in one shard."""
    return _dataset(partial(_whole, samples), [0])


def _whole(samples: Callable[[], Samples], shard: int) -> Samples:
    return samples()


def _dataset(make: Callable[[Any], Samples], shards: list[Any]) -> IterableDataset:
    return IterableDataset.from_generator(partial(_each, make), gen_kwargs={"shards": shards})


def _each(make: Callable[[Any], Samples], shards: list[Any]) -> Samples:
    for shard in shards:
        yield from make(shard)
