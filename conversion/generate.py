"""`armt generate`: read a text of any length, segment by segment, and go on with it."""

import re
import resource
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from ..cache_armt import ARMTCache
from ..modeling_armt import ARMTForCausalLM


def generate(
    checkpoint: str | Path,
    prompt: str,
    max_new_tokens: int = 100,
    save_memory: Path | None = None,
    load_memory: Path | None = None,
) -> str:
    """
    Reads a prompt, streams what follows to the terminal, and says what it took.

    Args:
        checkpoint: folder or Hub id of an ARMT checkpoint.
        prompt: text of any length.
        max_new_tokens: 0 only reads.
        save_memory: file for the memory after the prompt, before anything is generated.
        load_memory: file of an earlier `save_memory`, on which the prompt follows.

    Returns:
        The generated text.

    Raises:
        ValueError: for an empty prompt, a checkpoint that is not ARMT, or a memory of another model.
    """
    if max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be 0 or more.")
    if save_memory is not None and not Path(save_memory).absolute().parent.is_dir():
        raise ValueError(f"there is no folder {Path(save_memory).parent} to save the memory in.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").to(device).eval()
    if not isinstance(model, ARMTForCausalLM):
        raise ValueError(f"{checkpoint} is a plain {model.config.model_type} model. Convert it first: armt convert")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=load_memory is None)["input_ids"].to(device)
    if ids.shape[1] == 0 or not prompt.strip():
        raise ValueError("the prompt is empty: there is nothing to go on from.")
    cache = ARMTCache() if load_memory is None else model.load_memory(load_memory)

    started = time.monotonic()
    read(model, ids[:, :-1], cache)
    if save_memory is not None:
        whole = cache.fork()
        read(model, ids[:, -1:], whole)
        model.save_memory(whole, save_memory)
    reading, new = time.monotonic() - started, 0
    text = ""
    if max_new_tokens:
        started = time.monotonic()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        # The last token of the prompt is read by generate, which samples what follows.
        output = model.generate(
            ids[:, -1:], past_key_values=cache.fork(), max_new_tokens=max_new_tokens, streamer=streamer
        )[0, 1:]
        new, text = len(output), tokenizer.decode(output, skip_special_tokens=True)
    generating = time.monotonic() - started
    report(ids.shape[1], reading, new, generating)
    return text


@torch.no_grad()
def read(model: ARMTForCausalLM, ids: torch.Tensor, cache: ARMTCache) -> None:
    """Reads `(1, T)` ids into `cache`, with a progress bar where it takes more than a few segments."""
    pieces = ids.split(max(4096, model.config.segment_size), dim=1) if ids.shape[1] else ()
    with tqdm(total=ids.shape[1], unit="token", desc="reading", disable=len(pieces) < 2, leave=False) as bar:
        for piece in pieces:
            model(piece, past_key_values=cache, logits_to_keep=1)
            bar.update(piece.shape[1])


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
    Console(stderr=True).print(", ".join(parts), style="dim", highlight=False)
