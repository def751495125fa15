"""
Import of checkpoints that the authors of ARMT published, or that their code writes.

Three layouts, told apart by what stands in front of the memory tokens and of the backbone's parameters:

    memory_cell.memory        memory_cell.model.*         the training scripts; one file, no config.json
    armt.memory_cell.memory   armt.memory_cell.model.*    the first Hugging Face model
    memory                    model.*                     the later ones, with a config.json

A layer with memory holds `W_mq`, `W_mk`, `W_mv`, `W_mb` and, after `.layer.`, the backbone's own parameters. In the
first two layouts it has the alias `memory_cell.layers.{i}`; a file has the names, the aliases, or both.
"""

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..attachment_armt import find_decoder_layers
from ..configuration_armt import VARIANTS, ARMTConfig
from ..modeling_armt import ARMTForCausalLM
from .convert import copy_text_files
from .files import staged_folder
from .hub_names import check_exists
from .provenance import describe_backbone


# The key map of a layer's memory. All other parameters have the backbone's own names.
MEMORY_KEYS = {
    "W_mq.weight": "memory_query.weight",
    "W_mk.weight": "memory_key.weight",
    "W_mv.weight": "memory_value.weight",
    "W_mb.weight": "memory_beta.weight",
    "W_mb.bias": "memory_beta.bias",
}
# A parameter that transformers has renamed since, and buffers that it used to save and computes now.
RENAMED_KEYS = {"model.embed_out.weight": "model.lm_head.weight"}
OLD_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.(original_)?inv_freq$")
POSITION_TABLES = ("wpe.weight", "embed_positions.weight")  # of backbones that learn their positions

# Fields of the authors' config.json that mean another architecture where they are set.
SLIDING_WINDOW = "an attention sink / sliding window over the previous segment"
OTHER_ARCHITECTURES = {
    "sliding_window": SLIDING_WINDOW,
    "sliding_window_enabled": SLIDING_WINDOW,
    "use_sink": SLIDING_WINDOW,
    "attend_to_previous_input": "attention to the previous segment",
    "gating": "gating (a beta for every channel)",
    "act_on": "adaptive computation time",
}
# Backbones that differ in these have weights of the same shape all the same.
INVISIBLE_FIELDS = ("num_attention_heads", "rope_parameters", "rms_norm_eps", "layer_norm_eps", "hidden_act")


class CheckpointError(ValueError):
    """A checkpoint that cannot be imported, with the reason."""


def import_checkpoint(
    checkpoint: str | Path,
    backbone: str | Path,
    out: str | Path,
    segment_size: int,
    variant: str = "v2",
    correction: bool = True,
    use_denom: bool = True,
) -> ARMTForCausalLM:
    """
    Turns a checkpoint of the authors into one that stock transformers loads. The number of memory tokens, `d_mem` and
    the layers with memory are seen in its weights; what cannot be seen has to be given. A training script's file does
    not tell whether there was a sliding window: import it only if there was none.

    Args:
        checkpoint: a `.bin`, `.pt` or `.safetensors` file, or a folder with one, sharded or not.
        backbone: folder or Hub id of the model that was trained. Its configuration, tokenizer, chat template and
            generation config are used, not its weights.
        out: folder to write; must not exist, or be empty.
        segment_size: real tokens in a segment, as in training.
        variant: `paper` for the paper's own code, whose features are not normalised; `v2` for all later code.
        correction, use_denom: see [`ARMTConfig`]; as in training.

    Returns:
        The model that was saved: the backbone in the checkpoint's dtype, the memory in float32.

    Raises:
        CheckpointError: if the checkpoint is damaged, is another architecture, or does not fit the backbone.
        ValueError: for a `segment_size` or `variant` that cannot be.
        FileExistsError: if there is something in `out`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of: {', '.join(VARIANTS)}.")
    options = {"segment_size": segment_size, "correction": correction, "use_denom": use_denom}
    with staged_folder(out) as folder:
        text_config = _backbone_config(backbone)
        ARMTConfig(text_config=text_config, **options)  # a bad option shows before a large file is read
        try:
            tensors, fields = read_checkpoint(Path(checkpoint))
            refuse_other_architectures(tensors, fields)
            _compare_fields(fields, text_config, options)
            shape = _memory_shape(tensors, text_config)
            # It was trained without the guard.
            config = ARMTConfig(text_config=text_config, **options, **shape, **VARIANTS[variant], write_guard=False)
            tensors = map_tensors(tensors, config)
        except CheckpointError as error:
            raise CheckpointError(f"cannot import {checkpoint}: {error}") from error.__cause__
        # Through from_pretrained, which deals with dtypes, ties and buffers the way every later load will.
        dtype = reduce(torch.promote_types, [t.dtype for name, t in tensors.items() if name.startswith("model.")])
        model = ARMTForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
        model.config.converted_from = describe_backbone(backbone)
        model.save_pretrained(folder)
        copy_text_files(backbone, folder)
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(out)  # adapters name their base
    return model


def _backbone_config(backbone: str | Path) -> PreTrainedConfig:
    try:
        check_exists(str(backbone), "backbone", old=True)
        config = AutoConfig.from_pretrained(str(backbone))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the configuration of the backbone {backbone} cannot be loaded: {error}") from error
    if isinstance(config, ARMTConfig):
        raise CheckpointError(f"the backbone {backbone} is an ARMT checkpoint. Name the plain model it came from.")
    return config


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    Reads the weights, under the names in the files, and the fields of the authors' `config.json` beside them, if there
    is one. Nothing in a file is executed.

    Raises:
        CheckpointError: if there are no weights, or they cannot be read.
    """
    if not path.exists():
        raise CheckpointError("there is no such file or folder. Download the checkpoint first: hf download REPOSITORY")
    folder = path if path.is_dir() else path.parent
    tensors = {}
    for file in [path] if path.is_file() else _weight_files(path):
        try:
            pickled = file.suffix != ".safetensors"
            found = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
        except Exception as error:  # every format has errors of its own for what is damaged
            reason = re.split(r"[.\n]", str(error))[0]  # torch goes on with how to run a file's code after all
            raise CheckpointError(
                f"{file.name} cannot be read: it is incomplete, damaged, or more than weights. Copy it again. "
                f"({type(error).__name__}: {reason})"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise CheckpointError(f"{file.name} is not a state dict. Save one: torch.save(model.state_dict(), FILE).")
        tensors |= found
    fields = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return tensors, fields if fields.get("model_type", "armt") == "armt" else {}


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{name}.index.json").is_file():
            shards = _read_json(folder / f"{name}.index.json").get("weight_map", {})
            return [folder / shard for shard in sorted(set(shards.values()))]
        if (folder / name).is_file():
            return [folder / name]
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin", ".pt")]
    if len(files) != 1:
        found = f"there are {_first([file.name for file in files])}" if files else "there is none"
        raise CheckpointError(f"a folder should hold one file of weights, but {found}. Name the file itself.")
    return files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file.name} is damaged: {error}. Download or copy it again.") from error


def refuse_other_architectures(tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    """
    Says what a checkpoint is, if it is not an ARMT model that this package can be.

    Raises:
        CheckpointError: for RMT, sliding windows and sinks, heads, gating, LoRA, and whatever is not ARMT at all.
    """
    if "armt_version" in fields:
        raise CheckpointError("it is a checkpoint of this package already; load it with from_pretrained.")
    if any(".lora_" in name or ".base_layer." in name for name in tensors):
        raise CheckpointError("it has LoRA adapters inside. Merge them with PEFT's merge_and_unload, then import it.")
    leaves = {name.rpartition(".")[2] for name in tensors}
    if not any(".W_m" in name for name in tensors):
        if "memory" not in leaves:
            raise CheckpointError("it has no memory. To give one to a plain decoder run: armt convert BACKBONE")
        raise CheckpointError(
            "it is an RMT (Recurrent Memory Transformer): memory tokens, but no associative memory (W_mq, W_mk, W_mv, "
            "W_mb) in any layer. That is another architecture."
        )
    other = [what for field, what in OTHER_ARCHITECTURES.items() if fields.get(field)]
    if "sink" in leaves:
        other.append(SLIDING_WINDOW)
    positions = any(name.endswith(POSITION_TABLES) for name in tensors)
    if positions and "memory" in tensors:  # so does their later code with every such backbone
        other.append("learned positions that count through the whole text, not through a segment")
    if fields.get("segment_alignment") not in (None, "left"):
        other.append(f"segments aligned {fields['segment_alignment']}")
    for name, tensor in tensors.items():
        if name.endswith(".W_mb.weight") and len(tensor) > 1:
            gating = len(tensor) == tensor.shape[1]
            other.append(OTHER_ARCHITECTURES["gating"] if gating else f"several memory heads ({len(tensor)})")
    if other:
        raise CheckpointError(f"it uses {'; '.join(dict.fromkeys(other))}. This package has no such model.")


def _compare_fields(fields: dict[str, Any], text_config: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Compares what the authors' config.json says with what the caller says."""
    for name, given in options.items():
        if fields.get(name) not in (None, given):
            raise CheckpointError(f"its config.json has {name} {fields[name]}, not {given}. Keep to what it has.")
    if isinstance(fields.get("base_model_config"), dict):
        trained = dict(fields["base_model_config"])
        model_type = trained.pop("model_type", None)
        if model_type != text_config.model_type:
            raise CheckpointError(f"it was trained from a {model_type} backbone, not from {text_config.model_type}.")
        trained = CONFIG_MAPPING[model_type](**trained)
        for name in INVISIBLE_FIELDS:
            was, given = getattr(trained, name, None), getattr(text_config, name, None)
            if was != given:
                raise CheckpointError(f"it was trained from a backbone with {name} {was}, the given one has {given}.")


def _memory_shape(tensors: dict[str, torch.Tensor], text_config: PreTrainedConfig) -> dict[str, Any]:
    """`num_mem_tokens`, `d_mem` and `memory_layers` of a checkpoint."""
    memory = [tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == "memory"]
    found = [(re.search(r"\.(\d+)\.W_mq\.weight$", name), tensor) for name, tensor in tensors.items()]
    queries = {int(match[1]): tensor for match, tensor in found if match}
    if not memory or not queries:
        raise CheckpointError("it has no memory tokens, or no W_mq in any layer: the file is incomplete.")
    width, count = text_config.hidden_size, text_config.num_hidden_layers
    positions = [len(tensor) for name, tensor in tensors.items() if name.endswith(POSITION_TABLES)]
    if positions and positions[0] == getattr(text_config, "max_position_embeddings", 0) + len(memory[0]):
        raise CheckpointError("it uses wrap_pos, positions of their own for memory tokens. This package has none.")
    if memory[0].shape[-1] != width or max(queries) >= count:
        raise CheckpointError(
            f"it has hidden size {memory[0].shape[-1]} and memory up to layer {max(queries)}, the backbone has hidden "
            f"size {width} and layers 0 to {count - 1}. Name the backbone that it was trained from."
        )
    layers = sorted(queries)
    shape = {"num_mem_tokens": len(memory[0]), "d_mem": len(queries[layers[0]])}
    return shape | {"memory_layers": None if len(layers) == count else layers}


def map_name(name: str, layers: str) -> str:
    """The key map: from a name in their file to ours, for a list of layers at `layers` (`model.model.layers`, say)."""
    name = name.removeprefix("armt.").removeprefix("memory_cell.")
    if name == "memory":
        return "memory_tokens.weight"
    name = re.sub(r"^layers\.", f"{layers}.", name)
    if match := re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.+)", name):
        layer, rest = match.groups()
        if rest in MEMORY_KEYS:
            return f"memory.{layer}.{MEMORY_KEYS[rest]}"
        return f"{layers}.{layer}.{rest.removeprefix('layer.')}"
    return name


def map_tensors(tensors: dict[str, torch.Tensor], config: ARMTConfig) -> dict[str, torch.Tensor]:
    """
    Gives the tensors of a checkpoint the names of our model with this configuration.

    Raises:
        CheckpointError: if tensors are missing, are left over or have another shape, or two names of one disagree.
    """
    with torch.device("meta"):
        model = ARMTForCausalLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    decoder_layers = find_decoder_layers(model.decoder, config.text_config.num_hidden_layers)
    layers = next(name for name, module in model.named_modules() if module is decoder_layers)
    mapped, unknown = {}, []

    def add(ours: str, tensor: torch.Tensor, theirs: str) -> None:
        if ours in mapped and not torch.equal(mapped[ours], tensor):
            raise CheckpointError(f"{theirs} is another name of {ours}, but has other values. The file is damaged.")
        mapped[ours] = tensor

    for theirs, tensor in tensors.items():
        ours = map_name(theirs, layers)
        ours = ours if ours in expected else RENAMED_KEYS.get(ours, ours)
        if ours in expected:
            add(ours, tensor, theirs)
        elif not OLD_BUFFERS.search(ours):
            unknown.append(theirs)
    for tied, original in model.all_tied_weights_keys.items():  # a file may hold either
        for ours, theirs in ((original, tied), (tied, original)):
            if theirs in mapped:
                add(ours, mapped[theirs], theirs)

    shapes = {name: tuple(tensor.shape) for name, tensor in mapped.items()}
    misfits = {
        "missing": [name for name in expected if name not in mapped],
        "unknown": unknown,
        "of another shape": [f"{n} {s}, not {expected[n]}" for n, s in shapes.items() if s != expected[n]],
    }
    if any(misfits.values()):
        found = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in misfits.items() if names)
        raise CheckpointError(
            f"its tensors do not fit this {config.text_config.model_type} backbone with memory ({found}). Name the "
            "backbone that it was trained from; if that is this one, the file is incomplete or an unknown variant."
        )
    return mapped


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
