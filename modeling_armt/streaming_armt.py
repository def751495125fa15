"""
Token ids from anywhere: a tensor, a memory-mapped array, a generator. A text is read in blocks of whole segments, so
that of ten million tokens only a block ever becomes int64 or reaches the model's device.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_armt import ARMTCache


if TYPE_CHECKING:
    from .modeling_armt import ARMTForCausalLM


def read_stream(
    model: "ARMTForCausalLM",
    tokens: Any,
    cache: ARMTCache,
    schedule: str | None = None,
    block_segments: int = 512,
    progress: Callable[[int], Any] | None = None,
) -> CausalLMOutputWithPast:
    """[`ARMTForCausalLM.read`] into a cache, which changes all at once when everything is read."""
    if type(block_segments) is not int or block_segments < 1:
        raise ValueError(f"block_segments is {block_segments!r}; it must be at least 1.")
    size = block_segments * model.config.segment_size
    embedding = model.get_input_embeddings()
    work = cache.fork()
    work.columns, work.expendable = cache.columns, True
    output, start = None, 0
    # The first block fills the open segment up, so that no block ends inside one.
    for ids in token_blocks(tokens, size - max(cache.opened, default=0), size):
        _check_ids(ids, model.num_embeddings, start)
        if not embedding.weight.is_meta:  # offloaded: its hook moves the ids
            ids = ids.to(embedding.weight.device)
        options = {"logits_to_keep": 1, "output_hidden_states": False, "return_dict": True}
        output = model(ids, cache=work, schedule=schedule, **options)
        start += ids.shape[1]
        if progress is not None:
            progress(ids.shape[1])
    if output is None:
        raise ValueError("the input is empty: a text needs at least one token to be read.")
    work.expendable = False
    cache.become(work)
    output.cache = cache
    return output


def token_blocks(tokens: Any, first: int, size: int) -> Iterator[torch.Tensor]:
    """
    Cuts a text into blocks, taking no more of it than the next block needs.

    Args:
        tokens: what [`ARMTForCausalLM.read`] takes.
        first, size: tokens in the first block and in all others but the last.

    Yields:
        `(B, n)` int64 ids.

    Raises:
        ValueError: for what is not token ids.
    """
    if isinstance(tokens, (str, bytes, Mapping)) or not (hasattr(tokens, "shape") or isinstance(tokens, Iterable)):
        raise ValueError(f"the tokens are a {type(tokens).__name__}; pass token ids, such as a tokenizer's input_ids.")
    if hasattr(tokens, "shape"):
        yield from _slices(tokens, first, size)
        return
    stream = iter(tokens)
    for item in stream:  # the first one tells what it is a stream of
        whole = chain([item], stream)
        if isinstance(item, int) or getattr(item, "shape", None) == ():
            yield from _gather_ids(whole, first, size)
        elif isinstance(tokens, (list, tuple)):
            raise ValueError(
                "a list of lists could be a batch or the chunks of one text; pass a tensor (B, T) or iter(chunks)."
            )
        else:
            yield from _gather_chunks(whole, first, size)


def _slices(tokens: Any, first: int, size: int) -> Iterator[torch.Tensor]:
    shape = tuple(tokens.shape)
    if len(shape) not in (1, 2):
        raise ValueError(f"the tokens have shape {shape}; it must be (T,) or (B, T).")
    start, end = 0, first
    while start < shape[-1]:
        block = _as_tensor(tokens[..., start:end], start).long()
        yield block if len(shape) == 2 else block[None]
        start, end = end, end + size


def _gather_ids(stream: Iterator[int], first: int, size: int) -> Iterator[torch.Tensor]:
    start, want = 0, first
    while True:
        block = array("q")
        try:
            block.extend(islice(stream, want))
        except (TypeError, OverflowError) as error:
            raise ValueError(f"token {start + len(block)} cannot be read: {error}") from error
        if not block:
            return
        yield torch.frombuffer(block, dtype=torch.long)[None]
        start, want = start + len(block), size


def _gather_chunks(stream: Iterator[Any], first: int, size: int) -> Iterator[torch.Tensor]:
    block, filled, start = torch.empty(first, dtype=torch.long), 0, 0
    for chunk in stream:
        chunk = _as_tensor(chunk, start)
        if chunk.dim() != 1:
            raise ValueError(f"the chunk at token {start} has shape {tuple(chunk.shape)}; chunks are (n,).")
        start += len(chunk)
        while len(chunk):
            taken = chunk[: len(block) - filled]
            block[filled : filled + len(taken)] = taken
            chunk, filled = chunk[len(taken) :], filled + len(taken)
            if filled == len(block):
                yield block[None]
                block, filled = torch.empty(size, dtype=torch.long), 0
    if filled:
        yield block[None, :filled]


def _as_tensor(piece: Any, start: int) -> torch.Tensor:
    """A slice or chunk as a tensor of whatever integers it holds; a copy, since a mapped file is not writable."""
    try:
        piece = piece if isinstance(piece, torch.Tensor) else torch.tensor(piece)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the chunk at token {start} holds no token ids: {error}") from error
    if piece.numel() and (piece.is_floating_point() or piece.is_complex() or piece.dtype == torch.bool):
        raise ValueError(f"the tokens are {piece.dtype}; token ids are integers.")
    return piece


def _check_ids(ids: torch.Tensor, vocabulary: int, start: int) -> None:
    bad = (ids < 0) | (ids >= vocabulary)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        where = f" of row {row}" if len(ids) > 1 else ""
        raise ValueError(
            f"token {start + column}{where} is {int(ids[row, column])}, but the vocabulary has ids 0 to "
            f"{vocabulary - 1}. Was the text tokenized with this checkpoint's tokenizer?"
        )
