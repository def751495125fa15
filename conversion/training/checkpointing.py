"""The folder of an unfinished run: its recipe, and the checkpoints that the Trainer writes."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def partial_folder(out: Path) -> Path:
    """Where a run keeps what it needs to be resumed, beside the folder that it will write."""
    return out.with_name(f"{out.name}.partial")


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint with the Trainer's state in it; None if there is none."""
    for checkpoint in reversed(checkpoints(folder)):
        state = trainer_state(checkpoint)
        if state is not None:
            return checkpoint, state
    return None


def remove_incomplete(folder: Path) -> list[Path]:
    """Removes checkpoints that were not written to their end, and returns which they were."""
    incomplete = [checkpoint for checkpoint in checkpoints(folder) if trainer_state(checkpoint) is None]
    for checkpoint in incomplete:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return incomplete


def checkpoints(folder: Path) -> list[Path]:
    """Whole or not, in the order of their steps."""
    found = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.iterdir() if path.is_dir()}
    return sorted((path for path, step in found.items() if step.isdigit()), key=lambda path: int(found[path]))


def trainer_state(checkpoint: Path) -> dict[str, Any] | None:
    """What the Trainer writes last: without it the checkpoint is not whole."""
    try:
        return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
