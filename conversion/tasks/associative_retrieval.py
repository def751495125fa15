"""Associative retrieval: pairs of random keys and values, then a key whose value is to be told."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from datasets import IterableDataset

from .streams import SIDES, Samples, finite, random_stream
from .task import Task, parse_length


ROWS = 256
COLUMNS = 4096  # that are hashed at a time


class AssociativeRetrieval(Task):
    """
    Token ids are the symbols themselves, without a tokenizer: `key SEP value EOS` for each pair, `key GEN value EOS`
    at the end. The loss is on this value and EOS.

    In *remember* all keys differ. In *rewrite* a key may come again with another value, and the last one counts.

    Args:
        key_size, value_size: in symbols, of which there are 16.
        pairs: in a sample; by default as many as fit into its length.
        rewrite: keys are drawn with repetition.
        segment_size: tokens that a pair takes up, with PAD behind it; by default `pair_size`, so that nothing stands
            between pairs. A model with segments of this size has one pair in each.
        vary: training samples have 1 to `pairs` pairs, each number as often as another.
        questions: of a training sample, which is longer by what is more than one; each stands where a pair could, and
            has a loss, unless a sample with this question alone is one of validation or test. These have one question.
        key_symbols: how many symbols the keys of a sample are made of, by default all; drawn anew for each. With
            few, many keys differ in one symbol, or in their order alone. Pairs before samples have all.

    Attributes:
        pair_size: key, value and two special tokens; the question with its answer is as long.
        vocab_size: of a model for this task.
        max_new_tokens: value and EOS.
        sep_token_id, gen_token_id, eos_token_id, pad_token_id: the special tokens.

    Raises:
        ValueError: if a size is too small, or there are fewer keys than pairs.
    """

    name = "associative_retrieval"
    symbols = 16
    sep_token_id, gen_token_id, eos_token_id, pad_token_id = 100, 101, 102, 103
    vocab_size = 104

    def __init__(
        self,
        key_size: int = 1,
        value_size: int = 1,
        pairs: int | None = None,
        rewrite: bool = False,
        segment_size: int | None = None,
        vary: bool = True,
        questions: int = 1,
        key_symbols: int | None = None,
    ):
        if min(key_size, value_size, pairs or 1, questions) < 1:
            raise ValueError("key_size, value_size, pairs and questions must be at least 1.")
        self.key_size, self.value_size, self.pairs = key_size, value_size, pairs
        self.rewrite, self.vary, self.questions = rewrite, vary, questions
        self.pair_size = key_size + value_size + 2
        self.max_new_tokens = value_size + 1
        self.segment_size = segment_size or self.pair_size
        if self.segment_size < self.pair_size:
            raise ValueError(f"segment_size is {segment_size}, but a pair has {self.pair_size} tokens.")
        self.key_symbols = self.symbols if key_symbols is None else key_symbols
        if not 1 <= self.key_symbols <= self.symbols:
            raise ValueError(f"key_symbols is {key_symbols}; it must be from 1 to {self.symbols}.")
        self.keys = self.key_symbols**key_size
        self._check_keys(pairs or 1)

    def _check_keys(self, pairs: int) -> None:
        if pairs > self.keys and not self.rewrite:
            raise ValueError(
                f"{pairs} pairs need as many different keys, but there are only {self.keys} of key_size "
                f"{self.key_size} and {self.key_symbols} symbols. Use fewer pairs, longer keys, or rewrite=True."
            )

    def length(self, pairs: int) -> int:
        """Tokens of a sample with so many pairs, answer included."""
        return pairs * self.segment_size + self.pair_size

    def tokens_of(self, length: str) -> int:
        """Also `"50p"` or `"100kp"`: so many pairs."""
        text = length.strip()
        return self.length(parse_length(text[:-1])) if text.endswith("p") else parse_length(text)

    def pairs_in(self, length: int) -> int:
        """
        The most pairs of a sample of at most `length` tokens.

        Raises:
            ValueError: if there is no room for one pair, or for `pairs`, or there are fewer keys than room.
        """
        needed = self.length(self.pairs or 1)
        if length < needed:
            raise ValueError(f"{self.pairs or 1} pairs need a length of {needed} tokens, not {length}.")
        pairs = self.pairs or (length - self.pair_size) // self.segment_size
        self._check_keys(pairs)
        return pairs

    def train(self, length: int, seed: int = 0) -> IterableDataset:
        pairs = self.pairs_in(length)
        return random_stream(partial(self._samples, pairs=pairs, side="train", vary=self.vary), seed)

    def validation(self, length: int, count: int) -> IterableDataset:
        return self._evaluation("validation", length, count)

    def test(self, length: int, count: int) -> IterableDataset:
        return self._evaluation("test", length, count)

    def text(self, rows: int, pairs: int, rng: np.random.Generator, keys: int | None = None) -> np.ndarray:
        """`(rows, pairs * segment_size)` pairs without a question; `keys`: of so many keys, by default of all."""
        drawn = rng.integers(keys or self.symbols**self.key_size, size=(rows, pairs))
        values = rng.integers(self.symbols, size=(rows, pairs, self.value_size))
        return self._padded(self._pairs(drawn, self.sep_token_id, values))

    @property
    def train_background(self) -> Callable[[int, np.random.Generator], np.ndarray] | None:
        """Draws pairs that come before a sample, `(count,)` ids; in *remember* there can be none."""
        return self._pairs_before if self.rewrite else None

    def _pairs_before(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return self.text(1, -(-count // self.segment_size), rng)[0, :count]

    def _evaluation(self, side: str, length: int, count: int) -> IterableDataset:
        return finite(partial(self._first, self.pairs_in(length), side, count))

    def _first(self, pairs: int, side: str, count: int) -> Samples:
        made = self._samples(np.random.default_rng(SIDES.index(side)), pairs, side, vary=False)
        for number, sample in enumerate(islice(made, count)):
            yield sample | {"group": number}

    def _samples(self, rng: np.random.Generator, pairs: int, side: str, vary: bool) -> Samples:
        body_size = pairs * self.segment_size
        # The same start for every number of pairs, so that a short sample has one side whatever the longest is.
        weights = np.random.default_rng(0).integers(2**63, size=self.pair_size + body_size, dtype=np.uint64) | 1
        while True:
            counts = rng.integers(1, pairs + 1, ROWS) if vary else np.full(ROWS, pairs)
            body, queries, told = self._rows(rng, pairs, counts, self.questions if side == "train" else 1)
            mixed = ((queries + 1).astype(np.uint64) * weights[: self.pair_size]).sum(-1, dtype=np.uint64)
            for first in range(0, body_size, COLUMNS):
                part = body[:, first : first + COLUMNS] + 1
                part *= first + np.arange(part.shape[1]) < counts[:, None] * self.segment_size
                mixed += (part.astype(np.uint64) @ weights[self.pair_size + first :][: part.shape[1]])[:, None]
            sides = np.maximum((mixed >> np.uint64(40)).astype(np.int64) % 10 - 7, 0)
            of_side, asked = sides == SIDES.index(side), self._padded(queries)
            for row in np.flatnonzero(of_side[:, -1]):
                size = counts[row] * self.segment_size
                ids = np.concatenate([body[row, :size], asked[row]])
                ids = ids[: len(ids) - self.segment_size + self.pair_size]
                prompt_length = len(ids) - self.value_size - 1
                answer = ids[prompt_length:].tolist()
                labels = np.full(len(ids), -100)
                for start in size + self.segment_size * np.flatnonzero(of_side[row]):
                    value = slice(start + self.key_size + 1, start + self.pair_size)
                    labels[value] = ids[value]
                start = int(told[row] * self.segment_size)
                last = int((counts[row] - 1) * self.segment_size) + self.key_size + 1
                yield {
                    "input_ids": ids.tolist(),
                    "labels": labels.tolist(),
                    "prompt_length": prompt_length,
                    "answer": " ".join(map(str, answer)),
                    "distances": [prompt_length - start - self.pair_size],
                    "fact_spans": [[start, start + self.pair_size]],
                    "last_value": ids[last : last + self.value_size + 1].tolist(),
                }

    def _rows(
        self, rng: np.random.Generator, pairs: int, counts: np.ndarray, questions: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        `(rows, pairs * segment_size)` pairs, `(rows, questions, pair_size)` questions, and `(rows,)` pairs that answer
        the last of them.
        """
        each = np.arange(len(counts))[:, None]
        keys = self._draw_keys(rng, len(counts), pairs)
        values = rng.integers(self.symbols, size=(len(counts), pairs, self.value_size))
        asked = keys[each, self._draw_asked(rng, pairs, counts, questions)]
        same = (keys[:, None] == asked[..., None]) & (np.arange(pairs) < counts[:, None, None])
        told = pairs - 1 - same[..., ::-1].argmax(-1)
        queries = self._pairs(asked, self.gen_token_id, values[each, told])
        return self._padded(self._pairs(keys, self.sep_token_id, values)), queries, told[:, -1]

    def _draw_asked(self, rng: np.random.Generator, pairs: int, counts: np.ndarray, questions: int) -> np.ndarray:
        """`(rows, questions)` of the first `counts` pairs, in any order; all of them before one comes again."""
        last = rng.integers(counts)[:, None]
        if questions == 1:
            return last
        order = np.where(np.arange(pairs) < counts[:, None], rng.random((len(counts), pairs)), 2)
        np.put_along_axis(order, last, 1, 1)  # behind all others that there are
        others = np.take_along_axis(order.argsort(1), np.arange(questions - 1) % counts[:, None], 1)
        return np.concatenate([others, last], axis=1)

    def _draw_keys(self, rng: np.random.Generator, rows: int, pairs: int) -> np.ndarray:
        """`(rows, pairs)` keys, as numbers with a digit for each symbol."""
        numbers = self._draw_numbers(rng, rows, pairs)
        if self.key_symbols == self.symbols:
            return numbers
        chosen = rng.permuted(np.tile(np.arange(self.symbols), (rows, 1)), axis=1)
        keys = np.zeros_like(numbers)
        for place in range(self.key_size):
            digits = numbers // self.key_symbols**place % self.key_symbols
            keys += np.take_along_axis(chosen, digits, 1) * self.symbols**place
        return keys

    def _draw_numbers(self, rng: np.random.Generator, rows: int, pairs: int) -> np.ndarray:
        """`(rows, pairs)` of the numbers below `keys`, which differ in a row unless the task is rewrite."""
        if self.rewrite:
            return rng.integers(self.keys, size=(rows, pairs))
        order = rng.random((rows, self.keys), dtype=np.float32)
        if pairs < self.keys:  # much faster than sorting thousands of keys for a few
            chosen = np.argpartition(order, pairs - 1, axis=1)[:, :pairs]
            return np.take_along_axis(chosen, rng.random((rows, pairs)).argsort(1), 1)
        return order.argsort(1)

    def _padded(self, pairs: np.ndarray) -> np.ndarray:
        """`(rows, number * segment_size)` for `(rows, number, pair_size)` pairs or questions."""
        body = np.full((*pairs.shape[:2], self.segment_size), self.pad_token_id, dtype=np.int16)
        body[..., : self.pair_size] = pairs
        return body.reshape(len(pairs), -1)

    def _pairs(self, keys: np.ndarray, separator: int, values: np.ndarray) -> np.ndarray:
        """`(..., pair_size)` tokens of `(...)` keys and `(..., value_size)` values."""
        result = np.empty((*keys.shape, self.pair_size), dtype=np.int16)
        for place in range(self.key_size):
            result[..., place] = keys // self.symbols ** (self.key_size - 1 - place) % self.symbols
        result[..., self.key_size] = separator
        result[..., self.key_size + 1 : -1] = values
        result[..., -1] = self.eos_token_id
        return result

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def filling(self, prompt: np.ndarray, start: int, end: int, rng: np.random.Generator) -> np.ndarray:
        """The next pair before, or else behind, that has another key; PAD where there is none."""
        pairs = prompt[: len(prompt) - self.key_size - 1].reshape(-1, self.segment_size)[:, : self.pair_size]
        told = start // self.segment_size
        others = np.flatnonzero((pairs[:, : self.key_size] != pairs[told, : self.key_size]).any(1))
        if not len(others):
            return np.full(end - start, self.pad_token_id)
        before = others[others < told]
        return pairs[before[-1] if len(before) else others[0]]

    def score(self, output: str, sample: dict[str, Any]) -> float:
        """1 if the first ids of `output`, separated by spaces, are the value and EOS; whatever follows them."""
        return float(output.split()[: self.value_size + 1] == sample["answer"].split())

    def baselines(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """`chance` guesses the value; `last value seen` answers with the value of the last pair."""
        right = [" ".join(map(str, s["last_value"])) == s["answer"] for s in samples]
        return {"chance": self.symbols**-self.value_size, "last value seen": sum(right) / max(1, len(right))}
