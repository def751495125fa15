"""Background text for long-context tasks: books cut into sentences, tokenized once and mapped from a cache."""

import hashlib
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..files import staged
from ..hub_names import may_be_on_hub
from .documents import side_of_book


VERSION = 1  # of the cached files
BATCH = 1024  # sentences tokenized at a time
SENTENCE_END = re.compile(r"""(?<=[.!?])(["'”’)\]]*)\s+(?=["'“‘(\[]?[A-Z])""")


class BackgroundError(ValueError):
    """Background text that is missing, damaged or too little, with the reason."""


class Background:
    """
    Books as token ids, in sentences.

    Attributes:
        ids: `(tokens,)` uint16 or uint32, the books one after another, mapped from the cache.
        offsets: `(sentences + 1,)` int64, where sentences begin in `ids`.
        books: name, first sentence and end sentence of each book.
        characters: length of the text of all sentences, with a space before each.
    """

    def __init__(self, source: str | Path, tokenizer: PreTrainedTokenizerBase, cache: str | Path):
        """
        Opens the cached tokens, or makes them.

        Args:
            source: a folder of .txt files, a .tar, .tar.gz or .tar.xz archive of them, or a Hub dataset with a
                column `text`.
            cache: folder to keep tokens in; created if needed.

        Raises:
            BackgroundError: if there is no text, or it cannot be read.
        """
        self.folder = Path(cache) / f"background-{cache_key(source, tokenizer)}"
        if not self.folder.is_dir():
            build_cache(source, tokenizer, self.folder)
        self.open()

    def open(self) -> None:
        """Maps the cached files."""
        self.ids = np.load(self.folder / "ids.npy", mmap_mode="r")
        self.offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
        index = json.loads((self.folder / "books.json").read_text())
        self.books = [tuple(book) for book in index["books"]]
        self.characters = index["characters"]

    # Data loaders copy tasks between processes; the mapped tokens stay where they are.
    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __setstate__(self, state: dict) -> None:
        self.folder = state["folder"]
        self.open()

    @property
    def characters_per_token(self) -> float:
        return self.characters / len(self.ids)

    def side(self, name: str) -> list[tuple[str, int, int]]:
        """The books of one side; raises BackgroundError if there are none."""
        books = [book for book in self.books if side_of_book(book[0]) == name]
        if not books:
            raise BackgroundError(
                f"None of the {len(self.books)} books of the background falls on the {name} side; more are needed."
            )
        return books

    def unique_tokens(self, side: str) -> int:
        """How many background tokens there are on a side before they repeat."""
        return sum(int(self.offsets[end] - self.offsets[first]) for _, first, end in self.side(side))

    def draw(self, side: str, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """
        Exactly `count` tokens of running text, from a random sentence of a random book.

        Where a book ends the next one begins, and the first one's beginning comes after all others; only then does
        anything repeat.

        Returns:
            `(count,)` ids, and `(sentences + 1,)` positions between sentences, from 0 to `count`; the last sentence
            may be cut.
        """
        if count == 0:
            return np.empty(0, self.ids.dtype), np.zeros(1, np.int64)
        books = self.side(side)
        order = [books[i] for i in rng.permutation(len(books))]
        _, first, end = order[0]
        start = int(rng.integers(first, end))
        runs = [(start, end), *((a, b) for _, a, b in order[1:]), (first, start)]
        pieces, borders, taken = [], [np.zeros(1, np.int64)], 0
        while taken < count:
            for a, b in runs:
                if a == b or taken >= count:
                    continue
                here = int(self.offsets[a])
                # Only as many sentences as are needed: the offsets of a long book are many.
                b = min(b, int(np.searchsorted(self.offsets, here + count - taken)))
                pieces.append(self.ids[here : int(self.offsets[b])])
                borders.append(self.offsets[a + 1 : b + 1] - here + taken)
                taken += int(self.offsets[b]) - here
        positions = np.concatenate(borders)
        positions[-1] = count
        return np.concatenate(pieces)[:count], positions


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, in single spaces; breaks of lines within a paragraph do not matter."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        # Keeps closing quotes with the sentence that they close.
        sentences += [part for part in SENTENCE_END.sub("\\1\n", joined).split("\n") if part]
    return sentences


def sentence_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """What must stand before a sentence tokenized alone so that sentences are joined by a space."""
    for prefix in ("", " "):
        ids = [
            token
            for sentence in ("He went.", "She left.")
            for token in tokenizer(prefix + sentence, add_special_tokens=False)["input_ids"]
        ]
        if "went. she" in tokenizer.decode(ids).lower():
            return prefix
    return " "


def cache_key(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for the tokens of a source, which another tokenizer or changed files alter."""
    path = Path(source)
    if path.is_dir():
        state = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.rglob("*.txt"))]
    elif path.exists():
        state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)]
    else:
        state = [str(source)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    parts = json.dumps([VERSION, str(source), state, vocabulary])
    return hashlib.sha256(parts.encode()).hexdigest()[:20]


def build_cache(source: str | Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Tokenizes all books into a new folder, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder, folder=True) as staging:
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        prefix = sentence_prefix(tokenizer)
        lengths, books, characters = [], [], 0
        with (staging / "ids.raw").open("wb") as raw:
            # Minutes for a library, and only the first time.
            for name, text in tqdm(read_books(source), "tokenize background", unit="book", mininterval=1):
                sentences = [prefix + sentence for sentence in split_sentences(text)]
                first = len(lengths)
                for start in range(0, len(sentences), BATCH):
                    batch = sentences[start : start + BATCH]
                    # No warning about inputs longer than the model's: they are not inputs.
                    encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
                    lengths += [len(ids) for ids in encoded if ids]
                    np.fromiter(chain.from_iterable(encoded), dtype).tofile(raw)
                characters += sum(len(sentence) + (not prefix) for sentence in sentences)
                if len(lengths) > first:
                    books.append((name, first, len(lengths)))
        if not books:
            raise BackgroundError(f"{source} holds no text: .txt files with sentences are expected.")
        ids = np.memmap(staging / "ids.raw", dtype, "r")
        np.save(staging / "ids.npy", ids)
        del ids
        (staging / "ids.raw").unlink()
        np.save(staging / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        (staging / "books.json").write_text(json.dumps({"books": books, "characters": characters}))
        try:
            os.rename(staging, folder)
        except OSError:
            if not folder.is_dir():  # otherwise somebody else was faster, with the same content
                raise


def read_books(source: str | Path) -> Iterator[tuple[str, str]]:
    """Names and texts of the books of a folder, an archive or a Hub dataset."""
    path = Path(source)
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield file.stem, file.read_text(encoding="utf-8", errors="replace")
    elif path.exists():
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(".txt"):
                        yield Path(member.name).stem, archive.extractfile(member).read().decode("utf-8", "replace")
        except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            raise BackgroundError(
                f"{path} cannot be read, the archive is damaged or incomplete: {type(error).__name__}: {error}"
            ) from error
    elif may_be_on_hub(str(source)):
        yield from read_hub_dataset(str(source))
    else:
        raise BackgroundError(f"There is no {source}: a folder or an archive of .txt files is expected there.")


def read_hub_dataset(name: str) -> Iterator[tuple[str, str]]:
    """Rows of a Hub dataset's train split as books, named by the first column of `short_book_title`, `title`, `id`."""
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train", streaming=True)
    except Exception as error:  # whatever the Hub, the network or a dataset's reader raises
        raise BackgroundError(f"{name} is neither a path here nor a dataset that can be loaded: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise BackgroundError(f"The dataset {name} has no column `text`; it has: {', '.join(row)}.")
        title = next((row[key] for key in ("short_book_title", "title", "id") if row.get(key)), number)
        yield str(title), row["text"]
