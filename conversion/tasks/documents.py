"""Plain texts from wherever they are: a file, a folder, an archive, a list, or the Hub; and on which side each is."""

import gzip
import hashlib
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset

from ..hub_names import may_be_on_hub
from .streams import SIDES


DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError)


# Of books. The test side is large because the longest contexts are tested, not trained.
SHARES = {"train": 0.6, "validation": 0.1, "test": 0.3}


def side_of_book(name: str) -> str:
    """
    Which side a document is on, in every task and whatever other documents there are: what one task trains on, no
    other one tests on.

    Args:
        name: without folders and `.txt`.
    """
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for side, size in SHARES.items():
        share -= size
        if share < 0:
            return side
    return "test"


def side_of(name: str) -> str:
    """`train` for eight names in ten, `validation` and `test` for one each; always the same for the same name."""
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % 10
    return SIDES[max(0, number - 7)]


class Documents:
    """
    Texts with names.

    Args:
        names: of the texts.
        texts: read when they are asked for, if they come from the Hub.
        lengths: of the texts in characters; counted if not given.
    """

    def __init__(self, names: Sequence[str], texts: Sequence[str], lengths: np.ndarray | None = None):
        self.names, self.texts = names, texts
        self.lengths = np.array([len(text) for text in texts]) if lengths is None else lengths

    def __len__(self) -> int:
        return len(self.names)

    def side(self, side: str) -> "Documents":
        """
        The documents of one side, see [`side_of_book`].

        Where that leaves a side with nothing, because there are few documents, each is cut instead: its first eight
        tenths are for training, the ninth for validation, and the last for testing.
        """
        # Without folders: an archive often has one more around its files than a folder has.
        sides = [side_of_book(name.rsplit("/", 1)[-1].removesuffix(".txt")) for name in self.names]
        if set(sides) == set(SIDES):
            chosen = [i for i, of in enumerate(sides) if of == side]
            return Documents([self.names[i] for i in chosen], _Chosen(self.texts, chosen), self.lengths[chosen])
        begin, end = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}[side]
        texts = [text[_word_start(text, begin) : _word_start(text, end)] for text in self.texts]
        kept = [(name, text) for name, text in zip(self.names, texts, strict=True) if text.strip()]
        if not kept:
            raise ValueError(f"There is not enough text for a part of its own for {side}.")
        return Documents([name for name, _ in kept], [text for _, text in kept])


class _Chosen(Sequence):
    """Some of the texts, without reading them."""

    def __init__(self, texts: Sequence[str], chosen: list[int]):
        self.texts, self.chosen = texts, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> str:
        return self.texts[self.chosen[index]]


def _word_start(text: str, share: float) -> int:
    position = round(share * len(text))
    space = re.compile(r"\s").search(text, position) if 0 < position < len(text) else None
    return space.end() if space else position


def read_documents(
    source: str | Path | Sequence[str], column: str = "text", config: str | None = None, split: str = "train"
) -> Documents:
    """
    Args:
        source: a list of texts; or a UTF-8 text file, a folder or archive (.tar, .tar.xz, .tar.gz, .tgz, .tar.bz2,
            .zip) of *.txt files, each a document; or the id of a data set of the Hub, each row a document.
        column, config, split: of the data set of the Hub.

    Raises:
        FileNotFoundError: if the source is a path where nothing is.
        ValueError: naming the file, if one is damaged, empty or not UTF-8, or if there are no texts.
    """
    if not isinstance(source, (str, Path)):
        names, texts = [f"text {i}" for i in range(len(source))], list(source)
        if not texts:
            raise ValueError("The list of texts is empty.")
        return Documents(names, texts)
    path = Path(source)
    if not path.exists():
        return _from_hub(str(source), column, config, split)
    read = dict(_files(path))
    if not read:
        raise ValueError(f"There are no *.txt files in {path}.")
    texts = {name: _decoded(content, path, name) for name, content in sorted(read.items())}
    return Documents(list(texts), list(texts.values()))


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each text file."""
    if path.is_dir():
        for file in path.rglob("*.txt"):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    name = path.name.lower()
    try:
        if name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith(".txt"):
                        yield member, archive.read(member)
        elif re.search(r"\.(tar|tar\.\w+|tgz|txz|tbz2)$", name):
            with tarfile.open(path) as archive:
                for member in archive:
                    if member.isfile() and member.name.endswith(".txt"):
                        yield member.name, archive.extractfile(member).read()
                # Without compression, an archive cut between two files reads like a shorter one, but for its end mark.
                if name.endswith(".tar") and path.stat().st_size < archive.offset + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("its end is missing")
        else:
            yield path.name, path.read_bytes()
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or incomplete, and cannot be read: {error}") from error


def _decoded(content: bytes, path: Path, name: str) -> str:
    where = path / name if path.is_dir() else path if path.name == name else f"{name} in {path}"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not a UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{where} is empty. If it was unpacked from an archive, unpack that again.")
    return text.replace("\r\n", "\n")


def hub_rows(name: str, config: str | None, split: str) -> Any:
    """
    A split of a data set of the Hub.

    Raises:
        FileNotFoundError: if the name is that of a path, or of nothing that can be loaded.
    """
    if not may_be_on_hub(name) or re.search(r"\.(txt|zip|tar|tgz|txz|tbz2|xz|gz|bz2|jsonl?)$", name.lower()):
        raise FileNotFoundError(f"There is no file or folder {name}.")
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # connection, credentials, formats: whatever the loader meets
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor a data set of the Hub that can be loaded: {error}"
        ) from error


def _from_hub(name: str, column: str, config: str | None, split: str) -> Documents:
    rows = hub_rows(name, config, split)
    if column not in rows.column_names:
        raise ValueError(f"{name} has no column {column!r}; it has: {', '.join(rows.column_names)}.")
    import pyarrow.compute

    lengths = pyarrow.compute.utf8_length(rows.data.column(column)).fill_null(0).to_numpy()
    return Documents([f"{name} {i}" for i in range(len(rows))], rows[column], lengths)
