"""Associative Recurrent Memory Transformer (arXiv 2407.04841) for any pretrained decoder of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_armt import ARMTCache
from .configuration_armt import ARMTConfig
from .modeling_armt import ARMTForCausalLM, ARMTModel, ARMTPreTrainedModel


__version__ = "0.1.0"

__all__ = ["ARMTCache", "ARMTConfig", "ARMTForCausalLM", "ARMTModel", "ARMTPreTrainedModel"]

# This file never travels with a checkpoint: where the package is not installed, each checkpoint runs its own code.
AutoConfig.register(ARMTConfig.model_type, ARMTConfig, exist_ok=True)
AutoModel.register(ARMTConfig, ARMTModel, exist_ok=True)
AutoModelForCausalLM.register(ARMTConfig, ARMTForCausalLM, exist_ok=True)
