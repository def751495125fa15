"""`armt generate`: read a text of any length, segment by segment, and go on with it."""

import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tqdm import tqdm
from transformers import TextStreamer

from ..cache_armt import ARMTCache
from ..modeling_armt import ARMTForCausalLM
from .checkpoints import armt_model, load_checkpoint


def generate(
    checkpoint: str | Path,
    prompt: str | None,
    max_new_tokens: int = 100,
    save_memory: Path | None = None,
    load_memory: Path | None = None,
    prompt_ids: Path | None = None,
) -> str:
    """
    Reads a prompt, streams what follows to the terminal, and says what it took.

    Args:
        checkpoint: folder or Hub id of an ARMT checkpoint, or of an adapter on one.
        prompt: text of any length, or None for `prompt_ids`.
        max_new_tokens: 0 only reads.
        save_memory: file for the memory after the prompt, before anything is generated.
        load_memory: file of an earlier `save_memory`, on which the prompt follows.
        prompt_ids: a `.npy` file of token ids `(T,)`, which is mapped rather than loaded.

    Returns:
        The generated text; ids with spaces between them if the checkpoint has no tokenizer.

    Raises:
        ValueError: for an empty prompt, a checkpoint that is not ARMT, is damaged or lacks the tokenizer that a text
            needs, or a memory that is not this model's.
    """
    if max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be 0 or more.")
    if save_memory is not None and not Path(save_memory).absolute().parent.is_dir():
        raise ValueError(f"there is no folder {Path(save_memory).parent} to save the memory in.")
    model, tokenizer = load_checkpoint(checkpoint)
    model = armt_model(model)
    if prompt_ids is not None:
        ids = map_ids(prompt_ids)
    elif tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer, so it takes token ids: --prompt-ids.")
    else:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=load_memory is None)["input_ids"][0]
    if len(ids) == 0 or (prompt is not None and not prompt.strip()):
        raise ValueError("the prompt is empty: there is nothing to go on from.")
    last = torch.tensor([[int(ids[-1])]], device=model.device)
    cache = ARMTCache() if load_memory is None else model.load_memory(load_memory)

    started = time.monotonic()
    read(model, ids[:-1], cache)
    if save_memory is not None:
        whole = cache.fork()
        model.read(last, whole)
        model.save_memory(whole, save_memory)
    reading, new = time.monotonic() - started, 0
    text = ""
    if max_new_tokens:
        started = time.monotonic()
        streamer = tokenizer and TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        # The last token of the prompt is read by generate, which samples what follows.
        output = model.generate(last, cache=cache.fork(), max_new_tokens=max_new_tokens, streamer=streamer)[0, 1:]
        new = len(output)
        if tokenizer is None:
            print(text := " ".join(map(str, output.tolist())))
        else:
            text = tokenizer.decode(output, skip_special_tokens=True)
    generating = time.monotonic() - started
    report(len(ids), reading, new, generating)
    return text


def map_ids(path: Path) -> np.ndarray:
    """The `(T,)` token ids of a `.npy` file, mapped into memory."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a .npy file: {error}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{path} does not hold token ids: it must be a .npy file with one row of integers.")
    return ids


def read(model: ARMTForCausalLM, ids: torch.Tensor | np.ndarray, cache: ARMTCache) -> None:
    """Reads `(T,)` ids into `cache`, with a progress bar where it takes more than one block."""
    if len(ids) == 0:
        return
    segment_size = model.config.segment_size
    # A block is a moment on a GPU; on a CPU the bar should move before the user wonders.
    block_segments = 512 if model.device.type == "cuda" else max(1, 4096 // segment_size)
    few = len(ids) <= block_segments * segment_size
    with tqdm(total=len(ids), unit="token", desc="reading", disable=few, leave=False) as bar:
        model.read(ids, cache, block_segments=block_segments, progress=bar.update)


def peak_resident_memory() -> int:
    """Bytes this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what a parent held when it forked
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(read_tokens: int, reading: float, new_tokens: int, generating: float) -> None:
    """Says what was read and generated, how fast, and the peak memory."""
    if torch.cuda.is_available():
        peak, where = torch.cuda.max_memory_allocated(), "GPU"
    else:
        peak, where = peak_resident_memory(), ""
    parts = [f"{read_tokens:,} tokens read ({read_tokens / max(reading, 1e-9):,.0f}/s)"]
    if new_tokens:
        parts.append(f"{new_tokens:,} generated ({new_tokens / generating:,.1f}/s)")
    parts.append(f"peak {where} memory {peak / 2**20:,.0f} MiB".replace("  ", " "))
    Console(stderr=True, markup=False).print(", ".join(parts), style="dim", highlight=False)
