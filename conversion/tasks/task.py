"""What a task is: where its samples come from, how they become tokens, and what a right answer is."""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset


class LengthError(ValueError):
    """A length that is not one, or too short for what must be in it."""


def parse_length(text: str) -> int:
    """
    `"4k"`, `"128k"`, `"1M"` or `"4000"` as a number; 1k is 1,000.

    Raises:
        LengthError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text.strip())
    if not match:
        raise LengthError(f"{text!r} is not a length; lengths look like 500, 4k, 128k or 1M.")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()])


class Task(ABC):
    """
    A task has a side to train on and two to evaluate on, which share nothing that could be remembered.

    A sample is a dict with

    - `input_ids`: the text, the question and the answer, as the model reads them in training;
    - `labels`: as long, -100 everywhere but where the loss is;
    - `prompt_length`: how many of the ids come before the answer: what evaluation reads before it generates;
    - `answer`: the answer as text, or as space-separated symbols where there is no text;
    - `distances`: tokens between each supporting fact and the end of the prompt, nearest last; empty where there is
      nothing to be found;
    - `fact_spans`: `[start, end]` in `input_ids` of each supporting fact, in the order of `distances`;
    - `group`: samples of one group are not independent (questions about one story); intervals resample groups.

    Attributes:
        name: as on the command line.
        exact: whether an answer is right or wrong; otherwise only the loss says something.
        max_new_tokens: as many as an answer may have when it is generated.
    """

    name: str
    exact = True
    max_new_tokens = 0

    @abstractmethod
    def train(self, length: int, seed: int = 0) -> IterableDataset:
        """Endless samples of at most `length` tokens, made when they are asked for; the same for the same seed."""

    @abstractmethod
    def validation(self, length: int, count: int) -> Dataset | IterableDataset:
        """`count` samples of about `length` tokens, the same every time, of nothing that `train` shows."""

    @abstractmethod
    def test(self, length: int, count: int) -> Dataset | IterableDataset:
        """As `validation`, of nothing that `train` or `validation` shows."""

    def tokens_of(self, length: str) -> int:
        """
        A length as the command line has it, in tokens of the model.

        Raises:
            LengthError: if it is none.
        """
        return parse_length(length)

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids as `score` takes them."""
        return self.tokenizer.decode(ids)

    def prompt_without_facts(self, sample: dict[str, Any]) -> np.ndarray:
        """
        The `(prompt_length,)` ids before the answer, with something else of the same length in the place of each
        supporting fact: what is left to be known without them. The same every time.
        """
        prompt = np.array(sample["input_ids"][: sample["prompt_length"]])
        rng = np.random.default_rng(zlib.crc32(prompt.tobytes()))
        for start, end in sorted({tuple(span) for span in sample["fact_spans"]}, reverse=True):
            prompt = np.concatenate([prompt[:start], self.filling(prompt, start, end, rng), prompt[end:]]).astype(
                prompt.dtype
            )
        return prompt

    def filling(self, prompt: np.ndarray, start: int, end: int, rng: np.random.Generator) -> np.ndarray:
        """`(end - start,)` ids to put in the place of a fact of a prompt of the test side."""
        raise NotImplementedError(f"The facts of {self.name} cannot be taken out.")

    def score(self, output: str, sample: dict[str, Any]) -> float:
        """1 for a right answer, 0 for a wrong one."""
        return float(output.strip() == sample["answer"])

    def baselines(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """What is scored without reading: `chance`, and a simple heuristic by its name where the task has one."""
        return {}
