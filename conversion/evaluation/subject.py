"""A checkpoint under evaluation: the model with what a test needs to know of it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from ..checkpoints import armt_model, load_checkpoint
from ..tasks import Task
from .answering import Model


@dataclass
class Subject:
    """
    Attributes:
        name: of its folder.
        model, tokenizer: see [`load_checkpoint`].
        weights: hash of the weights, which tells another checkpoint of the same name apart; None for one of the Hub.
        training: content of its `training.json`; empty if it has none.
        stop_ids: ids that end an answer.
    """

    name: str
    model: Model
    tokenizer: PreTrainedTokenizerBase | None
    weights: str | None
    training: dict[str, Any]
    stop_ids: frozenset[int]

    @property
    def segment_size(self) -> int:
        return armt_model(self.model).config.segment_size

    @property
    def context(self) -> int:
        """Tokens that the backbone takes at most; 2,048 if it does not say."""
        return getattr(armt_model(self.model).config.text_config, "max_position_embeddings", None) or 2048


def load_subject(path: str | Path, name: str, dtype: str, device: str | None, compiled: bool) -> Subject:
    """
    Loads a checkpoint.

    Raises:
        ValueError, FileNotFoundError: see [`load_checkpoint`]; `ValueError` if its `training.json` is damaged.
    """
    model, tokenizer = load_checkpoint(path, dtype, device)
    compute_as_backbone(model)
    if compiled:
        armt_model(model).compile_armt()
    stop_ids = set()
    if tokenizer is not None:
        configured = armt_model(model).generation_config.eos_token_id  # of chat models a list
        stop_ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    return Subject(name, model, tokenizer, hash_weights(path), read_training(path), frozenset(stop_ids))


def compute_as_backbone(model: Model) -> None:
    """
    Puts the weights of LoRA into the dtype of the layers that they are on, as the autocast of training does. In
    float32, as PEFT loads them, every layer copies its input and its output to add them.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = getattr(module.get_base_layer(), "weight", None)  # some quantized layers have none
            if weight is not None and weight.is_floating_point():
                module.lora_A.to(weight.dtype)
                module.lora_B.to(weight.dtype)


def check_fits(subject: Subject, task: Task) -> None:
    """
    Raises:
        ValueError: if the model has too small a vocabulary for a task of symbols.
    """
    needed, has = getattr(task, "vocab_size", 0), armt_model(subject.model).num_embeddings
    if has < needed:
        raise ValueError(f"{subject.name} has {has} tokens, but {task.name} uses ids up to {needed - 1}.")


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """
    The names of folders, with as many of the folders around them as it takes to tell them apart.

    Raises:
        ValueError: if one comes twice.
    """
    parts = [Path(path).resolve().parts if Path(path).exists() else Path(path).parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError("a checkpoint is named twice.")
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def hash_weights(path: str | Path) -> str | None:
    """A hash of the weights in a folder; None if there is no such folder."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def read_training(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint's `training.json`."""
    file = Path(path) / "training.json"
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return content if isinstance(content, dict) else {}


def peak_gib(device: torch.device) -> float:
    """The most memory held since [`reset_peak`] on a GPU, and by the whole process so far on a CPU, in GiB."""
    from ..generate import peak_resident_memory

    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_memory()
    return used / 2**30


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
