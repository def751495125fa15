"""
What quantization costs: the loss of a pretrained backbone before and after, and (slow) the score of a trained memory.
That quantized models load, save and reload with their memory in float32 is in test_portability.py.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.demo.demonstration import tell_stories
from modeling_armt.conversion.demo.recall import RecallTask


pytestmark = pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")
SEGMENT_SIZE = 32
TEXT = (
    "It was late in the evening when the old man came home. He shut the door behind him, put his hat upon the table, "
    "and sat down before the fire without a word. His daughter looked at him for a moment, and then she went into the "
    "other room to fetch his supper. 'You are very late,' she said at last. 'I have been to the church,' he answered."
)


@pytest.fixture(params=["bitsandbytes 4-bit", "torchao int8"])
def quantization(request) -> BitsAndBytesConfig | TorchAoConfig:
    """As the README has it, but for the dtype: not every CPU knows bfloat16."""
    if "bitsandbytes" in request.param:
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def load(folder: Path, **options) -> ARMTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def test_the_loss_on_text_stays(quantization, tmp_path):
    convert(BACKBONE, tmp_path / "armt", SEGMENT_SIZE, num_mem_tokens=4, d_mem=8, dtype="float32")
    ids = AutoTokenizer.from_pretrained(BACKBONE)(TEXT, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 2 * SEGMENT_SIZE
    original, quantized = load(tmp_path / "armt"), load(tmp_path / "armt", quantization_config=quantization)
    before, after = (model(ids, labels=ids).loss.item() for model in (original, quantized))
    assert before != after  # it is quantized
    assert after == pytest.approx(before, rel=0.1 if isinstance(quantization, BitsAndBytesConfig) else 0.01)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters_name_the_same_linears_as_without(quantization, tmp_path):
    """The first one and a second one."""
    convert(BACKBONE, tmp_path / "armt", SEGMENT_SIZE, num_mem_tokens=4, d_mem=8, dtype="float32")
    expected = lora_config(load(tmp_path / "armt")).target_modules
    model = load(tmp_path / "armt", quantization_config=quantization)
    assert lora_config(model).target_modules == expected
    adapted = get_peft_model(model, lora_config(model))
    assert lora_config(adapted).target_modules == expected
    adapted.add_adapter("second", lora_config(adapted))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_gptq(tmp_path):
    """It has to be told, twice, where the layers are; and asks for a switch that the backbone has."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    backbone = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1))
    original = ARMTForCausalLM.from_backbone(backbone, segment_size=SEGMENT_SIZE, num_mem_tokens=4, d_mem=8).eval()
    for memory in original.memory.values():
        torch.nn.init.normal_(memory.memory_value.weight, std=0.1)
    original.save_pretrained(tmp_path / "armt")

    config = AutoConfig.from_pretrained(tmp_path / "armt")
    config.use_cache = False
    gptq = GPTQConfig(
        bits=4, dataset=[TEXT] * 4, tokenizer=tokenizer, group_size=32, block_name_to_quantize="model.model.layers"
    )
    model = load(tmp_path / "armt", config=config, quantization_config=gptq, device_map="cpu")
    model.config.use_cache = True
    model.config.quantization_config.block_name_to_quantize = "model.model.layers"
    model.save_pretrained(tmp_path / "gptq")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", device_map="cpu").eval()

    assert sum(type(module) is not nn.Linear for module in linears(again.decoder)) == 14
    assert {parameter.dtype for name, parameter in again.named_parameters() if name.startswith("memory")} == {
        torch.float32
    }
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = original(ids).logits
    assert (model(ids).logits - expected).abs().mean() < 0.5 * expected.std()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=4, min_new_tokens=4).shape[1] == ids.shape[1] + 4


def linears(module: nn.Module) -> list[nn.Module]:
    """The projections of all layers."""
    return [child for name, child in module.named_modules() if name.endswith("_proj")]


@pytest.mark.slow
def test_what_was_told_is_recalled_all_the_same(quantization, tmp_path):
    demo = tmp_path / "demo"
    subprocess.run([sys.executable, "-m", "modeling_armt.conversion", "demo", "--out", str(demo)], check=True)
    check_recall(demo, quantization)


def check_recall(folder: Path, quantization) -> None:
    original, quantized = load(folder), load(folder, quantization_config=quantization)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    task = RecallTask(tokenizer, tell_stories(original, tokenizer), SEGMENT_SIZE)
    samples = list(itertools.islice(task.samples([16], seed=0), 100))
    before, after = task.score(original, samples), task.score(quantized, samples)
    print(f"recall over 16 segments: {before:.1%} before quantization, {after:.1%} after")
    assert before > 0.8
    assert after > before - 0.05
    assert task.score(quantized, samples, memory=False) < 0.3
    memories = [parameter for name, parameter in quantized.named_parameters() if name.startswith("memory")]
    assert {parameter.dtype for parameter in memories} == {torch.float32}
