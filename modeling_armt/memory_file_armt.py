"""Memory on disk: an [`ARMTCache`] as a safetensors file that knows which model it belongs to."""

import hashlib
import json
import os
import secrets
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import safe_open, safe_save_file

from .cache_armt import ARMTCache, SegmentKeys
from .memory_armt import MemoryState
from .statistics_armt import LayerStatistics


FORMAT_VERSION = "2"
READABLE_VERSIONS = ("1", "2")  # 1 had other statistics
_TRAINING_ONLY = ("drop", "initializer", "coef")
_CHUNK = 1 << 24  # elements checksummed at once, to bound the memory it takes


def _checksum(tensor: torch.Tensor) -> list[int]:
    """Two sums over a tensor's bits, the second weighted by position; the same for a model loaded in bfloat16."""
    bits = tensor.detach().to(torch.bfloat16).view(torch.int16) if tensor.is_floating_point() else tensor.detach()
    sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for chunk in bits.reshape(-1).split(_CHUNK):
        values = chunk.to(torch.int64)
        weights = torch.arange(1, len(values) + 1, device=values.device) % 65521
        sums = sums * 31 + torch.stack([values.sum(), (values * weights).sum()])
    return sums.tolist()


def _offloaded_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that accelerate keeps in CPU memory or on disk; loaded when looked at."""
    tensors = {}
    for prefix, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            weights = getattr(part, "weights_map", None)
            if weights is not None:
                names = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
                tensors |= {f"{prefix}.{name}": weights[name] for name in names if "." not in name}
    return tensors


def model_identity(model: nn.Module) -> str:
    """
    A fingerprint of weights and memory: equal for two loads of one checkpoint, wherever its weights are and also when
    float32 weights were loaded in bfloat16 (not in float16); different after any training step.
    """
    backbone = model.config.text_config
    # Of the backbone's configuration the numbers that its layers compute with: norms, scales, softcaps.
    numbers = {name: value for name, value in backbone.to_dict().items() if type(value) is float}
    numbers = {name: value for name, value in numbers.items() if not any(part in name for part in _TRAINING_ONLY)}
    fields = {"backbone": backbone.model_type, **numbers, **model.config.memory_fields}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in model.named_buffers():  # rotary frequencies are not in the state dict
        if name.endswith(".inv_freq"):
            digest.update(json.dumps([name, _checksum(tensor)]).encode())
    offloaded = _offloaded_tensors(model)
    for name, tensor in sorted(model.state_dict().items()):
        tensor = offloaded[name] if tensor.is_meta else tensor
        digest.update(json.dumps([name, list(tensor.shape), _checksum(tensor)]).encode())
    return digest.hexdigest()


def save_memory(model: PreTrainedModel, cache: ARMTCache, path: str | os.PathLike) -> None:
    """Writes `cache` to `path`; a failure leaves what was there before."""
    if not isinstance(cache, ARMTCache) or cache.batch_size < 1:
        raise ValueError(
            "there is no memory to save: pass the cache that a forward or generate of this model returned, "
            f"not {type(cache).__name__}."
        )
    tensors = {"last_hidden": cache.last_hidden}
    for layer, state in cache.states.items():
        if state is not None:
            tensors[f"states.{layer}.A"] = state.A
            tensors |= {} if state.z is None else {f"states.{layer}.z": state.z}
    for layer, statistics in cache.statistics.items():
        tensors |= {f"statistics.{layer}.{name}": value for name, value in statistics.columns().items()}
    for layer, keys in enumerate([] if cache.keys is None else cache.keys.layers):
        tensors |= {f"keys.{layer}.keys": keys.keys, f"keys.{layer}.values": keys.values}
    rows = {"opened": cache.opened, "segments": cache.segments, "tokens": cache.tokens}
    metadata = {"format": "armt-memory", "version": FORMAT_VERSION, "model": model_identity(model)}
    metadata["rows"] = json.dumps(rows)

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode  # the usual one; safetensors makes files for one user only
    try:
        safe_save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_memory(model: PreTrainedModel, path: str | os.PathLike) -> ARMTCache:
    """Reads what [`save_memory`] wrote, as the start of a new conversation: its length is 0."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no memory file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned, so that they are aligned like live ones: kernels round differently otherwise.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (
        Exception
    ) as error:  # safetensors raises its own type, which the files shipped with a checkpoint don't import
        raise ValueError(f"{path} is truncated or not a memory file: {error}") from error
    if metadata.get("format") != "armt-memory":
        raise ValueError(f"{path} is a safetensors file, but not a memory written by save_memory.")
    if metadata["version"] not in READABLE_VERSIONS:
        raise ValueError(
            f"{path} has memory format {metadata['version']}, this code reads {' and '.join(READABLE_VERSIONS)}; "
            "read the text again, or use the package version that wrote the file."
        )
    if metadata["model"] != model_identity(model):
        raise ValueError(
            f"{path} belongs to another model: its configuration or weights differ from this one's. A memory only "
            "means something to the model that wrote it; load that model, or read the text again."
        )
    cache = ARMTCache()
    for name, value in json.loads(metadata["rows"]).items():
        setattr(cache, name, value)
    devices = model.layer_devices()
    memories = {int(layer): memory for layer, memory in model.memory.items()}
    cache.last_hidden = tensors.pop("last_hidden").to(model.device, model.dtype)
    cache.states = dict.fromkeys(model.config.memory_layer_indices)
    for name, tensor in tensors.items():
        kind, layer, field = name.split(".")
        layer = int(layer)
        if kind in ("states", "statistics"):
            place = (memories[layer].device or devices[layer], memories[layer].state_dtype)
        if kind == "states" and field == "A":
            z = tensors.get(f"states.{layer}.z")
            cache.states[layer] = MemoryState(tensor, z).map(lambda t, place=place: t.to(*place))
        elif kind == "statistics":
            if field in ("gamma_sum", "gamma_count"):  # version 1 counted memory tokens
                field = {"gamma_sum": "gamma", "gamma_count": "writes"}[field]
                tensor = tensor / model.config.num_mem_tokens
            if layer not in cache.statistics:
                cache.statistics[layer] = LayerStatistics.new(len(tensor), memories[layer].zero_state(0, place[0]).A)
            cache.statistics[layer].set_column(field, tensor)
    num_key_layers = sum(name.startswith("keys.") for name in tensors) // 2
    if num_key_layers:
        cache.keys = SegmentKeys()
        for layer in range(num_key_layers):
            entry = DynamicLayer()
            keys, values = (
                tensors[f"keys.{layer}.{kind}"].to(devices[layer], model.dtype) for kind in ("keys", "values")
            )
            entry.lazy_initialization(keys, values)
            entry.keys, entry.values = keys, values
            cache.keys.layers.append(entry)
    return cache
