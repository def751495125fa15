"""Associative Recurrent Memory Transformer (arXiv 2407.04841) for any pretrained decoder of transformers."""

from .cache_armt import ARMTCache
from .configuration_armt import ARMTConfig
from .modeling_armt import ARMTForCausalLM, ARMTModel, ARMTPreTrainedModel


__version__ = "0.1.0"

__all__ = ["ARMTCache", "ARMTConfig", "ARMTForCausalLM", "ARMTModel", "ARMTPreTrainedModel"]
