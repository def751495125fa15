"""What is measured: random models of known shapes, made on the device, and the alternatives to them."""

import importlib.util

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from modeling_armt import ARMTForCausalLM


LLAMA_3 = {
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES = {
    "llama-3.2-1b": {
        **LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1 << 20,
        "tie_word_embeddings": True,
    },
}
# Relative to 1 / sqrt(D): the backbone's weights, and the memory's value projections. Random layers of larger weights
# amplify rounding from segment to segment, until runs in two dtypes have nothing in common.
WEIGHT_SCALE, VALUE_SCALE = 0.5, 0.01
# Memory tokens that stay diverse through random layers: keys that are all alike let the memory of a model that was
# never trained grow without bound.
MEMORY_TOKEN_STD = 1.0


def build_armt(
    shape: str,
    device: torch.device,
    dtype: torch.dtype,
    segment_size: int,
    num_mem_tokens: int,
    d_mem: int = 64,
    seed: int = 0,
) -> ARMTForCausalLM:
    """A random backbone of a shape in `SHAPES` with memories that are not zero, in evaluation mode."""
    torch.manual_seed(seed)
    # Nothing ends a text early: every run makes as many tokens as it was asked for.
    options = {**SHAPES[shape], "initializer_range": WEIGHT_SCALE * SHAPES[shape]["hidden_size"] ** -0.5}
    config = LlamaConfig(**options, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    backbone = _build(config, device, dtype)
    sizes = {"segment_size": segment_size, "num_mem_tokens": num_mem_tokens, "d_mem": d_mem}
    model = ARMTForCausalLM.from_backbone(backbone, **sizes).eval()
    for memory in model.memory.values():
        nn.init.normal_(memory.memory_value.weight, std=VALUE_SCALE * config.hidden_size**-0.5)
    nn.init.normal_(model.memory_tokens.weight, std=MEMORY_TOKEN_STD)
    return model


def stock_backbone(model: ARMTForCausalLM) -> PreTrainedModel:
    """The backbone as transformers makes it, without our hooks, on the same weights."""
    weights = model.model.state_dict()
    stock = _build(model.config.text_config, model.device, model.dtype)
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    return stock.eval()


def build_gated_deltanet(like: PreTrainedModel, num_layers: int | None = None) -> PreTrainedModel:
    """
    A random Gated DeltaNet of flash-linear-attention, of the width, the vocabulary and the dtype of another model.

    Args:
        like: the model it is compared with.
        num_layers: default: as many as make it as large as `like`.
    """
    from fla.models import GatedDeltaNetConfig

    config = like.config
    width, num_heads = config.hidden_size, max(1, config.hidden_size * 3 // 4 // 256)
    sizes = {
        "hidden_size": width,
        "num_heads": num_heads,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "fuse_cross_entropy": False,
    }
    if num_layers is None:
        with torch.device("meta"):
            one, two = (
                count_parameters(AutoModelForCausalLM.from_config(GatedDeltaNetConfig(num_hidden_layers=n, **sizes)))
                for n in (1, 2)
            )
        num_layers = max(1, 1 + round((count_parameters(like) - one) / (two - one)))
    return _build(GatedDeltaNetConfig(num_hidden_layers=num_layers, **sizes), like.device, like.dtype).eval()


def has_fla() -> bool:
    return importlib.util.find_spec("fla") is not None


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def linear_flops(decoder: nn.Module) -> int:
    """Floating-point operations of all linear layers of a decoder without head for one position, forward only."""
    return sum(2 * module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))


def bytes_per_step(model: ARMTForCausalLM) -> tuple[int, int]:
    """
    Bytes that generating a token has to read: weights, once a step, and associative state, once a row. The embedding
    counts as the head only, of which it is a row otherwise.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if embedding.data_ptr() != head.data_ptr():
        weights -= embedding.nbytes
    states = [memory.zero_state(1, "meta") for memory in model.memory.values()]
    return weights, sum(state.A.nbytes + (0 if state.z is None else state.z.nbytes) for state in states)


def _build(config, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
