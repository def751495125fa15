"""The proof that a checkpoint works for somebody else: a fresh process without this package loads it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...configuration_armt import ARMTConfig


VISITOR = Path(__file__).with_name("visitor.py")
TOLERANCE = 1e-4  # of the logits' spread: the same computation on the same machine


class VisitError(RuntimeError):
    """A checkpoint that does not load for a stranger, or is another model than it should be."""


def visit(
    source: str | Path, config: ARMTConfig, adapter: bool, revision: str | None = None, fresh_cache: bool = False
) -> torch.Tensor:
    """
    Loads a checkpoint in a fresh process where this package is absent, with the checkpoint's own code.

    Args:
        source: folder or Hub id.
        config: of the model, for the length of the text: one segment and a little of the next, which reads memory.
        adapter: whether it is loaded with `AutoPeftModelForCausalLM`.
        revision: of a Hub id.
        fresh_cache: download everything again rather than trust what is on this machine.

    Returns:
        `(1, T, vocabulary)` float32 logits.

    Raises:
        VisitError: with the last thing that process said.
    """
    with tempfile.TemporaryDirectory(prefix="armt-visit-") as work:
        ids, out = f"{work}/ids.safetensors", f"{work}/logits.safetensors"
        save_file({"ids": probe(config)}, ids)
        task = {"source": str(source), "revision": revision, "adapter": adapter, "ids": ids, "out": out}
        environment = {**os.environ, "HF_MODULES_CACHE": f"{work}/modules", "CUDA_VISIBLE_DEVICES": ""}
        if fresh_cache:
            environment["HF_HUB_CACHE"] = f"{work}/cache"
        command = [sys.executable, "-P", str(VISITOR), json.dumps(task)]
        result = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
        if result.returncode:
            said = result.stderr.strip().splitlines() or ["nothing was said"]
            raise VisitError(f"{source} does not load in a fresh process without this package: {said[-1]}")
        return load_file(out)["logits"]


def probe(config: ARMTConfig) -> torch.Tensor:
    """`(1, T)` random ids: one whole segment and up to 16 tokens of the next."""
    generator = torch.Generator().manual_seed(0)
    length = config.segment_size + min(config.segment_size, 16)
    return torch.randint(config.text_config.vocab_size, (1, length), generator=generator)


def agree(logits: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two results are the same up to rounding."""
    if logits.shape != others.shape:
        return False
    return bool((logits - others).abs().max() <= TOLERANCE * logits.std())
