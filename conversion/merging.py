"""Merging an adapter into its base: one ordinary ARMT checkpoint, checked against the two."""

import shutil
from pathlib import Path

import torch
from peft import PeftModel

from ..modeling_armt import ARMTForCausalLM
from .adapters import merge
from .checkpoints import load_checkpoint
from .convert import staged_folder


RECORDS = ("training.json", "recipe.yaml")
# Of the logits' spread: on average in the dtype that is saved, as in a conversion's checks; at most before that.
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
        adapted, tokenizer = load_checkpoint(adapter, device="cpu")
        if not isinstance(adapted, PeftModel):
            raise MergeError(f"{adapter} is a full checkpoint already: there is no adapter in it to merge.")
        base = adapted.get_base_model()
        if getattr(base.config, "quantization_config", None) is not None:
            raise MergeError(
                f"the base of {adapter} is quantized, where a merge would round twice. Merge into the checkpoint that "
                "was quantized, and quantize the result."
            )
        dtype = base.model.dtype
        ids = probe(base)
        # In float32, so that the weights are rounded once, at the end.
        before = adapted.to(torch.promote_types(dtype, torch.float32))(ids, use_cache=False).logits
        merged = merge(adapted)
        if not (merged(ids, use_cache=False).logits - before).abs().max() <= EXACT * before.std():
            raise MergeError(f"merging {adapter} changes its logits; nothing was written.")
        merged.model.to(dtype)
        merged.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name in RECORDS:
            if (Path(adapter) / name).is_file():
                shutil.copyfile(Path(adapter) / name, folder / name)
        saved, _ = load_checkpoint(folder, device="cpu")
        error = ((saved(ids, use_cache=False).logits - before).abs().mean() / before.std()).item()
        if not error < ROUNDING:
            raise MergeError(
                f"{adapter} merged and saved in {dtype} has other logits than before (off by {error:.1e})."
            )
    merged.name_or_path = merged.config.name_or_path = str(out)  # adapters name their base
    return merged


def probe(model: ARMTForCausalLM) -> torch.Tensor:
    """`(1, T)` random ids: one whole segment and a little of the next, which reads memory."""
    generator = torch.Generator().manual_seed(0)
    length = model.config.segment_size + min(model.config.segment_size, 16)
    return torch.randint(model.config.text_config.vocab_size, (1, length), generator=generator)
