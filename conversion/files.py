"""Files and folders that are the old or the new one at any time."""

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows, where nothing tells what a killed run left from what a living one needs
    fcntl = None


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name beside it, and renames it when it is whole."""
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


@contextmanager
def staged(path: Path, folder: bool = False) -> Iterator[Path]:
    """
    A new file, or folder, of a hidden name beside `path`, to be filled and then renamed. If it is still there at the
    end it is removed, and so is, at the beginning, what killed runs left beside the same path.
    """
    prefix = f".{path.name}.armt-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*") if fcntl else ():
        with suppress(OSError), locked(left, fcntl.LOCK_NB):  # a run that lives holds its lock
            remove(left)
    temporary = path.with_name(prefix + secrets.token_hex(4))
    temporary.mkdir() if folder else temporary.touch(exist_ok=False)
    try:
        with locked(temporary):
            yield temporary
    finally:
        remove(temporary)


@contextmanager
def locked(path: Path, how: int = 0) -> Iterator[None]:
    """Holds the lock of a file or folder, which ends with the process. Raises OSError if it cannot be had."""
    if fcntl is None:
        yield
        return
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(lock)


def remove(path: Path) -> None:
    """Removes a file, or a folder as far as that can be done."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """
    A folder that appears as a whole or not at all: yields a temporary one beside `out` and renames it at the end.

    Raises:
        FileExistsError: if `out` is a file, or a folder with something in it.
    """
    out = Path(out).resolve()
    if out == Path.cwd():
        raise FileExistsError(f"{out} is the current folder, which cannot be replaced; name a folder to be made.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(
            f"{out} exists and is not empty; nothing was changed. Name another folder, or remove it."
        )
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with staged(out, folder=True) as folder:
            yield folder
            if out.is_dir():
                out.rmdir()
            folder.rename(out)
            made = []
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
