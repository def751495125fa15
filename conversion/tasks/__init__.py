"""Tasks to train and evaluate on, by name."""

import importlib
import inspect
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from .task import Task


# Imported when asked for, as "module:class".
TASKS = {
    "associative_retrieval": "associative_retrieval:AssociativeRetrieval",
    "babilong": "babilong:Babilong",
    "chat": "chat:Chat",
    "needle": "needle:Needle",
    "passkey": "passkey:Passkey",
    "text": "text:Text",
}

TYPES = {int: "a whole number", str: "a text", bool: "true or false", NoneType: "nothing"}


def task_class(name: str) -> type[Task]:
    """
    The class of a task.

    Raises:
        ValueError: if there is no task of this name; with those that there are.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; it must be one of: {', '.join(TASKS)}.")
    module, class_name = TASKS[name].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), class_name)


def load_task(name: str, **options: Any) -> Task:
    """
    A task with its options.

    Args:
        name: one of `TASKS`.
        options: of the task's class.

    Raises:
        ValueError: if there is no task of this name, or it has no such option, or needs another one; with those that
            there are. Also for an option of another type.
    """
    task = task_class(name)
    parameters = inspect.signature(task).parameters
    unknown = [option for option in options if option not in parameters]
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if unknown or missing:
        problem = f"has no option {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
        raise ValueError(f"The task {name!r} {problem}; its options are: {', '.join(parameters)}.")
    hints = get_type_hints(task.__init__)
    for option, value in options.items():
        kinds = tuple(get_origin(kind) or kind for kind in get_args(hints[option]) or (hints[option],))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(TYPES.get(kind, kind.__name__) for kind in kinds if kind is not Path)
            raise ValueError(f"The option {option} of the task {name!r} is {value!r}; it must be {expected}.")
    return task(**options)


__all__ = ["TASKS", "Task", "load_task", "task_class"]
