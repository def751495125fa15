"""Language modelling on plain text: the loss of stretches of documents, by how far into the stretch they are."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from .documents import Documents, read_documents
from .streams import SIDES, Samples, finite, passes
from .task import Task
from .tokens import end_ids, piece_ids, start_ids


class Text(Task):
    """
    A sample is a stretch of one document. In training, a document that is shorter than a sample is one of its own;
    in evaluation all samples are as long as was asked for. `answer` is empty and `prompt_length` 0.

    A document begins where its file does; a stretch that reaches its end closes with the end-of-text token, if the
    tokenizer has one.

    Args:
        tokenizer: of the model.
        source, column, config, split: the texts; see [`read_documents`].
        loss_from: how many tokens at the start of a sample have no loss: the segment size, if memory shall not be
            trained to predict what has no past.

    Raises:
        FileNotFoundError, ValueError: see [`read_documents`].
    """

    name = "text"
    exact = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str | Path | Sequence[str],
        column: str = "text",
        config: str | None = None,
        split: str = "train",
        loss_from: int = 0,
    ):
        self.tokenizer, self.loss_from = tokenizer, loss_from
        documents = read_documents(source, column, config, split)
        self._documents = {side: documents.side(side) for side in SIDES}
        self._begin = start_ids(tokenizer)
        texts = self._documents["train"].texts
        probe = "".join(texts[i][:20_000] for i in range(min(10, len(texts))))
        self._characters = len(probe) / max(1, len(piece_ids(tokenizer, probe)))

    def train(self, length: int, seed: int = 0) -> IterableDataset:
        """
        Stretches of `length` tokens, or whole documents that are shorter. In every pass over the texts the stretches
        begin somewhere else.

        Raises:
            ValueError: if there would be no loss in a sample of `length` tokens, or in any document.
        """
        stretches = self._stretches("train", length)
        if next(self._pass(stretches, seed, np.arange(stretches.count), 0), None) is None:
            raise ValueError(
                f"No text for training is longer than {max(1, self.loss_from)} tokens, so none has a loss."
            )
        return passes(partial(self._pass, stretches, seed), stretches.count, seed)

    def validation(self, length: int, count: int) -> IterableDataset:
        return finite(partial(self._evaluation, self._stretches("validation", length), count))

    def test(self, length: int, count: int | None) -> IterableDataset:
        """As `validation`; all there are if `count` is None."""
        return finite(partial(self._evaluation, self._stretches("test", length), count))

    def _stretches(self, side: str, length: int) -> "_Stretches":
        if length <= max(1, self.loss_from):
            raise ValueError(f"Samples of {length} tokens have no loss, which starts at token {self.loss_from}.")
        return _Stretches(side, self._documents[side], length, max(1, round(length * self._characters)))

    def _pass(self, stretches: "_Stretches", seed: int, numbers: np.ndarray, number: int) -> Samples:
        half = stretches.size // 2
        shift = int(np.random.default_rng([seed, number, 1]).integers(-half, half + 1))
        for document, start in stretches.places(numbers, shift):
            sample = self._sample(stretches, document, start)
            if len(sample["input_ids"]) > max(1, self.loss_from):
                yield sample

    def _evaluation(self, stretches: "_Stretches", count: int | None) -> Samples:
        found = 0
        for document, start in stretches.places(np.random.default_rng(0).permutation(stretches.count), 0):
            if found == count:
                return
            sample = self._sample(stretches, document, start)
            if len(sample["input_ids"]) == stretches.length:
                found += 1
                yield sample
        if count is not None and found < count:
            raise ValueError(
                f"The {stretches.side} texts have {found} stretches of {stretches.length} tokens, not {count}."
            )

    def _sample(self, stretches: "_Stretches", document: int, start: int) -> dict[str, Any]:
        text, length = stretches.documents.texts[document], stretches.length
        if start:
            space = re.compile(r"\s").search(text, start)
            start = space.end() if space else start
        taken = stretches.size * 3 // 2 + 8
        ids = self._begin + piece_ids(self.tokenizer, text[start : start + taken])
        while len(ids) < length and start + taken < len(text):
            taken *= 2
            ids = self._begin + piece_ids(self.tokenizer, text[start : start + taken])
        if start + taken >= len(text):
            ids += end_ids(self.tokenizer)
        ids = ids[:length]
        return {
            "input_ids": ids,
            "labels": [-100] * min(self.loss_from, len(ids)) + ids[self.loss_from :],
            "prompt_length": 0,
            "answer": "",
            "distances": [],
            "fact_spans": [],
            "group": stretches.documents.names[document],
        }

    def score(self, output: str, sample: dict[str, Any]) -> float:
        """Raises `TypeError`: there is no answer, only a loss."""
        raise TypeError("Text has no right answers; see `loss_by_position`.")


class _Stretches:
    """Where stretches of about `size` characters begin in the documents of a side."""

    def __init__(self, side: str, documents: Documents, length: int, size: int):
        self.side, self.documents, self.length, self.size = side, documents, length, size
        # What is left of a document after its last whole stretch is one if it is at least half as long.
        self._ends = np.cumsum(np.maximum(1, (documents.lengths + size // 2) // size))
        self.count = int(self._ends[-1])

    def places(self, numbers: np.ndarray, shift: int) -> Iterable[tuple[int, int]]:
        """Document and first character of stretches, all but a document's first moved by `shift` characters."""
        for number in numbers:
            document = int(np.searchsorted(self._ends, number, side="right"))
            index = int(number - (self._ends[document - 1] if document else 0))
            start = index * self.size + shift if index else 0
            if start < self.documents.lengths[document]:
                yield document, start


def loss_by_position(losses: Iterable[Sequence[float]], size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean loss by how far into the sample a token is.

    Args:
        losses: for each sample the loss of predicting its token at each position, `(tokens,)`, in any unit; NaN where
            there is none (the first token, and labels of -100). Samples may differ in length.
        size: positions that are put together: 1, or the segment size for the loss by segment.

    Returns:
        `(bins,)` mean losses, NaN where there was no token, and `(bins,)` numbers of tokens.
    """
    total, count = np.zeros(0), np.zeros(0, dtype=int)
    for sample in losses:
        values = np.asarray(sample, dtype=float)
        there = np.flatnonzero(~np.isnan(values))
        bins = -(-len(values) // size)
        if bins > len(total):
            total = np.pad(total, (0, bins - len(total)))
            count = np.pad(count, (0, bins - len(count)))
        total += np.bincount(there // size, values[there], minlength=len(total))
        count += np.bincount(there // size, minlength=len(count))
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0), count
