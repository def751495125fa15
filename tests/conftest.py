"""Settings and fixtures of all tests."""

import os
from pathlib import Path

import pytest


# The golden float64 runs used float32 rotary tables of torch's AVX2 kernels; those of AVX-512 differ in the last bit.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
# Torch's cache of compiled code does not tell the two apart: code for AVX2 that a process with AVX-512 takes from it
# writes beyond its buffers.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "inductor-avx2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch  # noqa: E402 (reads the environment)


torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the reference data (../shared) is not on this machine")
    return SHARED
