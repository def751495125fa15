"""Tiny checkpoints for the tests of evaluation: one that has learned to remember a pair, and random ones."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.tasks import load_task


PAIR = {"segment_size": 4, "num_mem_tokens": 2, "d_mem": 8}


def symbol_model(seed: int = 0, hidden: int = 64, layers: int = 1) -> ARMTForCausalLM:
    """A random model of the symbols of associative retrieval, with a segment for each pair."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=104,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return ARMTForCausalLM.from_backbone(LlamaForCausalLM(config), **PAIR)


def with_memory(model: ARMTForCausalLM, seed: int = 0, std: float = 0.3) -> ARMTForCausalLM:
    """The model with memories that matter, without being trained."""
    torch.manual_seed(seed)
    for memory in model.memory.values():
        torch.nn.init.normal_(memory.memory_value.weight, std=std)
    return model.eval()


def train_on_one_pair(folder: Path) -> None:
    """Writes a model that tells the value of the one pair in the segment before, and its `training.json`."""
    model = symbol_model()
    task = load_task("associative_retrieval", vary=False)
    batches = task.train(task.length(1)).iter(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    perfect = 0
    for step in range(600):
        batch = next(batches)
        ids, labels = torch.tensor(batch["input_ids"]), torch.tensor(batch["labels"])
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20)
        output = model(ids, labels=labels, use_cache=False)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        perfect = perfect + 1 if bool((output.logits[:, -3:-1].argmax(-1) == labels[:, -2:]).all()) else 0
        if perfect == 5:
            break
    model.eval().save_pretrained(folder)
    write_training(folder, seed=7)


def write_training(folder: Path, seed: int, **recipe) -> None:
    """The part of a `training.json` that evaluation looks at."""
    content = {"seed": seed, "recipe": {"task": "associative_retrieval", "lr": 0.005, "seed": seed, **recipe}}
    (folder / "training.json").write_text(json.dumps(content))


def talking_model(folder: Path) -> ARMTForCausalLM:
    """The backbone of the demonstration, with memories that matter."""
    model = convert(BACKBONE, folder, segment_size=32, num_mem_tokens=4, d_mem=16, dtype="float32")
    with_memory(model, std=0.05).save_pretrained(folder)
    return model
