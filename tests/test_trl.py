"""TRL's SFTTrainer on an ARMT checkpoint: it trains what reads with memory, and refuses what has no segments."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.demo import BACKBONE


trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
SEGMENT_SIZE = 8
TEXTS = ["The old house stood at the end of the road. " * number for number in (1, 3, 4, 2)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BACKBONE)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """A tiny random model with memories that matter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2))
    model = ARMTForCausalLM.from_backbone(backbone, segment_size=SEGMENT_SIZE, num_mem_tokens=2, d_mem=16)
    for memory in model.memory.values():
        torch.nn.init.normal_(memory.memory_value.weight, std=0.2)
    folder = tmp_path_factory.mktemp("trl") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint) -> ARMTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def sft_trainer(model, tokenizer, folder: Path, texts: list[str] = TEXTS, peft: bool = True, **options):
    arguments = {"max_steps": 1, "per_device_train_batch_size": len(texts), "logging_steps": 1, "report_to": []}
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), **{**arguments, "bf16": False, **options}),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=lora_config(model, r=4) if peft else None,
    )


@pytest.mark.parametrize("checkpoints", [True, False], ids=["gradient checkpointing", "plain"])
def test_the_loss_is_that_of_a_model_that_reads_with_memory(model, tokenizer, tmp_path, checkpoints):
    trainer = sft_trainer(model, tokenizer, tmp_path, gradient_checkpointing=checkpoints)
    ids = [tokenizer(text + (tokenizer.eos_token or ""))["input_ids"] for text in TEXTS]
    longest = max(map(len, ids))
    batch = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        expected = model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss.item()
        without = model.model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss.item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - without) > 1e-2


def test_lora_and_memory_are_trained_and_saved(model, tokenizer, checkpoint, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = sft_trainer(model, tokenizer, tmp_path, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    after = adapted.merge_and_unload().state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("memory")} <= changed
    assert "model.model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.model.embed_tokens.weight" not in changed
    with torch.no_grad():
        ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
        trained = trainer.model.eval()(ids, use_cache=False).logits
        torch.testing.assert_close(adapted.eval()(ids, use_cache=False).logits, trained, atol=1e-4, rtol=1e-4)


def test_all_parameters_can_be_trained(model, tokenizer, tmp_path):
    trainer = sft_trainer(model, tokenizer, tmp_path, peft=False, max_steps=3, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options",
    [{"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}],
    ids=["packing", "padding-free"],
)
def test_several_texts_in_a_row_are_refused(model, tokenizer, tmp_path, options):
    trainer = sft_trainer(model, tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match="give every text a row of its own.*packing=False, padding_free=False"):
        trainer.train()
