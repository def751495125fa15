"""
The task of the demonstration: remember who went where and took what, across segments of other text.

A text starts with a segment that holds two facts in a place of its own, goes on with segments of filler, and ends with
the two questions. The backbone sees one segment at a time, so nothing but memory connects facts and questions.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


NAMES = ["Mary", "John", "George", "Harry", "Emma", "William", "Anna", "Charles"]
PLACES = ["garden", "house", "church", "school", "town", "wood", "road", "room", "window", "door", "wall", "country"]
THINGS = ["letter", "book", "money", "gold", "horse", "chair", "table", "dress", "rose", "corn", "water", "light"]


@dataclass
class Sample:
    """`input_ids` with `labels` (-100 but for the two answers), and where the questions' segment starts."""

    input_ids: list[int]
    labels: list[int]
    question_start: int


class RecallTask:
    """
    Args:
        tokenizer: the backbone's; every place and thing must be one token of it.
        filler: token ids of running text, from which filler is cut.
        segment_size: the model's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, filler: list[int], segment_size: int):
        self.tokenizer, self.filler, self.segment_size = tokenizer, filler, segment_size
        for word in PLACES + THINGS:
            if len(self._ids(f" {word}")) != 1:
                raise ValueError(f"'{word}' is not one token of this tokenizer, so it cannot be an answer.")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _filler(self, length: int, rng: random.Random) -> list[int]:
        start = rng.randrange(len(self.filler) - length)
        return self.filler[start : start + length]

    def sample(self, distance: int, rng: random.Random) -> Sample:
        """A text with `distance` segments of filler between the facts' segment and the questions'."""
        name, place, thing = rng.choice(NAMES), rng.choice(PLACES), rng.choice(THINGS)
        facts = self._ids(f" {name} went to the {place}. {name} took the {thing}.")
        before = rng.randint(0, self.segment_size - len(facts))
        ids = self._filler(before, rng) + facts
        ids += self._filler(self.segment_size * (1 + distance) - len(ids), rng)
        start, labels = len(ids), [-100] * len(ids)
        for question, answer in ((f" {name} is in the", place), (f" {name} has the", thing)):
            asked, answered = self._ids(question), self._ids(f" {answer}")
            ids += asked + answered + self._ids(".")
            labels += [-100] * len(asked) + answered + [-100]
        return Sample(ids, labels, start)

    def samples(self, distances: list[int], seed: int) -> Iterator[Sample]:
        """Endless texts; each distance is drawn from `distances`."""
        rng = random.Random(seed)
        while True:
            yield self.sample(rng.choice(distances), rng)

    def collate(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """A right-padded batch for the Trainer."""
        length = max(len(sample.input_ids) for sample in samples)
        pad = self.tokenizer.pad_token_id
        rows = [(length - len(sample.input_ids), sample) for sample in samples]
        return {
            "input_ids": torch.tensor([sample.input_ids + [pad] * rest for rest, sample in rows]),
            "attention_mask": torch.tensor([[1] * len(sample.input_ids) + [0] * rest for rest, sample in rows]),
            "labels": torch.tensor([sample.labels + [-100] * rest for rest, sample in rows]),
        }

    @torch.no_grad()
    def score(self, model: PreTrainedModel, samples: list[Sample], memory: bool = True) -> float:
        """
        Share of answers that are the model's first choice.

        Args:
            model: an ARMT model, adapted or not.
            samples: texts of any distance.
            memory: False shows the model the questions' segment alone, with an empty memory.
        """
        was_training = model.training
        model.eval()
        right = total = 0
        for start in range(0, len(samples), 64):
            part = samples[start : start + 64]
            if not memory:
                part = [Sample(s.input_ids[s.question_start :], s.labels[s.question_start :], 0) for s in part]
            batch = {name: tensor.to(model.device) for name, tensor in self.collate(part).items()}
            targets = batch.pop("labels")[:, 1:]
            choices = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
            asked = targets != -100
            right += int((choices == targets)[asked].sum())
            total += int(asked.sum())
        model.train(was_training)
        return right / total
