"""Pieces of a text as token ids."""

from transformers import PreTrainedTokenizerBase


def piece_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a part of a text: without special tokens, and without a warning if it is long."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts at the start of every text: its BOS token, or nothing."""
    return [] if tokenizer.bos_token_id not in tokenizer("")["input_ids"][:1] else [tokenizer.bos_token_id]


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-text token, or nothing if the tokenizer has none."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
