"""Files that are the old or the new one at any time."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name beside it, and renames it when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
