"""Which code a checkpoint came with. Where the package is installed its own code runs them all, and says so here."""

import hashlib
import os
import warnings
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files


ENTRY = "modeling_armt.py"
HERE = Path(__file__).parent


def code_files(folder: str | os.PathLike = HERE) -> list[Path]:
    """
    The code in a folder, as far as the model's file needs it: sorted, and empty where there is none. By default this.

    Raises:
        FileNotFoundError: naming a file that is missing.
    """
    entry = Path(folder) / ENTRY
    return sorted({entry, *map(Path, get_relative_import_files(entry))}) if entry.is_file() else []


def code_version(folder: str | os.PathLike = HERE) -> str:
    """12 digits that are the same for the same code; for a folder that lacks files of it, which ones."""
    digest = hashlib.sha256()
    try:
        for path in code_files(folder):
            digest.update(f"{path.name}\n{path.read_text(encoding='utf-8')}\n".encode())
    except FileNotFoundError as error:
        return f"without {Path(error.filename).name}"
    return digest.hexdigest()[:12]


def warn_of_other_code(source: str | os.PathLike | None, config: PreTrainedConfig) -> None:
    """
    Warns if this is the installed package and the checkpoint came with another version of the code.

    Args:
        source: the checkpoint's folder, whose files count, or Hub id, where what `config` says counts; None for none.
        config: the checkpoint's.
    """
    if source is None or __name__.startswith("transformers_modules."):  # no checkpoint, or its own code
        return
    ours, theirs = code_version(), config.code_version or "an older one"
    if os.path.isdir(source):
        if not (Path(source) / ENTRY).is_file():
            return
        theirs = code_version(source)
    if theirs != ours:
        warnings.warn(
            f"{source} came with another version of the code ({theirs}) than that of the installed package ({ours}), "
            f"which runs it now; results may differ. To put this version into the checkpoint: armt refresh {source}",
            stacklevel=3,
        )
