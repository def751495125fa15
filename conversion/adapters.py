"""LoRA adapters for an ARMT model: the backbone's linears get LoRA, the memory is trained in full."""

from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..attachment_armt import find_decoder_layers
from ..modeling_armt import ARMTForCausalLM


# Linears and embeddings of the memory; PEFT trains copies of them and saves them with the adapter.
MEMORY_MODULES = ["memory_query", "memory_key", "memory_value", "memory_beta", "memory_tokens"]
# The same, of models with `memory_norm`.
MEMORY_NORMS = ["memory_read_norm", "memory_write_norm"]


def memory_modules(model: ARMTForCausalLM) -> list[str]:
    """The names of the modules that a memory of `model` is made of."""
    return MEMORY_MODULES + MEMORY_NORMS * model.config.memory_norm


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
    layers = find_decoder_layers(model.decoder, model.config.text_config.num_hidden_layers)
    defaults = {
        "target_modules": sorted(linears(layers)),
        "modules_to_save": memory_modules(model),
        "task_type": TaskType.CAUSAL_LM,
    }
    return LoraConfig(r=r, lora_alpha=lora_alpha, **{**defaults, **options})


def linears(module: nn.Module) -> set[str]:
    """The last names of all linears in a module, quantized or not, whatever adapters they have already."""
    names = set()
    for name, child in module.named_children():
        layer = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        is_linear = isinstance(layer, (nn.Linear, Conv1D)) or hasattr(layer, "in_features")
        names |= {name} if is_linear else linears(layer)
    return names


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
            rate = memory_lr if any(part in MEMORY_MODULES + MEMORY_NORMS for part in name.split(".")) else lr
            kept = parameter.dim() < 2 or any(part in [*MEMORY_NORMS, "memory_tokens"] for part in name.split("."))
            decay = 0.0 if kept else weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def merge(model: PeftModel) -> ARMTForCausalLM:
    """Folds the adapter into the weights: an ordinary ARMT model, to be saved with `save_pretrained`."""
    return model.merge_and_unload()
