"""A fact hidden at some depth of a long text, and a question about it at the end."""

import re
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from .documents import side_of
from .streams import SIDES, Samples, numbered, random_stream
from .task import LengthError, Task
from .tokens import end_ids, piece_ids, start_ids


SPARE = 512  # tokens in which there is a whole sentence
DEPTHS = [i / 10 for i in range(11)]


@dataclass
class Fact:
    """A sentence to hide, the question that it answers, up to where the answer goes on, and the answer."""

    sentence: str
    question: str
    answer: str


class HiddenFact(Task):
    """
    Samples have a column `depth` beside the usual ones: 0 has the fact at the start of the text, 1 at its end. In
    training, depths are random; in evaluation, sample `i` has depth `DEPTHS[i % 11]`: 0, 0.1, ... 1.

    The loss is on the answer, a number, and on the end-of-text token if the tokenizer has one. A number belongs to
    one side only.

    Args:
        tokenizer: of the model.
        digits: of the number.
    """

    introduction: str
    """What a text begins with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, digits: int):
        if digits < 2:
            raise ValueError("A number needs at least 2 digits.")
        self.tokenizer, self.digits = tokenizer, digits
        self.max_new_tokens = digits + 2  # a space before it, and what shows that it ends
        # Some tokenizers begin every text with a space, others do not.
        joined = tokenizer.decode(self._ids("One.") + self._ids("Two."))
        self.space = "" if "One. Two." in joined else " "

    @abstractmethod
    def fact(self, rng: np.random.Generator, side: str) -> Fact:
        """A random fact that no other side has."""

    @abstractmethod
    def filler(self, rng: np.random.Generator, side: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """At most `budget` ids of whole sentences, and the sorted places between sentences, from 0 to the end."""

    def train(self, length: int, seed: int = 0) -> IterableDataset:
        self._check(length)
        return random_stream(partial(self._samples, length), seed)

    def validation(self, length: int, count: int) -> IterableDataset:
        self._check(length)
        return numbered(partial(self._numbered, length, "validation"), count)

    def test(self, length: int, count: int) -> IterableDataset:
        self._check(length)
        return numbered(partial(self._numbered, length, "test"), count)

    def _check(self, length: int) -> None:
        self._sample(length, "train", np.random.default_rng(0), 0.0)

    def _samples(self, length: int, rng: np.random.Generator) -> Samples:
        while True:
            yield self._sample(length, "train", rng, float(rng.random()))

    def _numbered(self, length: int, side: str, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([SIDES.index(side), number])
        return self._sample(length, side, rng, DEPTHS[number % len(DEPTHS)])

    def _ids(self, text: str) -> list[int]:
        return piece_ids(self.tokenizer, text)

    def _number(self, rng: np.random.Generator, side: str) -> str:
        while True:
            number = str(rng.integers(10 ** (self.digits - 1), 10**self.digits))
            if side_of(number) == side:
                return number

    def _sample(self, length: int, side: str, rng: np.random.Generator, depth: float) -> dict[str, Any]:
        fact = self.fact(rng, side)
        begin = start_ids(self.tokenizer) + self._ids(self.introduction)
        hidden, question = self._ids(self.space + fact.sentence), self._ids(self.space + fact.question)
        answer = self._ids(self.space + fact.answer) + end_ids(self.tokenizer)
        needed = len(begin) + len(hidden) + len(question) + len(answer)
        if length < needed:
            raise LengthError(f"A {self.name} sample without any filler has {needed} tokens, more than {length}.")
        filler, places = self.filler(rng, side, length - needed)
        place = int(places[np.abs(places - depth * len(filler)).argmin()])
        prompt = [*begin, *filler[:place].tolist(), *hidden, *filler[place:].tolist(), *question]
        return {
            "input_ids": prompt + answer,
            "labels": [-100] * len(prompt) + answer,
            "prompt_length": len(prompt),
            "answer": fact.answer,
            "distances": [len(question) + len(filler) - place],
            "fact_spans": [[len(begin) + place, len(begin) + place + len(hidden)]],
            "depth": depth,
        }

    def filling(self, prompt: np.ndarray, start: int, end: int, rng: np.random.Generator) -> np.ndarray:
        """Other filler; its last sentence may be cut."""
        return np.resize(self.filler(rng, "test", end - start + SPARE)[0], end - start)

    def score(self, output: str, sample: dict[str, Any]) -> float:
        """1 if the first number of `output` is the answer."""
        return float(re.findall(r"\d+", output)[:1] == [sample["answer"]])

    def baselines(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """`chance` guesses among all numbers of so many digits."""
        return {"chance": 1 / (9 * 10 ** (self.digits - 1))}
