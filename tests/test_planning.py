"""`armt convert --dry-run`: sizes of the model that conversion would make, without any weights."""

from dataclasses import replace

import pytest
import torch
from families import COMMON, FAMILIES, REFUSED, tiny_backbone
from transformers import CONFIG_MAPPING

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.convert import ConversionError
from modeling_armt.conversion.planning import Plan, plan


OPTIONS = {"segment_size": 8, "num_mem_tokens": 3, "d_mem": 16}


def planned(name: str, folder, **options) -> Plan:
    """From nothing but the configuration."""
    family = FAMILIES[name]
    CONFIG_MAPPING[family.model_type](**{**COMMON, **family.options}).save_pretrained(folder)
    return plan(folder, **{**OPTIONS, **options})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2", "falcon", "mixtral", "minicpm3"])
def test_sizes_are_those_of_the_model(name: str, tmp_path):
    found = planned(name, tmp_path)
    backbone = tiny_backbone(FAMILIES[name]).float()
    model = ARMTForCausalLM.from_backbone(backbone, **OPTIONS)
    assert found.backbone_parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert (
        found.memory_parameters
        == sum(parameter.numel() for parameter in model.parameters()) - found.backbone_parameters
    )
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        cache = model(torch.ones(1, 2 * 8 - 1, dtype=torch.long), use_cache=True).cache
    assert found.state == sum(tensor.nbytes for state in cache.states.values() for tensor in state)
    # 7 tokens of 8 are in the open segment
    assert found.keys * 7 // 8 == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.keys.layers)


def test_options_and_dtype_count(tmp_path):
    whole = planned("llama", tmp_path)
    half = planned("llama", tmp_path, memory_layers=[1], dtype="bfloat16", variant="paper")
    assert (half.state, half.keys, half.dtype) == (whole.state // 2, whole.keys // 2, torch.bfloat16)
    assert half.weights == 2 * half.backbone_parameters + 4 * half.memory_parameters


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_what_is_larger_than_this_machine_does_not_fit(place: str, tmp_path):
    found = planned("llama", tmp_path)
    assert found.fits and str(found).endswith("it fits")
    full = replace(found, **{place: found.weights})
    assert not full.fits and str(full).endswith("it does not fit")


def test_what_cannot_be_converted_is_refused(tmp_path):
    family = REFUSED["mamba"][0]
    CONFIG_MAPPING[family.model_type](**{**COMMON, **family.options}).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ConversionError, match="mamba"):
        plan(tmp_path / "mamba", **OPTIONS)
    with pytest.raises(ValueError, match="segment_size is 0"):
        planned("llama", tmp_path / "llama", segment_size=0)
    with pytest.raises(ConversionError, match="not a model that transformers can load"):
        plan(tmp_path / "nothing")
