"""Options of tasks as the command line has them."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from . import load_task, task_class
from .task import Task


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """
    `["key_size=3", "rewrite=true", "source=book.txt"]` as options of a task: numbers, `true` and `false`, or text.

    Raises:
        ValueError: for a pair without `=`, or a name that comes twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"the task option {pair!r} is not NAME=VALUE.")
        if name in options:
            raise ValueError(f"the task option {name} is given twice.")
        options[name] = _value(text)
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def task_for(name: str, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Task:
    """
    A task for a model.

    Args:
        name, options: as for [`load_task`]; `cache` may be left out, and is then in the cache of the Hub's libraries.
        tokenizer: of the model, None if it has none.

    Raises:
        ValueError: if the task needs a tokenizer and there is none; see [`load_task`].
    """
    parameters = inspect.signature(task_class(name)).parameters
    options = dict(options)
    if "cache" in parameters:
        options.setdefault("cache", str(Path(constants.HF_HOME) / "armt"))
    if "tokenizer" in parameters:
        if tokenizer is None:
            raise ValueError(
                f"the task {name} is in text, but the checkpoint has no tokenizer. Put one into its folder."
            )
        options["tokenizer"] = tokenizer
    return load_task(name, **options)
