"""Plain text beside the task: stretches of documents at random places, as token ids."""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..tasks.documents import read_documents
from ..tasks.tokens import piece_ids


class Texts:
    """
    The documents for training of a source.

    Args:
        source: see [`read_documents`].
        tokenizer: of the model.

    Raises:
        FileNotFoundError, ValueError: see [`read_documents`].
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.documents = read_documents(source).side("train")
        self.share = self.documents.lengths / self.documents.lengths.sum()

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`(count,)` ids from a random place on; where a document ends, from a random place of another one."""
        ids: list[int] = []
        while len(ids) < count:
            text = self.documents.texts[int(rng.choice(len(self.documents), p=self.share))]
            space = re.compile(r"\s").search(text, int(rng.integers(len(text))))
            start = space.end() if space else 0
            ids += piece_ids(self.tokenizer, text[start : start + 8 * (count - len(ids)) + 64])
        return np.array(ids[:count])
