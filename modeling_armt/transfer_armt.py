"""Small tensors of what the host knows, on the device, and which device that is."""

from collections.abc import Sequence

import torch
from torch import nn


def on_device(values: Sequence, device: torch.device) -> torch.Tensor:
    """
    `torch.tensor(values, device=device)` that does not wait until a GPU has done all that it was asked to before: the
    copy comes from pinned memory.
    """
    return torch.tensor(values, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)


def working_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate takes them to if they are offloaded."""
    for part in module.modules():
        for tensor in part.parameters(recurse=False):
            if not tensor.is_meta:
                return tensor.device
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    return torch.device("cpu")
