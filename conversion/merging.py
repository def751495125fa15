"""Merging an adapter into its base: one ordinary ARMT checkpoint, checked against the two."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig

from ..modeling_armt import ARMTForCausalLM
from .adapters import merge
from .checkpoints import check_checkpoint, load_checkpoint
from .evaluation.subject import hash_weights, read_training
from .files import staged_folder


# Of the logits' spread, on average: in the dtype that is saved, as in a conversion's checks, and in float32.
ROUNDING, EXACT = 0.05, 1e-3


class MergeError(ValueError):
    """An adapter that cannot be merged, with the reason."""


@torch.no_grad()
def merge_adapter(adapter: str | Path, out: str | Path) -> ARMTForCausalLM:
    """
    Writes an adapter and its ARMT base as one full checkpoint, in the base's dtype with the memory in float32.

    Args:
        adapter: folder or Hub id of a PEFT adapter whose base is an ARMT checkpoint.
        out: folder to write; must not exist, or be empty.

    Returns:
        The model that was saved.

    Raises:
        MergeError: if it is no adapter, its base is quantized, or the merged model has other logits.
        ValueError, FileNotFoundError: for an adapter or a base that does not load, or is not ARMT.
        FileExistsError: if there is something in `out`.
    """
    with staged_folder(out) as folder:
        name, lora = check_checkpoint(adapter)
        if lora is None:
            raise MergeError(f"{adapter} is a full checkpoint already: there is no adapter in it to merge.")
        if hasattr(AutoConfig.from_pretrained(name, revision=lora.revision), "quantization_config"):
            raise MergeError(
                f"the base of {adapter} is quantized, where a merge would round twice. Merge into the checkpoint that "
                "was quantized, and quantize the result."
            )
        adapted, tokenizer = load_checkpoint(adapter, device="cpu")
        base = adapted.get_base_model()
        dtype = base.model.dtype
        ids = probe(base)
        # In float32, so that the weights are rounded once, at the end.
        before = adapted.to(torch.promote_types(dtype, torch.float32))(ids, use_cache=False).logits
        merged = merge(adapted)
        error = difference(merged(ids, use_cache=False).logits, before)
        if not error < EXACT:
            raise MergeError(f"merging {adapter} changes its logits (off by {error:.1e}); nothing was written.")
        merged.model.to(dtype)
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        copy_records(Path(adapter), folder)
        saved, _ = load_checkpoint(folder, device="cpu")
        error = difference(saved(ids, use_cache=False).logits, before)
        if not error < ROUNDING:
            raise MergeError(
                f"{adapter} merged and saved in {dtype} has other logits than before (off by {error:.1e})."
            )
    merged.name_or_path = merged.config.name_or_path = str(out)  # adapters name their base
    return merged


def copy_records(adapter: Path, folder: Path) -> None:
    """Copies how the adapter was trained, and which it was: what is measured of it holds for the merged model."""
    if (adapter / "recipe.yaml").is_file():
        shutil.copyfile(adapter / "recipe.yaml", folder / "recipe.yaml")
    training = read_training(adapter)
    if training:
        text = json.dumps(training | {"merged_from": hash_weights(adapter)}, indent=1)
        (folder / "training.json").write_text(text, encoding="utf-8")


def difference(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Mean absolute difference, in spreads of `others`."""
    return ((logits - others).abs().mean() / others.std()).item()


def probe(model: ARMTForCausalLM) -> torch.Tensor:
    """`(1, T)` random ids: one whole segment and a little of the next, which reads memory."""
    generator = torch.Generator().manual_seed(0)
    length = model.config.segment_size + min(model.config.segment_size, 16)
    return torch.randint(model.config.text_config.vocab_size, (1, length), generator=generator)
