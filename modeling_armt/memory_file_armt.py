"""Memory on disk: an [`ARMTCache`] as a safetensors file that knows which model it belongs to and what was saved."""

import hashlib
import itertools
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import safe_open, safe_save_file
from transformers.utils import logging

from .cache_armt import ARMTCache
from .memory_armt import MemoryState
from .statistics_armt import LayerStatistics


logger = logging.get_logger(__name__)

FORMAT_VERSION = "3"
METADATA = ("format", "version", "model", "rows")  # and the digest, from version 3 on
ROWS = ("opened", "segments", "tokens")
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


_identities: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def _traces(model: nn.Module) -> list[tuple] | None:
    """
    What no change of the weights leaves as it was, in a hundredth of the time that the checksums take: versions, and
    sums of the bits for what changes without one (`tensor.data`). None where weights are not plain tensors here.
    """
    traces = []
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or tensor.is_inference():
            return None
        bits = tensor.detach().reshape(-1)
        whole = tensor.nbytes % 8 == 0 and tensor.storage_offset() * tensor.itemsize % 8 == 0
        words = torch.int64 if whole else (torch.int8, torch.int16, torch.int32)[tensor.itemsize.bit_length() - 1]
        total = int(bits.view(words).sum(dtype=torch.int64))
        traces.append((name, tensor.data_ptr(), tensor.shape, tensor.dtype, tensor._version, total))
    return traces


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
    for later in ("memory_norm", "spread_memory_tokens"):  # models before them had no such fields
        if not fields[later]:
            del fields[later]
    traces = _traces(model)
    if traces is not None and _identities.get(model, (None, ""))[0] == (fields, traces):
        return _identities[model][1]
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in model.named_buffers():  # rotary frequencies are not in the state dict
        if name.endswith(".inv_freq"):
            digest.update(json.dumps([name, _checksum(tensor)]).encode())
    offloaded = _offloaded_tensors(model)
    for name, tensor in sorted(model.state_dict().items()):
        tensor = offloaded[name] if tensor.is_meta else tensor
        digest.update(json.dumps([name, list(tensor.shape), _checksum(tensor)]).encode())
    _identities[model] = (fields, traces), digest.hexdigest()
    return digest.hexdigest()


def _tensors(cache: ARMTCache) -> dict[str, torch.Tensor]:
    """All tensors of a memory, by their names in a file."""
    tensors = {"last_hidden": cache.last_hidden}
    for layer, state in cache.states.items():
        if state is not None:
            tensors[f"states.{layer}.A"] = state.A
            tensors |= {} if state.z is None else {f"states.{layer}.z": state.z}
    for layer, statistics in cache.statistics.items():
        tensors |= {f"statistics.{layer}.{name}": value for name, value in statistics.columns().items()}
    for layer, keys in enumerate([] if cache.keys is None else cache.keys.layers):
        tensors |= {f"keys.{layer}.keys": keys.keys, f"keys.{layer}.values": keys.values}
    return tensors


def _not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of a tensor with values that no memory has. Statistics are infinite for what was not met yet."""
    for name, tensor in tensors.items():
        if tensor.isnan().any() or (tensor.isinf().any() and not name.startswith("statistics.")):
            return name
    return None


def _digest(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all that a file says but this."""
    digest = hashlib.sha256(json.dumps([metadata[name] for name in METADATA]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # Squeezed, since a dimension of 1 may have any stride and views as bytes must not.
        digest.update(tensor.squeeze().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_memory(model: PreTrainedModel, cache: ARMTCache, path: str | os.PathLike) -> None:
    """Writes `cache` to `path`; a failure leaves what was there before, and a file that was there keeps its mode."""
    if not isinstance(cache, ARMTCache) or cache.batch_size < 1:
        raise ValueError(
            "there is no memory to save: pass the cache that a forward or generate of this model returned, "
            f"not {type(cache).__name__}."
        )
    cache = cache.fork()  # all of one moment
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(cache).items()}
    if name := _not_finite(tensors):
        raise ValueError(
            f"there is no memory to save: {name} has values that are not finite. cache.stats() says more."
        )
    metadata = {"format": "armt-memory", "version": FORMAT_VERSION, "model": model_identity(model)}
    metadata["rows"] = json.dumps({name: getattr(cache, name) for name in ROWS})
    metadata["digest"] = _digest(metadata, tensors)

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        # That of the file, or the usual one: safetensors makes files for one user only.
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        temporary.chmod(0o600)
        safe_save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_memory(model: PreTrainedModel, path: str | os.PathLike) -> ARMTCache:
    """
    Reads what [`save_memory`] wrote, as the start of a new conversation: its length is 0.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for anything but a memory of this model as it was saved.
    """
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
    version = metadata.get("version")
    if version not in ("2", FORMAT_VERSION):
        raise ValueError(
            f"{path} has memory format {version}, this code reads 2 and {FORMAT_VERSION}; read the text again, or use "
            "the package version that wrote the file."
        )
    if set(metadata) != {*METADATA, *(["digest"] if version == FORMAT_VERSION else [])}:
        raise ValueError(f"{path} is damaged: its metadata are {', '.join(sorted(metadata))}.")
    if version == FORMAT_VERSION and metadata["digest"] != _digest(metadata, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match its digest. Read the text again.")
    if metadata["model"] != model_identity(model):
        raise ValueError(
            f"{path} belongs to another model: its configuration or weights differ from this one's. A memory only "
            "means something to the model that wrote it; load that model, or read the text again."
        )
    try:
        rows = _checked_rows(metadata["rows"], model.config.segment_size)
        cache = _like(model, rows, {name.partition(".")[0] for name in tensors})
        _check_tensors(tensors, _tensors(cache))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Read the text again.") from error
    if version != FORMAT_VERSION:
        logger.warning(
            f"{path} has memory format {version}, which has no digest: damaged values would not be noticed. Save it "
            "again to give it one."
        )
    return _fill(model, cache, tensors)


def _checked_rows(text: str, segment_size: int) -> dict[str, list[int]]:
    """Tokens in the open segment, segments written and tokens read of every row; a ValueError for what is not that."""
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise ValueError("its rows are no JSON of a memory") from error
    if not isinstance(rows, dict) or set(rows) != set(ROWS):
        raise ValueError(f"its rows do not have {', '.join(ROWS)}, and nothing else")
    if not all(isinstance(counts, list) and all(type(n) is int for n in counts) for counts in rows.values()):
        raise ValueError("its rows are not lists of integers")
    if len({len(counts) for counts in rows.values()}) != 1 or not rows["tokens"]:
        raise ValueError("its rows are not equally many of each kind")
    for row, (opened, segments, tokens) in enumerate(zip(*(rows[name] for name in ROWS), strict=True)):
        least, most = segments + opened, segments * segment_size + opened  # a segment may be closed early
        if not (0 <= opened < segment_size and segments >= 0 and least <= tokens <= most and tokens < 2**63):
            raise ValueError(
                f"row {row} has {tokens} tokens in {segments} segments and {opened} tokens in an open one, which "
                f"segments of {segment_size} do not allow"
            )
    return rows


@torch.no_grad()
def _like(model: PreTrainedModel, rows: dict[str, list[int]], kinds: set[str]) -> ARMTCache:
    """A memory with the tensors that one with these rows must have, in shape; what a first token leaves tells it."""
    cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True, return_dict=True).cache
    batch_size, length = len(rows["tokens"]), max(rows["opened"])
    cache.last_hidden = cache.last_hidden.expand(batch_size, -1)
    cache.keys = cache.keys.map(lambda states: states.expand(batch_size, -1, length, -1)) if length else None
    written = any(rows["segments"]) or "states" in kinds
    empty = {int(layer): memory.zero_state(batch_size, "meta") for layer, memory in model.memory.items()}
    cache.states = empty if written else dict.fromkeys(empty)
    with_statistics = written and "statistics" in kinds
    cache.statistics = {n: LayerStatistics.new(batch_size, s.A) for n, s in empty.items() if with_statistics}
    cache.columns = 0
    for name in ROWS:
        setattr(cache, name, rows[name])
    return cache


def _check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if set(tensors) != set(expected):
        missing, unknown = (sorted(a - b) for a, b in itertools.permutations((set(expected), set(tensors))))
        raise ValueError(f"it lacks the tensors {missing} and has {unknown}")
    for name, tensor in tensors.items():
        kept_exactly = name.startswith(("states.", "statistics."))
        dtypes = (torch.float32, torch.float64, *(() if kept_exactly else (torch.bfloat16, torch.float16)))
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} is {tensor.dtype}")
    if name := _not_finite(tensors):
        raise ValueError(f"{name} has values that are not finite")


def _fill(model: PreTrainedModel, cache: ARMTCache, tensors: dict[str, torch.Tensor]) -> ARMTCache:
    """Puts the tensors of a file into a memory that has their shapes, on the devices where the model works on them."""
    devices = model.layer_devices()
    cache.last_hidden = tensors["last_hidden"].to(cache.last_hidden)
    for layer, state in cache.states.items():
        memory = model.memory[str(layer)]
        device = memory.device or devices[layer]
        if state is not None:
            state = MemoryState(tensors[f"states.{layer}.A"], tensors.get(f"states.{layer}.z"))
            cache.states[layer] = state.map(lambda t, memory=memory, device=device: t.to(device, memory.state_dtype))
        if layer in cache.statistics:
            statistics = LayerStatistics.new(cache.batch_size, cache.states[layer].A)
            for name in statistics.columns():
                statistics.set_column(name, tensors[f"statistics.{layer}.{name}"])
            cache.statistics[layer] = statistics
    for layer, keys in enumerate([] if cache.keys is None else cache.keys.layers):
        keys.keys = tensors[f"keys.{layer}.keys"].to(keys.keys)
        keys.values = tensors[f"keys.{layer}.values"].to(keys.values)
    return cache
