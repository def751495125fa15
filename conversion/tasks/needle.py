"""A needle in a haystack: one made-up fact about a city inside other people's prose."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .documents import Documents, read_documents, side_of
from .hidden_fact import Fact, HiddenFact
from .streams import SIDES


CITIES = re.findall(
    r"\w+",
    """
Accra Adelaide Algiers Amsterdam Ankara Antwerp Athens Auckland Baku Bangkok Barcelona Basel Beirut Belgrade Bergen
Berlin Bilbao Bogota Bologna Boston Brisbane Brussels Bucharest Budapest Cairo Calgary Caracas Chicago Cologne Dakar
Dallas Damascus Delhi Denver Dresden Dublin Durban Florence Geneva Genoa Ghent Glasgow Hamburg Hanoi Havana Helsinki
Istanbul Jakarta Kabul Kampala Karachi Kyoto Lagos Lahore Lima Lisbon Liverpool London Lyon Madrid Manila Marseille
Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Naples Osaka Oslo Ottawa Paris Perth Prague Quebec Quito
Riga Rome Rotterdam Salzburg Santiago Sarajevo Seattle Seoul Seville Shanghai Singapore Sofia Stockholm Sydney Tallinn
Tbilisi Tehran Tokyo Toronto Toulouse Tripoli Tunis Turin Utrecht Valencia Vancouver Venice Vienna Vilnius Warsaw
Zagreb Zurich
""",
)
PART = 16_384  # characters of a document that are read at a time
LONGEST = 128  # tokens of a sentence


class Needle(HiddenFact):
    """
    Cities, numbers and background texts of one side are on no other. Where the background is shorter than a sample, it
    comes again.

    Args:
        tokenizer: of the model.
        background: texts to hide the fact in; see [`read_documents`].
        digits: of the number.

    Raises:
        FileNotFoundError, ValueError: see [`read_documents`]. `ValueError` from all three sides too, if a sample is
            longer than `length` without any background.
    """

    name = "needle"
    introduction = "One sentence of this text tells how many lanterns a city has, which is asked for at the end."

    def __init__(self, tokenizer: PreTrainedTokenizerBase, background: str | Path | Sequence[str], digits: int = 6):
        super().__init__(tokenizer, digits)
        documents = read_documents(background)
        self._documents: dict[str, Documents] = {side: documents.side(side) for side in SIDES}
        self._parts = {side: np.cumsum(-(-texts.lengths // PART)) for side, texts in self._documents.items()}
        self._cities = {side: [city for city in CITIES if side_of(city) == side] for side in SIDES}
        self._read: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}

    def fact(self, rng: np.random.Generator, side: str) -> Fact:
        city, number = rng.choice(self._cities[side]), self._number(rng, side)
        sentence = f"The city of {city} has exactly {number} lanterns."
        return Fact(sentence, f"How many lanterns does the city of {city} have? It has exactly", number)

    def filler(self, rng: np.random.Generator, side: str, budget: int) -> tuple[np.ndarray, np.ndarray]:
        count = int(self._parts[side][-1])
        part, start = int(rng.integers(count)), None
        pieces, places, filled = [np.zeros(0, dtype=np.int32)], [np.zeros(1, dtype=int)], 0
        while True:
            ids, ends = self._sentences(side, part)
            if start is None:
                start = int(rng.integers(len(ends)))
            offset = int(ends[start - 1]) if start else 0
            fitting = ends[start:][ends[start:] - offset <= budget - filled] - offset
            if len(fitting):
                pieces.append(ids[offset : offset + fitting[-1]])
                places.append(fitting + filled)
                filled += int(fitting[-1])
            if len(fitting) < len(ends) - start:  # the next sentence does not fit
                return np.concatenate(pieces), np.concatenate(places)
            part, start = (part + 1) % count, 0

    def _sentences(self, side: str, part: int) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens,)` ids of a part of a document and `(sentences,)` ends, kept for the next time."""
        if (side, part) not in self._read:
            document = int(np.searchsorted(self._parts[side], part, side="right"))
            index = part - (int(self._parts[side][document - 1]) if document else 0)
            text = self._documents[side].texts[document]
            text = text[_sentence_start(text, index * PART) : _sentence_start(text, (index + 1) * PART)]
            sentences = [self.space + sentence for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split()))]
            ids = self.tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]
            # Prose without full stops may be cut anywhere.
            sizes = [min(LONGEST, len(sentence) - i) for sentence in ids for i in range(0, len(sentence), LONGEST)]
            self._read[side, part] = np.concatenate(ids).astype(np.int32), np.cumsum(sizes)
        return self._read[side, part]


def _sentence_start(text: str, position: int) -> int:
    """Where the first sentence after a position starts; the position, if none does soon."""
    found = re.compile(r"[.!?]\s+").search(text, position, position + 2000) if position else None
    return found.end() if found else position
