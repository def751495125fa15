"""Small Llamas from scratch, tokenizer included, for as many minutes as are given."""

import array
import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


BOS, EOS, PAD = "<s>", "</s>", "<pad>"


class PretrainingError(ValueError):
    """Sizes or data that no model comes of, with the reason."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every digit is a token; it puts nothing around texts by itself."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 bytes are in the vocabulary, so that nothing is unknown.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(tqdm(texts, "train tokenizer", unit="text", mininterval=2), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, sample: str) -> None:
    """
    Saves a tokenizer, and checks that what users load gives the same ids for a text and the text back.

    Raises:
        PretrainingError: if it does not.
    """
    tokenizer.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = loaded(sample, verbose=False)["input_ids"]
    if ids != tokenizer.backend_tokenizer.encode(sample).ids or loaded.decode(ids) != sample:
        raise PretrainingError("the saved tokenizer does not give back its text")


def make_llama(tokenizer: PreTrainedTokenizerFast, sizes: dict[str, int], most_parameters: int) -> LlamaForCausalLM:
    """
    A Llama with random weights and tied embeddings.

    Args:
        tokenizer: its vocabulary and special tokens.
        sizes: `hidden`, `layers`, `heads`, `kv_heads`, `intermediate` and `context`.
        most_parameters: that it may have.

    Raises:
        PretrainingError: if it has more.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        intermediate_size=sizes["intermediate"],
        max_position_embeddings=sizes["context"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    if model.num_parameters() > most_parameters:
        raise PretrainingError(f"{model.num_parameters():,} parameters; choose sizes with at most {most_parameters:,}")
    return model


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts in a row as uint16, each between <s> and </s>."""
    packed = array.array("H")
    # The library encodes a list on all cores; in groups, because its results take far more memory than the ids.
    for i in tqdm(range(0, len(texts), 32), "tokenize", unit="group"):
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[i : i + 32], add_special_tokens=False):
            packed.extend([tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id])
    return torch.frombuffer(packed, dtype=torch.uint16)


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """`(B, T - 1)` loss of every token of `(B, T)` windows but the first, in nats."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float().flatten(0, 1)
    return nn.functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="none").view(len(windows), -1)


def weighted_loss(model: nn.Module, windows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Mean of [`token_losses`], where `(B, T - 1)` weights are given by these."""
    losses = token_losses(model, windows)
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def train_for(
    model: nn.Module,
    minutes: float,
    draw: Callable[[], tuple[torch.Tensor, torch.Tensor | None]],
    lr: float,
    warmup: int,
    compiled: bool,
) -> dict[str, Any]:
    """
    Trains a model with AdamW, on a GPU in bfloat16 autocast; the cosine schedule ends with the time.

    Args:
        model: on its device.
        minutes: compilation included.
        draw: makes a batch: windows and weights as for [`weighted_loss`], each time of the same shape.
        lr, warmup: peak learning rate, and steps to it.
        compiled: whether to compile the loss.

    Returns:
        `steps`, `tokens_seen`, `train_seconds`, `first_step_seconds` and the curve of step, seconds and loss.

    Raises:
        PretrainingError: if the loss is no number, or the first step takes all the time.
    """
    device = next(model.parameters()).device
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    loss_of = torch.compile(weighted_loss) if compiled else weighted_loss
    model.train()
    start, limit, compiled_at = time.monotonic(), minutes * 60, 0.0
    step, tokens, elapsed, progress, curve = 0, 0, 0.0, 0.0, []
    bar = tqdm(total=round(limit), desc="train", unit="s", mininterval=5)
    while progress < 1:
        warm = min(1.0, max((step + 1) / warmup, 10 * progress))  # over by a tenth of the time at the latest
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (1 + math.cos(math.pi * progress)) / 2
        windows, weights = draw()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # on most CPUs it is slow
            loss = loss_of(model, windows, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + windows[:, 1:].numel()
        # Reading the loss waits for the device; every tenth step is enough to keep the clock true.
        if step == 1 or step % 10 == 0:
            curve.append((step, round(time.monotonic() - start, 1), round(loss.item(), 4)))
            if not math.isfinite(curve[-1][2]):
                raise PretrainingError(f"the loss is {loss.item()} at step {step}")
            bar.set_postfix(step=step, loss=f"{curve[-1][2]:.3f}", refresh=False)
        elapsed = time.monotonic() - start
        compiled_at = compiled_at or elapsed  # the schedule starts after the first step, which compiles
        if compiled_at >= limit:
            raise PretrainingError(
                f"the first step alone took {compiled_at:.0f} s; give more minutes, or do not compile"
            )
        progress = (elapsed - compiled_at) / (limit - compiled_at)
        bar.update(min(int(elapsed), bar.total) - bar.n)
    bar.close()
    return {"steps": step, "tokens_seen": tokens, "train_seconds": round(elapsed, 1),
            "first_step_seconds": round(compiled_at, 1),
            "curve_of_step_seconds_loss": curve[:: -math.ceil(len(curve) / 100)][::-1]}  # fmt: skip


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes `training.json`, an entry a line, and lets everybody read what is in the folder."""
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items())
    (folder / "training.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
