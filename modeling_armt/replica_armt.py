"""
One device where `nn.DataParallel` has several. Without a launcher the Trainer wraps a model in it, and it would make
copies without parameters in every step; a launcher gives each device a process of its own, which is faster too.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


class Replica(nn.Module):
    """What `nn.DataParallel` takes for a copy of `model`: hands its share of a batch to the model itself."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.train(model.training)
        self.__dict__["original"] = model  # not a child
        logger.warning_once(
            "nn.DataParallel cannot use several devices for this model, which runs on one of them. To use all, start "
            "the script with: accelerate launch --multi_gpu SCRIPT. To leave the others alone: CUDA_VISIBLE_DEVICES=0."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, *args, **kwargs) -> Any:
        """As the model's, for arguments on any device; what it returns is on the model's."""
        model = self.__dict__["original"]

        def here(value: Any) -> Any:
            return value.to(model.device) if isinstance(value, torch.Tensor) else value

        with torch.accelerator.device_index(model.device.index):
            return model(*map(here, args), **{name: here(value) for name, value in kwargs.items()})
