"""What a conversion would need, from the backbone's configuration alone: nothing is loaded and nothing written."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from ..compatibility_armt import CACHE
from ..configuration_armt import VARIANTS, ARMTConfig
from ..modeling_armt import ARMTForCausalLM
from .convert import ConversionError, check_config


@dataclass(frozen=True)
class Plan:
    """
    Sizes of an ARMT model, in bytes unless said otherwise.

    Attributes:
        config: of the model.
        dtype: of the backbone's weights; the memory's are float32.
        backbone_parameters, memory_parameters: how many; tied ones count once.
        weights: of both.
        state: what a row (a text) remembers, however long it is. Training keeps it once for each segment that
            gradients flow through.
        keys: keys and values of a row's open segment, at most.
        memory, disk: what is available here, of main memory and where the model would be written.
    """

    config: ARMTConfig
    dtype: torch.dtype
    backbone_parameters: int
    memory_parameters: int
    weights: int
    state: int
    keys: int
    memory: int
    disk: int

    @property
    def fits(self) -> bool:
        """Whether this machine can hold the weights, in main memory and on disk."""
        return self.weights < min(self.memory, self.disk)

    def __str__(self) -> str:
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        return "\n".join(
            [
                f"backbone: {config.text_config.model_type}, {config.num_hidden_layers} layers of width "
                f"{config.hidden_size}, {_count(self.backbone_parameters)} parameters in {dtype}",
                f"memory in {len(config.memory_layer_indices)} layers: {_count(self.memory_parameters)} parameters in "
                f"float32; {_size(self.weights)} of weights in all",
                f"state of a row: {_size(self.state)}, however long its text is, and at most {_size(self.keys)} of "
                f"keys in its open segment of {config.segment_size} tokens",
                f"training keeps {_size(self.state)} for each row and segment",
                f"this machine: {_size(self.memory)} of memory and {_size(self.disk)} of disk are available; it "
                + ("fits" if self.fits else "does not fit"),
            ]
        )


def plan(
    backbone: str | Path, out: str | Path | None = None, variant: str = "v2", dtype: str = "auto", **memory_options
) -> Plan:
    """
    Measures a conversion without doing it.

    Args:
        backbone, variant, dtype, memory_options: as in [`convert`].
        out: folder that would be written; here by default.

    Raises:
        ConversionError: for a backbone whose configuration tells that it cannot be converted.
        ValueError: for options that cannot work.
    """
    check_config(backbone)
    text_config = AutoConfig.from_pretrained(str(backbone))
    config = ARMTConfig(text_config=text_config, **memory_options, **VARIANTS[variant])
    dtype = (text_config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    try:
        with torch.device("meta"):
            model = ARMTForCausalLM(config)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError, IndexError, KeyError) as error:
        raise ConversionError(
            f"{text_config.model_type} models cannot carry a memory: {type(error).__name__}: {error}"
        ) from error
    backbone_parameters = sum(parameter.numel() for parameter in model.model.parameters())
    memory_parameters = sum(parameter.numel() for parameter in model.parameters()) - backbone_parameters
    states = [memory.zero_state(1, "meta") for memory in model.memory.values()]
    folder = Path("." if out is None else out).resolve()
    return Plan(
        config=config,
        dtype=dtype,
        backbone_parameters=backbone_parameters,
        memory_parameters=memory_parameters,
        weights=dtype.itemsize * backbone_parameters + torch.float32.itemsize * memory_parameters,
        state=sum(tensor.nbytes for state in states for tensor in state if tensor is not None),
        keys=config.segment_size * dtype.itemsize * _key_entries(model),
        memory=psutil.virtual_memory().available,
        disk=shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free,
    )


@torch.no_grad()
def _key_entries(model: ARMTForCausalLM) -> int:
    """Numbers in the keys and values of a position, in all layers."""
    try:
        # In bfloat16, which all kernels know on the meta device.
        ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
        cache = model.model.to(torch.bfloat16)(ids, use_cache=True)[CACHE]
        return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    except (RuntimeError, NotImplementedError):  # a forward that looks at its numbers: heads are as wide as the model
        return 2 * model.config.num_hidden_layers * model.config.hidden_size


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
