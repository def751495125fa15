"""What a folder to be published holds: a full checkpoint or an adapter, complete or with what it lacks."""

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_import_files

from ...configuration_armt import ARMTConfig
from ...modeling_armt import ARMTForCausalLM


WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
PAGE = "inspect.html"
RECORDS = ("results.json", "training.json", "recipe.yaml", "*.png", PAGE)
TERMS = ("LICENSE*", "NOTICE*")
TASKS_OF_SYMBOLS = ("associative_retrieval",)
# What `publish` writes and may therefore replace or remove in a repository.
PUBLISHED = (
    *WEIGHTS, *ADAPTER, *TOKENIZER, *RECORDS, "*.py", "config.json", "generation_config.json", "README.md",
    ".eval_results/*.yaml",
)  # fmt: skip


class FolderError(ValueError):
    """A folder that cannot be published, with the reason and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """
    A complete folder.

    Attributes:
        folder: where it is.
        config: of the model; for an adapter, of its base.
        adapter: the adapter's configuration, None for a full checkpoint.
        files: paths within the folder of what is published of it, README.md and results aside.
        left: paths of what stays here.
        tokenizer: whether there is one; models of symbols have none.
    """

    folder: Path
    config: ARMTConfig
    adapter: PeftConfig | None
    files: list[str]
    left: list[str]
    tokenizer: bool

    def record(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, None if it is not there."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None


def inspect_folder(folder: str | Path) -> Checkpoint:
    """
    Finds out what is in a folder.

    Raises:
        FolderError: if it is incomplete, mixes an adapter with a model, is an adapter whose base is not ARMT, or was
            written by a newer version of the package.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"there is no folder {folder}.")
    present = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    adapter_files = [name for name in present if fnmatch(name, "adapter_*") and "/" not in name]
    if "config.json" in present and adapter_files:
        raise FolderError(
            f"{folder} has an adapter ({', '.join(adapter_files)}) beside a full checkpoint: whoever loads it gets "
            "the adapter's base instead. Move the adapter into a folder of its own."
        )
    wanted = [*TOKENIZER, *RECORDS, *TERMS]
    if "adapter_config.json" in present:
        adapter, config = _read_adapter(folder)
        wanted += ADAPTER
        missing = [name for name in ADAPTER if name not in present]
    elif "config.json" in present:
        adapter, config = None, read_config(folder)
        code = _code_files(folder, config)
        wanted += [*WEIGHTS, *code, "config.json", "generation_config.json"]
        missing = [*_missing_weights(folder, present)]
        missing += [name for name in (*code, "generation_config.json") if name not in present]
    else:
        raise FolderError(f"{folder} has neither a config.json nor an adapter_config.json: it is not a checkpoint.")
    if missing:
        raise FolderError(
            f"{folder} is incomplete: {', '.join(missing)} missing. Save the model into it again with "
            "save_pretrained, which writes weights, code and configurations."
        )
    _check_safetensors(folder, present)
    if adapter is None:
        _check_weights(folder, config, present)
    if not _has_tokenizer(present) and not _reads_symbols(folder):
        raise FolderError(
            f"{folder} has no tokenizer, without which nobody can use the model. Save the backbone's into it: "
            "tokenizer.save_pretrained"
        )
    files = [name for name in present if any(_matches(name, pattern) for pattern in wanted)]
    left = sorted({*present} - {*files, "README.md"})
    return Checkpoint(folder, config, adapter, files, left, _has_tokenizer(present))


def published(name: str) -> bool:
    """Whether a path in a repository is of a kind that `publish` writes."""
    return any(_matches(name, pattern) for pattern in PUBLISHED)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        FolderError: naming the file if it is not JSON, or no mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise FolderError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise FolderError(f"{path} holds no fields, but {type(content).__name__}.")
    return content


def _has_tokenizer(files: list[str]) -> bool:
    return any(_matches(name, pattern) for name in files for pattern in ("tokenizer*", "vocab*", "*.model"))


def _reads_symbols(folder: Path) -> bool:
    """Whether the model was trained on a task without text."""
    path = folder / "training.json"
    recipe = read_json(path).get("recipe") if path.is_file() else None
    return isinstance(recipe, dict) and recipe.get("task") in TASKS_OF_SYMBOLS


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def read_config(folder: Path) -> ARMTConfig:
    """The configuration of a full checkpoint. Raises FolderError for one that is not ARMT, or cannot be."""
    fields = read_json(folder / "config.json")
    if fields.get("model_type") != ARMTConfig.model_type:
        raise FolderError(
            f"{folder} is a plain {fields.get('model_type')} model, not an ARMT checkpoint. Convert it first: "
            "armt convert"
        )
    try:
        return ARMTConfig.from_dict(fields)
    except (ValueError, TypeError) as error:
        raise FolderError(f"{folder}/config.json: {error}") from error


def _read_adapter(folder: Path) -> tuple[PeftConfig, ARMTConfig]:
    try:
        adapter = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises whatever an unknown or damaged configuration leads to
        raise FolderError(f"{folder}/adapter_config.json cannot be read: {error}") from error
    base = adapter.base_model_name_or_path
    if not base:
        raise FolderError(f"{folder}/adapter_config.json names no base model.")
    try:
        config = AutoConfig.from_pretrained(base, revision=adapter.revision)
    except Exception as error:  # as above
        raise FolderError(f"{base}, the base of the adapter {folder}, cannot be loaded: {error}") from error
    if not isinstance(config, ARMTConfig):
        raise FolderError(
            f"{folder} is an adapter on {base}, a plain {config.model_type} model: whoever loads it gets that model, "
            "without memory. Train the adapter on an ARMT checkpoint: armt convert"
        )
    return adapter, config


def _code_files(folder: Path, config: ARMTConfig) -> list[str]:
    """The Python files that `auto_map` names and what they import."""
    auto_map = getattr(config, "auto_map", None) or {}
    if not {"AutoConfig", "AutoModelForCausalLM"} <= auto_map.keys():
        raise FolderError(
            f"{folder}/config.json has no auto_map, so nobody could load the model without this package. Save the "
            "model with save_pretrained."
        )
    names = sorted({f"{reference.split('.')[0]}.py" for reference in auto_map.values()})
    for name in list(names):
        try:
            names += [Path(path).name for path in get_relative_import_files(folder / name)]
        except FileNotFoundError as error:
            names.append(Path(error.filename).name)
    return sorted(set(names))


def _missing_weights(folder: Path, present: list[str]) -> list[str]:
    if "model.safetensors" in present:
        return []
    if "model.safetensors.index.json" not in present:
        return ["model.safetensors"]
    shards = read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values()
    return sorted({*shards} - {*present})


def _check_weights(folder: Path, config: ARMTConfig, present: list[str]) -> None:
    """What is not in the files would be made up by whoever loads them. Quantized weights have names of their own."""
    if getattr(config, "quantization_config", None) is not None:
        return
    with torch.device("meta"):
        model = ARMTForCausalLM(config)
    wanted, found = {*model.state_dict()} - {*model.all_tied_weights_keys}, set()
    for name in present:
        if any(_matches(name, pattern) for pattern in WEIGHTS) and name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                found.update(file.keys())
    missing = sorted(wanted - found)
    if missing:
        raise FolderError(f"{folder} lacks {len(missing)} of its weights: {', '.join(missing[:3])}.")


def _check_safetensors(folder: Path, present: list[str]) -> None:
    """A file that was cut off is found by its header, without reading the tensors."""
    for name in present:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise FolderError(f"{folder / name} is damaged: {error}") from error
