"""What several test files do with a model."""

import copy
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from families import PAD
from hypothesis import settings
from transformers import PreTrainedModel

from modeling_armt import ARMTCache


def users_environment(**more: str) -> dict[str, str]:
    """The environment of a process as a user would start it, without what conftest.py sets, and with `more`."""
    own = ("ATEN_CPU_CAPABILITY", "TORCHINDUCTOR_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in own} | more


def examples(count: int) -> settings:
    """How many examples a property is tried on. Time per example says nothing: a machine may be busy."""
    return settings(max_examples=count, deadline=None)


def read_in_chunks(
    model: PreTrainedModel,
    ids: torch.Tensor,
    sizes: Sequence[int],
    mask: torch.Tensor | None = None,
    cache: ARMTCache | None = None,
) -> tuple[torch.Tensor, ARMTCache]:
    """Logits of all columns and the final cache of a text that is read in several calls."""
    assert sum(sizes) == ids.shape[1]
    pieces, end = [], 0
    for size in sizes:
        start, end = end, end + size
        seen = None if mask is None else mask[:, :end]
        output = model(ids[:, start:end], attention_mask=seen, cache=cache, use_cache=True)
        cache = output.cache
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), cache


def pad_left(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)` of rows that end in the last column."""
    ids, mask = pad_right([row.flip(0) for row in rows])
    return ids.flip(1), mask.flip(1)


def pad_right(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(ids, mask)` of rows that start in the first column."""
    ids = torch.full((len(rows), max(len(row) for row in rows)), PAD)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; nan if either has one."""
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0


def cache_contents(cache: ARMTCache) -> dict[str, Any]:
    """A deep copy of all that a cache holds, by name."""
    tensors = {"last_hidden": cache.last_hidden}
    for layer, state in cache.states.items():
        if state is not None:
            tensors |= {f"A.{layer}": state.A, f"z.{layer}": state.z}
    for number, layer in enumerate([] if cache.keys is None else cache.keys.layers):
        tensors |= {f"keys.{number}": layer.keys, f"values.{number}": layer.values}
    for layer, statistics in cache.statistics.items():
        tensors |= {f"{name}.{layer}": tensor for name, tensor in statistics._asdict().items()}
    numbers = {name: copy.copy(getattr(cache, name)) for name in ("opened", "segments", "tokens", "columns")}
    return {"tensors": {name: t.clone() for name, t in tensors.items() if t is not None}, **numbers}


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures of plain values and tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# transformers renamed gradient checkpointing on the way, and warns about the old name
_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"


def enable_checkpointing(model: PreTrainedModel, **kwargs):
    """Switches gradient checkpointing on; `kwargs` are those of `torch.utils.checkpoint`."""
    getattr(model, f"{CHECKPOINTING}_enable")(**({f"{CHECKPOINTING}_kwargs": kwargs} if kwargs else {}))


def load_script(name: str) -> ModuleType:
    """A script of `model_cards/` as a module; `name` is its path there."""
    path = Path(__file__).parents[1] / "model_cards" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
