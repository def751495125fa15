"""What a call may be given, and what is wrong with the rest: every error says what, where, and what to do."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .cache_armt import ARMTCache
from .segmentation_armt import RealTokens


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel


def check_input(
    model: "ARMTPreTrainedModel",
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.FloatTensor | None,
    attention_mask: torch.Tensor | None,
    cache: ARMTCache | None,
    whole: bool,
) -> tuple[torch.Tensor, RealTokens]:
    """
    Checks the text of a call.

    Args:
        input_ids: `(B, T)`, or `inputs_embeds` `(B, T, D)`.
        attention_mask: `(B, T)`, or with the columns that `cache` has read before in front.
        whole: whether this is a text as a whole, rather than one of several calls that read it into one cache.

    Returns:
        `input_ids` or `inputs_embeds`, and where the real tokens are.

    Raises:
        ValueError: saying what is wrong.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds.")
    source, rank = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    if source.dim() != rank:
        raise ValueError(f"the input has shape {tuple(source.shape)}; it must have {rank} dimensions.")
    batch_size, num_columns = source.shape[:2]
    if num_columns == 0:
        raise ValueError("the input is empty: a text needs at least one token to be read.")
    # A single token comes from generate, and looking at it would wait for the device.
    if input_ids is not None and (num_columns > 1 or input_ids.device.type == "cpu"):
        _check_ids(input_ids, model.get_input_embeddings().num_embeddings)
    if cache is not None and cache.batch_size not in (batch_size, 1, -1):
        raise ValueError(f"the cache has {cache.batch_size} rows, the input {batch_size}.")
    if attention_mask is not None:
        before = 0 if cache is None else cache.columns
        expected = [(batch_size, columns) for columns in (num_columns, before + num_columns)]
        if attention_mask.shape not in expected:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {expected[0]}, or {expected[1]} "
                "with the columns read before."
            )
        attention_mask = attention_mask[:, -num_columns:]
    tokens = RealTokens(batch_size, num_columns, attention_mask)
    if whole and 0 in tokens.counts:
        raise ValueError(
            f"row {tokens.counts.index(0)} is all padding: there is nothing to read in it. Drop the row, or mark its "
            "tokens with 1 in attention_mask."
        )
    return source, tokens


def _check_ids(input_ids: torch.Tensor, vocabulary: int) -> None:
    low, high = (int(value) for value in torch.aminmax(input_ids))
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"input_ids holds token id {low if low < 0 else high}, but the vocabulary has ids 0 to {vocabulary - 1}. "
            "Was the text tokenized with this checkpoint's tokenizer?"
        )


def refuse_arguments(kwargs: dict) -> None:
    """Refuses arguments of stock models that would silently do the wrong thing here."""
    if kwargs.get("output_attentions"):
        raise ValueError("attentions span one segment at a time and are not returned; call the backbone for them.")
    if kwargs.get("position_ids") is not None:
        raise ValueError(
            "positions restart in every segment, so position_ids cannot be passed. Packed (padding-free) batches do "
            "not work either: give every text a row of its own and an attention_mask."
        )


def check_training(model: "ARMTPreTrainedModel", bptt_segments: int | None) -> None:
    """Refuses ways to train that would lose gradients."""
    if model.training and getattr(model.decoder, "gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing is switched on inside the backbone, where it loses the memory. Call "
            "gradient_checkpointing_enable() on the ARMT model instead; it works per segment."
        )
    if bptt_segments is not None and (type(bptt_segments) is not int or bptt_segments < 1):
        raise ValueError(f"bptt_segments is {bptt_segments!r}; it must be at least 1, or None for no truncation.")


def check_position_table(model: "ARMTPreTrainedModel") -> None:
    """Refuses segments that are longer than the learned positions of a backbone that has such a table."""
    config = model.config
    needed = config.segment_size + config.num_mem_tokens
    positions = getattr(config.text_config, "max_position_embeddings", None)
    tables = [module for module in model.decoder.modules() if isinstance(module, nn.Embedding)]
    tables = [table for table in tables if table is not model.get_input_embeddings()]
    learned = any(table.num_embeddings - getattr(table, "offset", 0) == positions for table in tables)
    if learned and needed > positions:
        raise ValueError(
            f"segment_size + num_mem_tokens is {needed}, but this backbone has learned {positions} positions. Use a "
            f"segment_size of at most {positions - config.num_mem_tokens}."
        )
