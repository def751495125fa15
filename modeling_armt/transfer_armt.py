"""Small tensors of what the host knows, on the device."""

from collections.abc import Sequence

import torch


def on_device(values: Sequence, device: torch.device) -> torch.Tensor:
    """
    `torch.tensor(values, device=device)` that does not wait until a GPU has done all that it was asked to before: the
    copy comes from pinned memory.
    """
    return torch.tensor(values, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)
