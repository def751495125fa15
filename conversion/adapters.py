"""LoRA adapters for an ARMT model: the backbone's linears get LoRA, the memory is trained in full."""

from peft import LoraConfig, PeftModel, TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling_armt import ARMTForCausalLM


# Linears and embeddings of the memory; PEFT trains copies of them and saves them with the adapter.
MEMORY_MODULES = ["memory_query", "memory_key", "memory_value", "memory_beta", "memory_tokens"]


def lora_config(model: ARMTForCausalLM, r: int = 16, lora_alpha: int = 32, **options) -> LoraConfig:
    """
    The adapter configuration for LoRA + memory training.

    Args:
        model: the model to adapt.
        r, lora_alpha: rank and scale of LoRA.
        options: other fields of `peft.LoraConfig`, such as `lora_dropout` or narrower `target_modules`.

    Returns:
        A configuration that puts LoRA on all attention and MLP linears of the backbone's layers and saves the memory
        in full, for `peft.get_peft_model(model, lora_config(model))`.
    """
    layers = {
        name.rsplit(".", 1)[-1]
        for name, module in model.decoder.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and any(part.isdigit() for part in name.split("."))
    }
    defaults = {"target_modules": sorted(layers), "modules_to_save": MEMORY_MODULES, "task_type": TaskType.CAUSAL_LM}
    return LoraConfig(r=r, lora_alpha=lora_alpha, **{**defaults, **options})


def parameter_groups(model: nn.Module, lr: float, memory_lr: float, weight_decay: float = 0.0) -> list[dict]:
    """
    Groups for an optimizer: the memory learns at a rate of its own, and neither memory tokens nor biases decay.

    Args:
        model: an ARMT model, adapted or not.
        lr: for what is trained of the backbone.
        memory_lr: for the memory's projections and the memory tokens.
        weight_decay: for matrices.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = memory_lr if any(part in MEMORY_MODULES for part in name.split(".")) else lr
            decay = 0.0 if parameter.dim() < 2 or "memory_tokens" in name else weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def merge(model: PeftModel) -> ARMTForCausalLM:
    """Folds the adapter into the weights: an ordinary ARMT model, to be saved with `save_pretrained`."""
    return model.merge_and_unload()
