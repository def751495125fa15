"""One shipped code for all versions of transformers: what they renamed goes by both names."""

import pickle

import pytest
import torch
from families import random_ids, tiny_model
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from modeling_armt import ARMTCache, ARMTModel


NAMES = ["cache", "past_key_values"]
either_name = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@either_name
@torch.no_grad()
def test_forward_goes_on_from_a_cache_under_either_name(model, name: str):
    ids = random_ids(1, 30)
    expected = model(ids, use_cache=False).logits[:, 17:]
    cache = model(ids[:, :17]).cache
    output = model(ids[:, 17:], **{name: cache})
    torch.testing.assert_close(output.logits, expected, atol=1e-9, rtol=0)
    assert getattr(output, name) is cache


@either_name
@torch.no_grad()
def test_generate_read_and_the_model_without_head_take_either_name(model, name: str):
    ids = random_ids(1, 30)
    memory = model(ids).cache
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    by_name = [model.generate(ids[:, :4], **{key: memory.fork()}, **options) for key in (name, "cache")]
    assert by_name[0].equal(by_name[1])
    cache = memory.fork()
    assert model.read(ids[0], **{name: cache}).cache is cache
    cache = memory.fork()
    assert model.base_model(ids, **{name: cache})[name] is cache


@torch.no_grad()
def test_the_third_positional_argument_is_the_cache(model):
    cache = ARMTCache()
    assert model(random_ids(1, 5), None, cache).cache is cache and cache.tokens == [5]


def test_two_different_caches_are_one_too_many(model):
    with pytest.raises(ValueError, match="two names of one argument"):
        model(random_ids(1, 5), cache=ARMTCache(), past_key_values=ARMTCache())
    with pytest.raises(ValueError, match="two names of one argument"):
        model.generate(random_ids(1, 5), cache=ARMTCache(), past_key_values=ARMTCache())


@torch.no_grad()
def test_outputs_are_those_of_transformers_and_readable_under_both_names(model):
    output = model(random_ids(1, 5), use_cache=True)
    assert isinstance(output, CausalLMOutputWithPast)
    assert isinstance(ARMTModel.forward(model.base_model, random_ids(1, 5)), BaseModelOutputWithPast)
    for name in NAMES:
        assert name in output
        assert output[name] is output.get(name) is getattr(output, name) is output.to_tuple()[1]
    assert len(output) == 2
    other = ARMTCache()
    for name in NAMES:
        setattr(output, name, other)
        assert output.cache is output.past_key_values is output[1] is other
    again = pickle.loads(pickle.dumps(output))
    assert again.past_key_values.tokens == again.cache.tokens


def test_the_output_of_generate_has_its_cache_under_both_names(model):
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 2):
        output = model.generate(random_ids(1, 5), return_dict_in_generate=True, num_beams=beams, **options)
        assert isinstance(output.cache, ARMTCache) and output.past_key_values is output.cache
