"""What a task is: where its samples come from, how they become tokens, and what a right answer is."""

from abc import ABC, abstractmethod
from typing import Any

from datasets import Dataset, IterableDataset


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
    - `group`: samples of one group are not independent (questions about one story); intervals resample groups.

    Attributes:
        name: as on the command line.
        exact: whether an answer is right or wrong; otherwise only the loss says something.
    """

    name: str
    exact = True

    @abstractmethod
    def train(self, length: int, seed: int = 0) -> IterableDataset:
        """Endless samples of at most `length` tokens, made when they are asked for; the same for the same seed."""

    @abstractmethod
    def validation(self, length: int, count: int) -> Dataset | IterableDataset:
        """`count` samples of about `length` tokens, the same every time, of nothing that `train` shows."""

    @abstractmethod
    def test(self, length: int, count: int) -> Dataset | IterableDataset:
        """As `validation`, of nothing that `train` or `validation` shows."""

    def score(self, output: str, sample: dict[str, Any]) -> float:
        """1 for a right answer, 0 for a wrong one."""
        return float(output.strip() == sample["answer"])

    def baselines(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """What is scored without reading: `chance`, and a simple heuristic by its name where the task has one."""
        return {}
