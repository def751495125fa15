"""Weights in files of a size that uploads, resumes and caches like."""

import json
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file


MOST_BYTES = 5 * 10**9
WEIGHTS = "model.safetensors"


def shard(source: Path, folder: Path, most_bytes: int = MOST_BYTES) -> list[str]:
    """
    Splits a safetensors file into shards with an index, holding one shard in memory at a time.

    Args:
        source: the file.
        folder: where the shards and `model.safetensors.index.json` are written.
        most_bytes: of a shard; a tensor that is larger gets a shard of its own.

    Returns:
        The names of the files written.
    """
    with safe_open(source, framework="pt") as tensors:
        # Sizes come from the header; a slice knows its shape and dtype without being read.
        sizes = {name: _bytes(tensors.get_slice(name)) for name in tensors.keys()}  # noqa: SIM118 (no dict)
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            get_storage_id=lambda size: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=most_bytes,
        )
        for file, names in split.filename_to_tensors.items():
            save_file({name: tensors.get_tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*split.filename_to_tensors, f"{WEIGHTS}.index.json"]


def _bytes(tensor) -> int:
    kind = tensor.get_dtype()
    bits = int("".join(c for c in kind.split("_")[0] if c.isdigit()) or 8)  # BOOL has none
    size = bits // 8
    for length in tensor.get_shape():
        size *= length
    return size
