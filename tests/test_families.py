"""Every decoder family of the table in families.py carries a memory without any code of its own."""

import random
from pathlib import Path

import pytest
import torch
from families import (
    FAMILIES,
    NUM_MEM_TOKENS,
    REFUSED,
    SEGMENT_SIZE,
    Family,
    add_memory,
    random_ids,
    tiny_backbone,
    tiny_model,
)
from helpers import difference, pad_left, read_in_chunks

from modeling_armt import ARMTForCausalLM
from modeling_armt.attachment_armt import SegmentPass
from modeling_armt.conversion.convert import ConversionError, attach_checked, convert


LENGTH = 3 * SEGMENT_SIZE + 3

every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
@torch.no_grad()
def test_one_segment_is_the_backbones_own_call(name: str):
    backbone = tiny_backbone(FAMILIES[name])
    ids = random_ids(2, SEGMENT_SIZE)
    expected = backbone(ids, use_cache=False).logits
    model = add_memory(backbone)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@every_family
@torch.no_grad()
def test_every_layer_reads_and_writes(name: str):
    model = tiny_model(name)
    layers = model.config.text_config.num_hidden_layers
    segment = SegmentPass(model.memory, dict.fromkeys(range(layers)), NUM_MEM_TOKENS, write_at=SEGMENT_SIZE)
    with segment.active():
        model.decoder(random_ids(1, SEGMENT_SIZE + NUM_MEM_TOKENS), use_cache=False)
    assert segment.fired == [(kind, layer) for layer in range(layers) for kind in ("read", "write")]
    assert all(state.A.abs().sum() > 0 for state in segment.states.values())


@every_family
@torch.no_grad()
def test_memory_of_every_layer_moves_the_logits_from_the_second_segment_on(name: str):
    model, ids = tiny_model(name), random_ids(1, LENGTH)
    before = model(ids, use_cache=False).logits
    for layer, memory in model.memory.items():
        weight = memory.memory_value.weight
        original = weight.clone()
        weight.mul_(2)
        moved = (model(ids, use_cache=False).logits - before).abs().amax(dim=(0, 2))
        weight.copy_(original)
        assert not moved[:SEGMENT_SIZE].any(), f"layer {layer}"
        assert moved[SEGMENT_SIZE:].min() > 1e-6, f"layer {layer}"


def check_chunks(model: ARMTForCausalLM, tolerance: float):
    """Invariant 2 on one text: uncached, cached, chunked and token by token agree."""
    ids = random_ids(1, LENGTH)
    expected = model(ids, use_cache=False).logits
    splits = {"cached": [LENGTH], "token by token": [1] * LENGTH}
    for seed in range(3):
        cuts = sorted(random.Random(seed).sample(range(1, LENGTH), 4))
        splits[f"split at {cuts}"] = [b - a for a, b in zip([0, *cuts], [*cuts, LENGTH], strict=True)]
    for name, sizes in splits.items():
        assert difference(read_in_chunks(model, ids, sizes)[0], expected) <= tolerance, name


def check_ragged_batch(model: ARMTForCausalLM, tolerance: float):
    """Invariant 3 on one batch: left-padded rows of unequal length equal each row alone, also when read in calls."""
    rows = [random_ids(length, seed=length) for length in (LENGTH, SEGMENT_SIZE + 2, 3, SEGMENT_SIZE)]
    ids, mask = pad_left(rows)
    alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    first = LENGTH - 2  # every row has something to read in the first call
    whole = {
        "uncached": model(ids, attention_mask=mask, use_cache=False).logits,
        "cached": model(ids, attention_mask=mask, use_cache=True).logits,
        "chunked": read_in_chunks(model, ids, [first, 1, 1], mask)[0],
    }
    for way, logits in whole.items():
        for number, expected in enumerate(alone):
            assert difference(logits[number, -len(expected) :], expected) <= tolerance, f"{way}, row {number}"

    more = random_ids(len(rows), SEGMENT_SIZE + 1, seed=1)  # every row fills its segment at another step
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    steps, _ = read_in_chunks(model, more, [1] * more.shape[1], cache=cache)
    for number, row in enumerate(rows):
        expected = model(torch.cat([row, more[number]])[None], use_cache=False).logits[0, len(row) :]
        assert difference(steps[number], expected) <= tolerance, f"continued, row {number}"


@every_family
@torch.no_grad()
def test_chunks_do_not_matter(name: str):
    check_chunks(tiny_model(name), FAMILIES[name].tolerance)


@every_family
@torch.no_grad()
def test_neighbours_and_padding_do_not_matter(name: str):
    check_ragged_batch(tiny_model(name), FAMILIES[name].tolerance)


@every_family
def test_conversion_accepts_the_family(name: str):
    attach_checked(tiny_backbone(FAMILIES[name]), segment_size=SEGMENT_SIZE, num_mem_tokens=NUM_MEM_TOKENS)


@pytest.mark.filterwarnings("ignore:.*without a tokenizer")
@pytest.mark.parametrize(("family", "reason"), REFUSED.values(), ids=REFUSED)
def test_conversion_refuses_the_family(family: Family, reason: str, tmp_path: Path):
    tiny_backbone(family).save_pretrained(tmp_path / "backbone")
    with pytest.raises(ConversionError, match=family.model_type):
        convert(tmp_path / "backbone", tmp_path / "out", SEGMENT_SIZE, NUM_MEM_TOKENS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "reason"), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_refused_families_do_fail(family: Family, reason: str):
    """The refusal is not out of caution. Each family fails in its own way: wrong logits, or an error of its layers."""
    backbone = tiny_backbone(family)
    with pytest.raises(Exception):  # noqa: B017
        check_chunks(add_memory(backbone), family.tolerance)
