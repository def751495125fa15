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
        _check_ids(input_ids, model.num_embeddings)
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


def check_columns(columns: torch.Tensor, num_columns: int) -> torch.Tensor:
    """A `logits_to_keep` tensor (indices from either end, or a bool mask of all columns) as indices from the start."""
    if columns.dtype == torch.bool and columns.shape == (num_columns,):
        columns = columns.nonzero().squeeze(1)
    if columns.dim() != 1 or columns.dtype == torch.bool or columns.numel() == 0:
        raise ValueError(
            f"logits_to_keep has shape {tuple(columns.shape)}; pass a number, a 1D tensor of columns or a mask."
        )
    if int(columns.min()) < -num_columns or int(columns.max()) >= num_columns:
        raise ValueError(f"logits_to_keep asks for columns beyond the {num_columns} of this input.")
    return columns % num_columns


def refuse_arguments(kwargs: dict, accepted: tuple[str, ...]) -> None:
    """Refuses arguments of stock models that would silently do the wrong thing here, and unknown ones."""
    if kwargs.get("output_attentions"):
        raise ValueError("attentions span one segment at a time and are not returned; call the backbone for them.")
    if kwargs.get("position_ids") is not None:
        raise ValueError(
            "positions restart in every segment, so position_ids cannot be passed. Packed (padding-free) batches do "
            "not work either: give every text a row of its own and an attention_mask (in TRL: packing=False, "
            "padding_free=False)."
        )
    unknown = [
        name for name, value in kwargs.items() if name not in accepted and value is not None and value is not False
    ]
    if unknown:
        raise TypeError(f"forward does not take {', '.join(unknown)}; leave it out.")


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
    """Refuses segments longer than a backbone's learned positions, or than its rotary embeddings stay fixed."""
    config = model.config
    needed = config.segment_size + config.num_mem_tokens
    positions = getattr(config.text_config, "max_position_embeddings", None)
    tables = [module for module in model.decoder.modules() if isinstance(module, nn.Embedding)]
    tables = [table for table in tables if table is not model.get_input_embeddings()]
    learned = any(table.num_embeddings - getattr(table, "offset", 0) == positions for table in tables)
    if learned and needed > positions:
        raise ValueError(
            f"segment_size + num_mem_tokens is {needed}, but this backbone has learned only {positions} positions. "
            f"Use a segment_size of at most {positions - config.num_mem_tokens}."
        )
    rope = getattr(config.text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings")
        original = original or getattr(config.text_config, "original_max_position_embeddings", None) or positions
        if needed > original:
            raise ValueError(
                f"this backbone changes its {rope['rope_type']} rotary embeddings beyond {original} positions, in the "
                f"middle of a segment. Use a segment_size of at most {original - config.num_mem_tokens}."
            )
