"""How it is measured: warm-up apart, every sample kept, the median reported, peak memory beside it."""

import gc
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


GIB = 2**30


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Peak memory counts from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float | None:
    """GiB allocated on the GPU at most since `reset_peak`; without a GPU, those the process held, where known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20 if status.exists() else None


def seconds(function: Callable[[], Any]) -> float:
    """Seconds until everything is done that a call starts."""
    synchronize()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def measure(function: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> dict[str, Any]:
    """
    Times a function that takes nothing. A failure is a result too: an alternative that runs out of memory, or does not
    run here at all, must not cost the others.

    Returns:
        `median_s`, `samples_s`, `first_call_s` (the first of the warm-up, compilation included; None without warm-up)
        and `peak_gib`; or `error`.
    """
    free()
    reset_peak()
    try:
        first = [seconds(function) for _ in range(warmup)]
        if warmup:  # what compilation needed is not what running needs
            reset_peak()
        samples = [seconds(function) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        error = "out of memory"
    except Exception as failure:
        traceback.print_exc(file=sys.stderr)
        error = f"{type(failure).__name__}: {str(failure)[:500]}"
    else:
        return {
            "median_s": statistics.median(samples),
            "samples_s": samples,
            "first_call_s": first[0] if first else None,
            "peak_gib": peak_gib(),
        }
    free()  # not in the handler, where the failed call's frames are still alive
    return {"error": error}


def repeats_for(tokens: int) -> int:
    """As many samples as a long run can afford."""
    return 5 if tokens <= 1 << 17 else 3 if tokens <= 1 << 20 else 1


def ceilings(device: torch.device) -> dict[str, float]:
    """
    What the device can do: `matmul_tflops` of a large square product of random matrices (bfloat16, 8,192 rows; on a
    CPU float32 and 1,024), the same over two seconds on end, when the card's power is the limit
    (`sustained_matmul_tflops`), and `copy_tb_s`, bytes read and written by copying 2 GiB (64 MiB).
    """
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b, repeats=20, warmup=5)["median_s"]
    many = max(1, round(2 / product)) if cuda else 1
    target = torch.empty_like(a)

    def products() -> None:
        for _ in range(many):
            torch.mm(a, b, out=target)

    sustained = measure(products, repeats=1, warmup=0)["median_s"] / many
    source = torch.empty((1 << 31) if cuda else (1 << 26), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), repeats=20, warmup=5)["median_s"]
    return {
        "matmul_tflops": 2 * size**3 / product / 1e12,
        "sustained_matmul_tflops": 2 * size**3 / sustained / 1e12,
        "copy_tb_s": 2 * source.nbytes / copy / 1e12,
    }
