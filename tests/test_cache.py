"""The cache as an object: forks, copies, statistics."""

import copy
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import NUM_MEM_TOKENS, SEGMENT_SIZE, random_ids, tiny_model
from helpers import cache_contents, pad_left, read_in_chunks, same

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt.cache_armt import SegmentKeys
from modeling_armt.memory_armt import MemoryState


LENGTH = 2 * SEGMENT_SIZE + 3


@pytest.fixture(scope="module")
def model() -> ARMTForCausalLM:
    return tiny_model("gemma3_text").float()


@torch.no_grad()
def read(model: ARMTForCausalLM, length: int = LENGTH, rows: int = 1) -> ARMTCache:
    return model(random_ids(rows, length)).cache


@torch.no_grad()
def answer(model: ARMTForCausalLM, cache: ARMTCache) -> torch.Tensor:
    """What the model says to a next text, without the cache noticing."""
    return model(random_ids(cache.batch_size, LENGTH, seed=5), cache=cache.fork()).logits


def pickled(cache: ARMTCache) -> ARMTCache:
    return pickle.loads(pickle.dumps(cache))


# The object


def test_an_empty_cache_is_the_start_of_a_text(model):
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        assert torch.equal(model(ids, cache=ARMTCache()).logits, model(ids).logits)


def test_the_length_is_the_number_of_columns_read(model):
    ids, mask = pad_left([random_ids(LENGTH), random_ids(3)])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).cache
    assert cache.get_seq_length() == LENGTH
    assert cache.tokens == [LENGTH, 3]


def test_a_cache_says_what_it_holds(model):
    assert repr(read(model, rows=2)) == f"ARMTCache(tokens=[{LENGTH}, {LENGTH}], segments=[2, 2], opened=[3, 3])"


def test_reset_forgets_everything(model):
    cache = read(model, rows=2)
    cache.reset()
    assert same(cache_contents(cache), cache_contents(ARMTCache()))
    assert not cache.is_initialized


@pytest.mark.parametrize("duplicate", [ARMTCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
@torch.no_grad()
def test_neither_side_sees_what_the_other_reads(duplicate, model):
    cache = read(model)
    before, expected = cache_contents(cache), answer(model, cache)
    twin = duplicate(cache)
    model(random_ids(1, LENGTH, seed=1), cache=twin)
    assert same(cache_contents(cache), before)
    twin = duplicate(cache)
    model(random_ids(1, LENGTH, seed=2), cache=cache)
    assert torch.equal(answer(model, twin), expected)


def test_a_fork_starts_a_new_conversation(model):
    fork = read(model).fork()
    assert fork.get_seq_length() == 0
    assert fork.tokens == [LENGTH]


def test_a_copy_goes_on_with_the_conversation(model):
    assert copy.deepcopy(read(model)).get_seq_length() == LENGTH


def test_a_fork_costs_no_memory(model):
    cache = read(model)
    fork = cache.fork()
    for layer, state in cache.states.items():
        assert fork.states[layer].A.data_ptr() == state.A.data_ptr()


@pytest.mark.parametrize("duplicate", [ARMTCache.fork, copy.deepcopy, pickled], ids=["fork", "deepcopy", "pickle"])
def test_a_copy_is_of_one_moment(duplicate, model, monkeypatch):
    """As when another thread reads on while it is made: here whenever the copy looks at a tensor."""
    cache, later = read(model), read(model, length=3 * LENGTH)
    expected, after = (cache_contents(duplicate(each)) for each in (cache, later))
    for place, name in ((MemoryState, "map"), (MemoryState, "__reduce_ex__"), (torch.Tensor, "__reduce_ex__")):
        original = getattr(place, name)

        def meanwhile(self, *args, original=original):
            cache.become(later)
            return original(self, *args)

        monkeypatch.setattr(place, name, meanwhile)
    copied = duplicate(cache)
    monkeypatch.undo()
    assert same(cache_contents(copied), expected)
    assert same(cache_contents(duplicate(cache)), after)


def test_a_reordering_that_fails_leaves_the_cache_as_it_was(model, monkeypatch):
    cache = read(model, rows=2)
    before = cache_contents(cache)
    monkeypatch.setattr(SegmentKeys, "map", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.reorder_cache(torch.tensor([1, 0]))
    assert same(cache_contents(cache), before)


def test_a_cache_cannot_be_cropped(model):
    with pytest.raises(NotImplementedError, match="cannot be taken back"):
        read(model).crop(1)


def test_attention_layers_cannot_advance_the_cache(model):
    with pytest.raises(NotImplementedError, match="model's forward"):
        read(model).update(torch.zeros(1), torch.zeros(1), 0)


# Statistics


@contextmanager
def recorded(model: ARMTForCausalLM, layer: int) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """All denominators, and all gammas, that one layer's memory uses."""
    memory, denominators, gammas = model.memory[str(layer)], [], []
    original = memory.read, memory.write

    def read(*args):
        x, terms = original[0](*args)
        denominators.append(terms.denominator)
        return x, terms

    def write(*args):
        state, terms = original[1](*args)
        denominators.append(terms.denominator)
        gammas.append(terms.gamma)
        return state, terms

    memory.read, memory.write = read, write
    try:
        yield denominators, gammas
    finally:
        del memory.read, memory.write


@pytest.mark.parametrize("layer", [0, 1])
def test_statistics_are_those_of_all_reads_and_writes(layer: int, model):
    with recorded(model, layer) as (denominators, gammas):
        cache = read(model, length=4 * SEGMENT_SIZE + 3)
    found, state = cache.stats()[layer], cache.states[layer]
    assert found["A_norm"] == pytest.approx([state.A.norm().item()])
    assert found["z_norm"] == pytest.approx([state.z.norm().item()])
    assert found["min_denominator"] == pytest.approx([min(d.min().item() for d in denominators[1:])])
    assert found["mean_gamma"] == pytest.approx([torch.cat(gammas, 1).mean().item()])
    assert len(gammas) == 4 and gammas[0].numel() == NUM_MEM_TOKENS


@pytest.mark.parametrize("sizes", [None, [5, 1, 9, 12], [1] * 27], ids=["at once", "in chunks", "token by token"])
@torch.no_grad()
def test_statistics_of_a_row_are_those_of_the_row_alone(sizes, model):
    rows = [random_ids(length, seed=length) for length in (27, 3, SEGMENT_SIZE, SEGMENT_SIZE + 2)]
    ids, mask = pad_left(rows)
    cache = read_in_chunks(model, ids, sizes or [27], mask, ARMTCache())[1]
    zeros = ("A_norm", "z_norm", "mean_gamma", "zero_gamma_share")
    for number, row in enumerate(rows):
        alone = model(row[None]).cache.stats()
        for layer, values in cache.stats().items():
            for name in values:
                value = alone[layer][name][0] if layer in alone else 0.0 if name in zeros else None
                expected = None if value is None else pytest.approx(value, rel=1e-3)
                assert values[name][number] == expected, f"row {number}, {name}"


def test_there_are_no_statistics_before_the_first_write(model):
    assert read(model, length=SEGMENT_SIZE - 1).stats() == {}


def test_without_denominator_there_are_no_statistics_of_it():
    found = read(tiny_model("llama", use_denom=False)).stats()[0]
    assert found["z_norm"] is None and found["min_denominator"] is None
    assert found["A_norm"][0] > 0


def test_a_cache_made_in_training_knows_norms_only():
    model = tiny_model("llama").train()
    with torch.no_grad():
        found = model(random_ids(1, LENGTH), use_cache=True).cache.stats()[0]
    assert found["A_norm"][0] > 0
    assert found["mean_gamma"] is None and found["min_denominator"] is None


def test_statistics_are_plain_numbers(model):
    found = read(model, rows=2).stats()
    assert {int(layer): values for layer, values in json.loads(json.dumps(found)).items()} == found
