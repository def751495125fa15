"""Input that cannot be read raises, says what is wrong, and what to do about it."""

import pytest
import torch
from families import PAD, SEGMENT_SIZE, VOCABULARY, random_ids, tiny_model
from transformers import DynamicCache

from modeling_armt import ARMTCache, ARMTForCausalLM, ARMTModel


IDS = random_ids(2, SEGMENT_SIZE + 3)
ALL_PADDING = torch.tensor([[1] * IDS.shape[1], [0] * IDS.shape[1]])


@pytest.fixture(scope="module")
def model() -> ARMTForCausalLM:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def body() -> ARMTModel:
    return ARMTModel(tiny_model("llama").config).eval()


def with_id(value: int) -> torch.Tensor:
    ids = IDS.clone()
    ids[1, 4] = value
    return ids


BAD_INPUTS = {
    "no input": ({}, "either input_ids or inputs_embeds"),
    "both inputs": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 3, 32)}, "either input_ids or inputs_embeds"),
    "empty text": ({"input_ids": IDS[:, :0]}, "at least one token"),
    "empty embeddings": ({"inputs_embeds": torch.zeros(2, 0, 32)}, "at least one token"),
    "one dimension": ({"input_ids": IDS[0]}, r"shape \(11,\)"),
    "id too large": ({"input_ids": with_id(VOCABULARY)}, f"token id {VOCABULARY}.*ids 0 to {VOCABULARY - 1}"),
    "negative id": ({"input_ids": with_id(-100)}, "token id -100"),
    "a row of padding": ({"input_ids": IDS, "attention_mask": ALL_PADDING}, "row 1 is all padding"),
    "mask too short": ({"input_ids": IDS, "attention_mask": ALL_PADDING[:, 1:]}, r"shape \(2, 10\).*\(2, 11\)"),
    "mask too long": ({"input_ids": IDS, "attention_mask": torch.ones(2, 12)}, r"shape \(2, 12\)"),
    "mask of other rows": ({"input_ids": IDS, "attention_mask": torch.ones(3, 11)}, r"shape \(3, 11\)"),
    "four-dimensional mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 11, 11)},
        "attention_mask has shape",
    ),
    "position ids": ({"input_ids": IDS, "position_ids": torch.arange(11)[None]}, "positions restart in every segment"),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, "attentions span one segment"),
    "a foreign cache": ({"input_ids": IDS, "cache": DynamicCache()}, "ARMTCache, not DynamicCache"),
}


@pytest.mark.parametrize("kind", BAD_INPUTS)
@pytest.mark.parametrize("which", ["model", "body"])
def test_bad_input_is_refused(kind: str, which: str, request):
    inputs, reason = BAD_INPUTS[kind]
    with pytest.raises(ValueError, match=reason):
        request.getfixturevalue(which)(**inputs)


@pytest.mark.parametrize("kind", ["empty text", "id too large", "negative id", "a row of padding"])
def test_bad_prompts_are_refused(kind: str, model):
    inputs, reason = BAD_INPUTS[kind]
    with pytest.raises(ValueError, match=reason):
        model.generate(**inputs, max_new_tokens=3)


def test_a_single_bad_token_is_refused(model):
    with pytest.raises(ValueError, match="token id"):
        model(torch.tensor([[VOCABULARY]]))


@pytest.mark.parametrize("rows", [3, 4])
def test_a_cache_of_other_rows_is_refused(rows: int, model):
    cache = model(IDS[:1].expand(rows, -1)).cache
    with pytest.raises(ValueError, match=f"the cache has {rows} rows, the input 2"):
        model(IDS, cache=cache)


def test_a_mask_may_cover_this_call_or_all_calls_but_nothing_else(model):
    cache = model(IDS).cache
    with pytest.raises(ValueError, match=r"it must be \(2, 3\), or \(2, 14\)"):
        model(IDS[:, :3], attention_mask=torch.ones(2, 13), cache=cache)


def test_a_bool_mask_is_a_mask(model):
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        assert torch.equal(model(IDS, attention_mask=mask.bool()).logits, model(IDS, attention_mask=mask).logits)


def test_padding_tokens_without_a_mask_are_text(model):
    """The model has no idea which id pads; a tokenizer's mask says it."""
    ids = IDS.clone()
    ids[:, :2] = PAD
    with torch.no_grad():
        assert model(ids, cache=ARMTCache()).cache.tokens == [11, 11]


def test_unknown_arguments_are_refused(model):
    with pytest.raises(TypeError, match="does not take past_keys"):
        model(IDS, past_keys=3)


def test_labels_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"labels has shape \(2, 10\).*\(2, 11\)"):
        model(IDS, labels=IDS[:, 1:])


@pytest.mark.parametrize("columns", [[11], [-12], [], [[0]]], ids=str)
def test_columns_that_are_not_there_are_refused(columns: list, model):
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(IDS, logits_to_keep=torch.tensor(columns, dtype=torch.long))


def test_labels_and_logits_to_keep_exclude_each_other(model):
    with pytest.raises(ValueError, match="labels need the logits of all columns"):
        model(IDS, labels=IDS, logits_to_keep=1)


def test_a_loss_by_segment_needs_labels(model):
    with pytest.raises(ValueError, match="pass labels"):
        model(IDS, return_logits=False)
