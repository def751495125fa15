"""Evaluation of texts without right answers: the loss by segment, with memory and with what could stand in for it."""

import numpy as np
import pytest
import torch
from evaluation_models import symbol_model, with_memory
from torch import nn

from modeling_armt.conversion.evaluation import losses as losses_module
from modeling_armt.conversion.evaluation.losses import LOSS_CONTROLS, losses_of, summarize_losses
from modeling_armt.conversion.evaluation.subject import Subject


ALL = list(LOSS_CONTROLS)
SEGMENT, CARRIED = 4, 2  # of the model: tokens of a segment, memory tokens


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("random", with_memory(symbol_model(1, hidden=32, layers=2)).double(), None, None, {}, frozenset())


@pytest.fixture(scope="module")
def texts():
    """Texts of different lengths; the last one has a loss in places only."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(104, (length,), generator=generator).tolist() for length in (18, 11, 3, 16)]
    labels = [*rows[:3], [-100] * 5 + rows[3][5:9] + [-100] * 7]
    return [
        {"input_ids": row, "labels": label, "group": i}
        for i, (row, label) in enumerate(zip(rows, labels, strict=True))
    ]


def losses(logits, ids):
    """Of the tokens after each of `(L,)` ids, by their `(L, vocabulary)` logits."""
    return nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="none").numpy()


def close(found, expected):
    return np.testing.assert_allclose(found, expected, atol=1e-5)


@torch.no_grad()
def forward(model, ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0]


class TestLosses:
    def test_with_memory_are_those_of_a_plain_forward_pass(self, subject, texts):
        found = losses_of(subject, texts, []).by_control["memory"]
        for text, values in zip(texts, found, strict=True):
            expected = np.concatenate([[np.nan], losses(forward(subject.model, text["input_ids"]), text["input_ids"])])
            expected[np.array(text["labels"]) == -100] = np.nan
            close(values, expected)

    def test_do_not_depend_on_the_blocks_they_are_read_in(self, subject, texts, monkeypatch):
        whole = losses_of(subject, texts, ALL).by_control
        monkeypatch.setitem(losses_module.LOGITS, "cpu", 1)
        for name, values in losses_of(subject, texts, ALL).by_control.items():
            for found, expected in zip(values, whole[name], strict=True):
                close(found, expected)

    def test_with_memory_off_are_those_of_each_segment_alone(self, subject, texts):
        ids = texts[0]["input_ids"]
        values = losses_of(subject, texts, ["off"]).by_control["memory off"][0]
        for start in range(0, len(ids), SEGMENT):
            after = ids[start : start + SEGMENT + 1]
            logits = forward(subject.model, ids[start : start + SEGMENT])
            logits = torch.cat([logits, logits[-1:]])[: len(after)]
            close(values[start + 1 : start + SEGMENT + 1], losses(logits, after))

    def test_with_carried_tokens_see_as_many_as_the_memory_has(self, subject, texts):
        ids = texts[0]["input_ids"]
        values = losses_of(subject, texts, ["carried"]).by_control["carried tokens"][0]
        for start in range(SEGMENT, len(ids), SEGMENT):
            seen = ids[start - CARRIED : start + SEGMENT]
            logits = forward(subject.model.model, seen)[CARRIED:]
            after = ids[start : start + SEGMENT + 1]
            logits = torch.cat([logits, logits[-1:]])[: len(after)]
            close(values[start + 1 : start + SEGMENT + 1], losses(logits, after))

    def test_with_full_attention_are_those_of_the_backbone(self, subject, texts):
        for text, values in zip(
            texts, losses_of(subject, texts, ["backbone"]).by_control["full attention"], strict=True
        ):
            expected = losses(forward(subject.model.model, text["input_ids"]), text["input_ids"])
            there = np.array(text["labels"][1:]) != -100
            close(values[1:][there], expected[there])

    def test_of_the_first_segment_need_no_memory(self, subject, texts):
        found = losses_of(subject, texts, ALL).by_control
        for name, values in found.items():
            close(values[0][:SEGMENT], found["memory"][0][:SEGMENT])
            assert (
                name == "memory" or np.abs(values[0][SEGMENT + 1 :] - found["memory"][0][SEGMENT + 1 :]).max() > 1e-3
            )


class TestSummary:
    def test_is_by_segment_and_paired(self):
        rng = np.random.default_rng(0)
        hard = rng.normal(3, 1, (20, 1))  # documents differ far more than the two ways to read them
        memory, off = hard + np.zeros((20, 12)), hard + np.repeat([0.0, 0.1, 0.2], SEGMENT)
        found = summarize_losses({"memory": list(memory), "memory off": list(off)}, range(20), SEGMENT)
        assert [len(values) for values in found["loss_by_segment"].values()] == [3, 3]
        assert found["loss_by_segment"]["memory off"][2]["mean"] == pytest.approx(hard.mean() + 0.2)
        differences = [score["mean"] for score in found["memory_minus_by_segment"]["memory off"]]
        assert differences == pytest.approx([0, -0.1, -0.2])
        gain = found["memory_minus"]["memory off"]
        assert [gain[name] for name in ("mean", "low", "high")] == pytest.approx([-0.15] * 3)
        spread = found["loss"]["memory"]
        assert spread["high"] - spread["low"] > 0.5

    def test_of_texts_of_one_segment_says_nothing_of_later_ones(self):
        found = summarize_losses({"memory": [np.array([np.nan, 1.0, 2.0])]}, ["a"], SEGMENT)
        assert found["loss_by_segment"]["memory"][0]["mean"] == 1.5
        assert "loss" not in found and "memory_minus" not in found

    def test_counts_documents_not_stretches(self):
        values = list(np.random.default_rng(0).normal(size=(6, 8)))
        one = summarize_losses({"memory": values}, ["book"] * 6, SEGMENT)["loss"]["memory"]
        assert one["low"] is None and one["samples"] == 6
