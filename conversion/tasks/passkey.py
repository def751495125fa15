"""A pass key between sentences that come again and again."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from .hidden_fact import Fact, HiddenFact


FILLER = [
    "The river runs past the mill.",
    "A cart goes up the hill and comes down again.",
    "Clouds move over the fields.",
    "The clock in the hall strikes the hour.",
]


class Passkey(HiddenFact):
    """
    Args:
        tokenizer: of the model.
        digits: of the pass key.

    Raises:
        ValueError: from all three sides, if a sample is longer than `length` without any filler.
    """

    name = "passkey"
    introduction = "One sentence of this text tells a pass key, which is asked for at the end. All others are filler."

    def __init__(self, tokenizer: PreTrainedTokenizerBase, digits: int = 5):
        super().__init__(tokenizer, digits)
        sentences = [self._ids(self.space + sentence) for sentence in FILLER]
        self._round = np.concatenate(sentences)
        self._ends = np.cumsum([len(ids) for ids in sentences])

    def fact(self, rng: np.random.Generator, side: str) -> Fact:
        number = self._number(rng, side)
        return Fact(f"The pass key is {number}.", "What is the pass key? The pass key is", number)

    def filler(self, rng: np.random.Generator, side: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
        size = len(self._round)
        rounds = np.arange(budget // size + 1)
        places = np.concatenate([[0], (rounds[:, None] * size + self._ends).ravel()])
        places = places[places <= budget]
        return np.tile(self._round, len(rounds))[: places[-1]], places
