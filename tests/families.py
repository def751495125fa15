"""
Tiny random decoders of every family that ARMT is tested on, with memories attached.

A window is always shorter than a segment, layers of every kind that a family mixes are present, and all weights are
random and large enough to matter: a mask, a position or a norm that is off by one then shows in the logits.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from modeling_armt import ARMTForCausalLM


SEGMENT_SIZE = 8
NUM_MEM_TOKENS = 3
D_MEM = 16  # with few features a random read divides by almost nothing, which magnifies rounding
WINDOW = 5
VOCABULARY = 61
PAD, BOS, EOS = 0, 1, 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LLAMA = {"num_key_value_heads": 2, "intermediate_size": 64}
WIDE_HEADS = {**LLAMA, "head_dim": 12}  # heads * head_dim != hidden_size
SLIDING_LAYER = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LINEAR_LAYER = {"layer_types": ["linear_attention", "full_attention"]}
LOCAL_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
ROUTED_EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 16}
LATENT_ATTENTION = {
    "intermediate_size": 64,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA_HEADS = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    "mamba_expand": 2,
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True)
class Family:
    """A row of the table: a `model_type` and what its configuration needs besides `COMMON`."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    # What equal computations may differ by.
    tolerance: float = 1e-9


def _float32_attention(model_type: str, **options) -> Family:
    """A family whose attention weights are float32, whatever the dtype of the model."""
    return Family(model_type, options, tolerance=1e-5)


def _mixture(model_type: str, **options) -> Family:
    """A mixture of experts: they are computed together by an operation that knows no float64."""
    return Family(model_type, {**LLAMA, **options}, torch.float32, tolerance=1e-5)


FAMILIES: dict[str, Family] = {
    "afmoe": _mixture("afmoe", **SLIDING_LAYER, **ROUTED_EXPERTS, num_experts=4, head_dim=8, num_dense_layers=1),
    "apertus": Family("apertus", LLAMA),
    "arcee": Family("arcee", LLAMA),
    "bert": Family("bert", {"intermediate_size": 64, "is_decoder": True}),
    "biogpt": Family("biogpt", {"intermediate_size": 64}),
    "bitnet": Family("bitnet", LLAMA),
    "bloom": _float32_attention("bloom"),
    "codegen": _float32_attention("codegen", rotary_dim=4),
    "cohere": Family("cohere", {**LLAMA, "logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": Family("cohere2", {**LLAMA, **SLIDING_LAYER}),
    "cohere2_moe": _mixture("cohere2_moe", **SLIDING_LAYER, num_experts=4, num_experts_per_tok=2),
    "ctrl": Family("ctrl", {"dff": 64}),
    "cwm": Family("cwm", {**LLAMA, **SLIDING_LAYER}),
    "deepseek_v2": _mixture("deepseek_v2", **LATENT_ATTENTION, **ROUTED_EXPERTS, first_k_dense_replace=1),
    "deepseek_v3": _mixture(
        "deepseek_v3", **LATENT_ATTENTION, **ROUTED_EXPERTS, first_k_dense_replace=1, n_group=2, topk_group=1
    ),
    "diffllama": Family("diffllama", LLAMA),
    "ernie4_5": Family("ernie4_5", WIDE_HEADS),
    "ernie4_5_moe": _mixture("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=16),
    "exaone4": Family("exaone4", {**LLAMA, **SLIDING_LAYER}),
    "exaone_moe": _mixture("exaone_moe", **SLIDING_LAYER, **ROUTED_EXPERTS, num_experts=4),
    "falcon": Family("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Family("falcon", {"alibi": True, "multi_query": False}),
    "flex_olmo": _mixture("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "gemma": Family("gemma", WIDE_HEADS),
    "gemma2": _float32_attention("gemma2", **WIDE_HEADS, **SLIDING_LAYER, final_logit_softcapping=2.0),
    "gemma3_text": Family("gemma3_text", {**WIDE_HEADS, **SLIDING_LAYER}),
    "gemma4_text": Family(
        "gemma4_text",
        {
            **WIDE_HEADS,
            **SLIDING_LAYER,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "glm": Family("glm", {**LLAMA, "head_dim": 8}),
    "glm4": Family("glm4", {**LLAMA, "head_dim": 8}),
    "glm4_moe": _mixture("glm4_moe", **ROUTED_EXPERTS, first_k_dense_replace=1, head_dim=8),
    "gpt2": Family("gpt2"),
    "gpt_bigcode": Family("gpt_bigcode"),
    "gpt_neo": _float32_attention(
        "gpt_neo", attention_types=[[["global", "local"], 1]], window_size=WINDOW, intermediate_size=64
    ),
    "gpt_neo_short": _float32_attention(  # its table of positions, and of masks, just holds a segment
        "gpt_neo",
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        intermediate_size=64,
        max_position_embeddings=SEGMENT_SIZE + NUM_MEM_TOKENS,
    ),
    "gpt_neox": Family("gpt_neox", {"intermediate_size": 64}),
    "gpt_neox_japanese": Family("gpt_neox_japanese", {"intermediate_multiple_size": 2}),
    "gpt_oss": _mixture("gpt_oss", **SLIDING_LAYER, **LOCAL_EXPERTS, head_dim=8),
    "gptj": _float32_attention("gptj", rotary_dim=4),
    "granite": Family(
        "granite",
        {
            **LLAMA,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 4.0,
        },
    ),
    "gpt2_short": Family("gpt2", {"max_position_embeddings": SEGMENT_SIZE + NUM_MEM_TOKENS}),
    "granite_swa": _float32_attention("granite_swa", **LLAMA, **SLIDING_LAYER),
    "granitemoe": _mixture("granitemoe", **LOCAL_EXPERTS),
    "granitemoeshared": _mixture("granitemoeshared", **LOCAL_EXPERTS, shared_intermediate_size=16),
    "helium": Family("helium", {**LLAMA, "head_dim": 8}),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", {**LLAMA, "head_dim": 8}),
    "hunyuan_v1_moe": _mixture("hunyuan_v1_moe", num_experts=4, moe_topk=2, head_dim=8),
    "hyperclovax": Family("hyperclovax", LLAMA),
    "jais2": Family("jais2", {**LLAMA, "head_dim": 8}),
    "jetmoe": _mixture("jetmoe", num_local_experts=4, kv_channels=8),
    "llama": Family("llama", LLAMA),
    "llama4_text": _mixture(
        "llama4_text",
        intermediate_size_mlp=64,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=WINDOW,
    ),
    "minicpm3": Family("minicpm3", LATENT_ATTENTION),
    "minimax_m2": _mixture("minimax_m2", **LOCAL_EXPERTS, head_dim=8),
    "ministral": Family("ministral", {**WIDE_HEADS, **SLIDING_LAYER}),
    "ministral3": Family("ministral3", WIDE_HEADS),
    "mistral": Family("mistral", {**LLAMA, "sliding_window": WINDOW}),
    "mixtral": _mixture("mixtral", **LOCAL_EXPERTS, sliding_window=WINDOW),
    "modernbert-decoder": Family(
        "modernbert-decoder",
        {
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "local_attention": WINDOW,
        },
    ),
    "mpt": _float32_attention("mpt"),
    "nanochat": Family("nanochat", LLAMA),
    "nemotron": Family("nemotron", {**LLAMA, "head_dim": 8}),
    "olmo": Family("olmo", {**LLAMA, "clip_qkv": 0.5}),
    "olmo2": Family("olmo2", LLAMA),
    "olmo3": Family("olmo3", {**LLAMA, **SLIDING_LAYER}),
    "olmoe": _mixture("olmoe", num_experts=4, num_experts_per_tok=2),
    "opt": Family("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt_projected": Family("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "persimmon": Family("persimmon", {"intermediate_size": 64}),
    "phi": Family("phi", LLAMA),
    "phi3": Family("phi3", {**LLAMA, "sliding_window": WINDOW}),
    "phimoe": _mixture("phimoe", **LOCAL_EXPERTS, sliding_window=WINDOW),
    "qwen2": Family("qwen2", {**LLAMA, **SLIDING_LAYER, "use_sliding_window": True}),
    "qwen2_moe": _mixture("qwen2_moe", **ROUTED_EXPERTS, num_experts=4, shared_expert_intermediate_size=16),
    "qwen3": Family("qwen3", {**WIDE_HEADS, **SLIDING_LAYER, "use_sliding_window": True}),
    "qwen3_moe": _mixture("qwen3_moe", **ROUTED_EXPERTS, num_experts=4, head_dim=8),
    "seed_oss": Family("seed_oss", WIDE_HEADS),
    "smollm3": Family("smollm3", {**LLAMA, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "stablelm": Family("stablelm", {**LLAMA, "use_parallel_residual": True}),
    "starcoder2": Family("starcoder2", {**LLAMA, "sliding_window": WINDOW}),
    "vaultgemma": _float32_attention("vaultgemma", **WIDE_HEADS, **SLIDING_LAYER),
    "xglm": Family("xglm", {"ffn_dim": 64}, torch.float32, 1e-5),  # its mask does not fit into float64
}

RECURRENT = "recurrent layers: their own state is neither cut at segment borders nor known to a cache of keys"
NO_CACHE = "knows no cache of keys, so it cannot read a segment in several calls"
NEEDS_IDS = "looks the token ids up in every layer, and memory tokens have none"

REFUSED: dict[str, tuple[Family, str]] = {
    "bamba": (Family("bamba", {**LLAMA, **MAMBA_HEADS, "attn_layer_indices": [1]}, torch.float32, 1e-5), RECURRENT),
    "falcon_h1": (Family("falcon_h1", {**LLAMA, **MAMBA_HEADS, "mamba_d_ssm": 64, "head_dim": 8}), RECURRENT),
    "falcon_mamba": (Family("falcon_mamba", {"state_size": 4}), RECURRENT),
    "gemma4_text": (
        Family(
            "gemma4_text",
            {
                **WIDE_HEADS,
                **SLIDING_LAYER,
                "global_head_dim": 8,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
            },
        ),
        NEEDS_IDS,
    ),
    "granitemoehybrid": (
        _mixture(
            "granitemoehybrid",
            **MAMBA_HEADS,
            layer_types=["mamba", "attention"],
            shared_intermediate_size=32,
            num_local_experts=0,
        ),
        RECURRENT,
    ),
    "jamba": (
        _mixture(
            "jamba",
            num_experts=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        RECURRENT,
    ),
    "lfm2": (Family("lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}), RECURRENT),
    "mamba": (Family("mamba", {"state_size": 4}), RECURRENT),
    "mamba2": (
        Family("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
        RECURRENT,
    ),
    "minimax": (_mixture("minimax", **LINEAR_LAYER, **LOCAL_EXPERTS, head_dim=8, block_size=4), RECURRENT),
    "nemotron_h": (
        Family(
            "nemotron_h",
            {
                **LLAMA,
                "hybrid_override_pattern": "M*",
                "mamba_num_heads": 8,
                "mamba_head_dim": 8,
                "ssm_state_size": 8,
                "n_groups": 1,
                "chunk_size": 4,
                "head_dim": 8,
            },
        ),
        RECURRENT,
    ),
    "olmo_hybrid": (_mixture("olmo_hybrid", **LINEAR_LAYER, **DELTA_NET), RECURRENT),
    "openai-gpt": (Family("openai-gpt"), NO_CACHE),
    "qwen3_5_text": (_mixture("qwen3_5_text", **LINEAR_LAYER, **DELTA_NET, head_dim=8), RECURRENT),
    "qwen3_next": (
        _mixture(
            "qwen3_next",
            **LINEAR_LAYER,
            **DELTA_NET,
            **ROUTED_EXPERTS,
            num_experts=4,
            shared_expert_intermediate_size=16,
            head_dim=8,
        ),
        RECURRENT,
    ),
    "recurrent_gemma": (
        Family(
            "recurrent_gemma",
            {**LLAMA, "lru_width": 32, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
        ),
        RECURRENT,
    ),
    "rwkv": (Family("rwkv", {"attention_hidden_size": 32}), RECURRENT),
}
"""Families that cannot carry a memory, and why."""


def tiny_backbone(family: Family, seed: int = 0) -> PreTrainedModel:
    """A random decoder of the family, in evaluation mode."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family.model_type](**{**COMMON, **family.options})
    model = AutoModelForCausalLM.from_config(config).to(family.dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:  # norms stay near 1, biases near 0
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def add_memory(backbone: PreTrainedModel, seed: int = 0, **options) -> ARMTForCausalLM:
    """
    The backbone with memories that matter. The value projections are small: the memory of a random model grows from
    segment to segment with large ones, which would measure rounding instead of the code.
    """
    torch.manual_seed(seed)
    options = {"segment_size": SEGMENT_SIZE, "num_mem_tokens": NUM_MEM_TOKENS, "d_mem": D_MEM, **options}
    model = ARMTForCausalLM.from_backbone(backbone, **options).to(backbone.dtype)
    for memory in model.memory.values():
        torch.nn.init.normal_(memory.memory_value.weight, std=0.05)
    return model


def tiny_model(name: str = "llama", seed: int = 0, **options) -> ARMTForCausalLM:
    """A model of the family of that name, in evaluation mode; `options` are fields of the ARMT configuration."""
    return add_memory(tiny_backbone(FAMILIES[name], seed), seed, **options)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without special tokens."""
    return torch.randint(EOS + 1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
