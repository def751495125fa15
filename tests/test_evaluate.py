"""Evaluation: what the model and each control answer, and what is said of it."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from evaluation_models import symbol_model, talking_model, train_on_one_pair, with_memory
from peft import get_peft_model
from transformers import AutoTokenizer

from modeling_armt import ARMTCache
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.checkpoints import load_checkpoint
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.evaluation import answering
from modeling_armt.conversion.evaluation.answering import answer
from modeling_armt.conversion.evaluation.batching import even_sizes, halved_if_too_large, in_batches
from modeling_armt.conversion.evaluation.capacity import capacity, stored_pairs
from modeling_armt.conversion.evaluation.controls import CONTROLS, answer_samples, partners
from modeling_armt.conversion.evaluation.intervals import interval, intervals, wilson
from modeling_armt.conversion.evaluation.measure import add_controls, applicable, measure_answers
from modeling_armt.conversion.evaluation.scores import Row, scores_by_distance, summarize_stats
from modeling_armt.conversion.evaluation.subject import Subject, load_subject
from modeling_armt.conversion.tasks import load_task


ALL = list(CONTROLS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "one-pair"
    train_on_one_pair(folder)
    return folder


@pytest.fixture(scope="module")
def remembers(trained) -> Subject:
    """A model that remembers one pair."""
    return load_subject(trained, "one-pair", "auto", "cpu", compiled=False)


@pytest.fixture(scope="module")
def random() -> Subject:
    """A model whose answers depend on all that it has read; in float64, so that rounding cannot change them."""
    return Subject("random", with_memory(symbol_model(1, hidden=32, layers=2)).double(), None, None, {}, frozenset())


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Subject:
    """The backbone of the demonstration with a memory, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
    model = talking_model(tmp_path_factory.mktemp("evaluate") / "talks").double()
    return Subject("talks", model, tokenizer, None, {}, frozenset({tokenizer.eos_token_id}))


@pytest.fixture(scope="module")
def pairs():
    """The task, and samples of 1 to 4 pairs side by side."""
    task = load_task("associative_retrieval", key_size=2, segment_size=7)
    return task, [sample for count in (1, 3, 2, 4, 3) for sample in task.test(task.length(count), 2)]


def greedy(model, prompt, count):
    """By one uncached forward pass a token: the plainest way to an answer."""
    ids = torch.as_tensor(np.asarray(prompt), dtype=torch.long)[None]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, -count:].tolist()


def prompt_of(sample):
    return sample["input_ids"][: sample["prompt_length"]]


class TestAnswers:
    def test_are_those_of_a_plain_forward_pass(self, random, pairs):
        task, samples = pairs
        texts = answer_samples(random, task, samples, []).texts
        expected = [task.decode(greedy(random.model, prompt_of(s), task.max_new_tokens)) for s in samples]
        assert texts == {"memory": expected}
        assert len(set(expected)) > 3  # the model says different things to different samples

    def test_do_not_depend_on_the_batch(self, random, pairs):
        task, samples = pairs
        together = answer_samples(random, task, samples, ["off", "deleted", "backbone"]).texts
        alone = [answer_samples(random, task, [s], ["off", "deleted", "backbone"]).texts for s in samples]
        assert together == {name: [texts[name][0] for texts in alone] for name in together}

    def test_do_not_depend_on_the_blocks_they_are_read_in(self, random, pairs, monkeypatch):
        task, samples = pairs
        whole = answer_samples(random, task, samples, ALL).texts
        monkeypatch.setitem(answering.BLOCK_TOKENS, "cpu", 1)  # one segment at a time
        assert answer_samples(random, task, samples, ALL).texts == whole

    def test_end_where_the_model_stops(self, talks):
        prompt = np.array(talks.tokenizer("It was late in the evening when")["input_ids"])
        ids = answer(talks.model, [prompt], ARMTCache(), 32, 8)[0]
        assert len(ids) == 8
        stop = ids[4]
        assert answer(talks.model, [prompt], ARMTCache(), 32, 8, {stop})[0] == ids[: ids.index(stop)]

    def test_cross_the_end_of_a_segment(self, talks):
        prompt = np.array(talks.tokenizer("The old house stood at the end of the road. " * 9)["input_ids"])
        prompt = prompt[: len(prompt) // 32 * 32 - 1]
        assert answer(talks.model, [prompt], ARMTCache(), 32, 5)[0] == greedy(talks.model, prompt, 5)


class TestControls:
    def test_off_sees_the_last_segment_only(self, random, pairs):
        task, samples = pairs
        texts = answer_samples(random, task, samples, ["off"]).texts["memory off"]
        for sample, text in zip(samples, texts, strict=True):
            prompt = prompt_of(sample)
            last = prompt[(len(prompt) - 1) // random.segment_size * random.segment_size :]
            assert text == task.decode(greedy(random.model, last, task.max_new_tokens))

    def test_swapped_has_the_whole_segments_of_another_sample(self, random, pairs):
        task, samples = pairs
        texts = answer_samples(random, task, samples, ["swapped"]).texts["memory swapped"]
        for row, other in partners(samples).items():
            mine, others = prompt_of(samples[row]), prompt_of(samples[other])
            size = random.segment_size
            spliced = others[: (len(others) - 1) // size * size] + mine[(len(mine) - 1) // size * size :]
            assert task.decode(greedy(random.model, spliced, task.max_new_tokens)) == texts[row]

    def test_swap_takes_another_group_and_another_answer(self):
        samples = [{"group": g, "answer": a} for g, a in [(0, "x"), (0, "y"), (1, "x"), (2, "y")]]
        assert partners(samples) == {0: 3, 1: 2, 2: 3, 3: 0}
        assert partners(samples[:2]) == {0: None, 1: None}

    def test_deleted_reads_the_text_without_its_facts(self, random, pairs):
        task, samples = pairs
        texts = answer_samples(random, task, samples, ["deleted"]).texts["fact deleted"]
        for sample, text in zip(samples, texts, strict=True):
            without = task.prompt_without_facts(sample)
            assert len(without) == sample["prompt_length"]
            assert text == task.decode(greedy(random.model, without, task.max_new_tokens))

    def test_backbone_reads_everything_at_once_and_knows_no_memory(self, random, pairs):
        task, samples = pairs
        texts = answer_samples(random, task, samples, ["backbone"]).texts["backbone"]
        expected = [task.decode(greedy(random.model.model, prompt_of(s), task.max_new_tokens)) for s in samples]
        assert texts == expected

    def test_with_one_segment_there_is_nothing_to_switch_off(self, talks):
        task = load_task("passkey", tokenizer=talks.tokenizer)
        talks.model.config.segment_size = 512
        try:
            texts = answer_samples(talks, task, list(task.test(80, 3)), ["off", "swapped"]).texts
        finally:
            talks.model.config.segment_size = 32
        assert texts["memory"] == texts["memory off"] == texts["memory swapped"]

    def test_tell_memory_from_guessing(self, remembers):
        """On a model that has learned to remember: it is right with its memory, and in no other way."""
        task = load_task("associative_retrieval")
        entry, answers = measure_answers(remembers, task, "1p", task.length(1), 300, ALL, None)
        scores = {name: score["mean"] for name, score in entry["scores"].items()}
        assert scores["memory"] > 0.98
        assert scores["memory off"] < 0.15
        assert scores["memory swapped"] < 0.02  # it tells the other sample's value, which is another one
        assert scores["fact deleted"] < 0.15
        assert scores["backbone"] < 0.15  # trained in segments, it has never seen two at once
        assert entry["by_distance"][0]["segments"] == 1 and entry["by_distance"][0]["samples"] == 300
        assert entry["stored_pairs"]["mean"] == pytest.approx((scores["memory"] - 1 / 16) / (1 - 1 / 16))
        assert len(answers) == 300 and answers[0]["answers"]["memory"] == answers[0]["answer"]


class TestEntry:
    def test_is_the_same_for_any_batch_size(self, remembers):
        task = load_task("associative_retrieval", rewrite=True)
        entries = [
            measure_answers(remembers, task, "3p", task.length(3), 25, ["off", "deleted"], size)[0]
            for size in (1, 7, 25)
        ]
        for entry in entries:
            assert entry.pop("tokens_per_s") > 0 and entry.pop("peak_gib") > 0
            for quantity in entry["stats"].values():
                quantity.pop("mean"), quantity.pop("least"), quantity.pop("largest")  # rounding
        assert entries[0] == entries[1] == entries[2]

    def test_says_how_long_samples_are(self, remembers):
        task = load_task("associative_retrieval")
        entry = measure_answers(remembers, task, "5p", task.length(5), 4, [], None)[0]
        assert (entry["tokens"], entry["segments"], entry["samples"]) == (24, 6, 4)
        assert "backbone" not in entry["scores"] and entry["background"] is None
        assert entry["stats"]["A_norm"]["least"] > 0

    def test_asks_the_backbone_what_fits_its_context_only(self, remembers):
        task = load_task("associative_retrieval")
        assert applicable(remembers, task, task.length(14), ALL) == ALL
        assert applicable(remembers, task, task.length(16), ALL) == ["off", "swapped", "deleted"]

    def test_has_the_grid_of_depths(self, talks):
        task = load_task("passkey", tokenizer=talks.tokenizer)
        entry = measure_answers(talks, task, "150", 150, 22, [], None)[0]
        assert [item["depth"] for item in entry["by_depth"]] == [i / 10 for i in range(11)]
        assert all(item["samples"] == 2 for item in entry["by_depth"])


class TestAddedControls:
    @pytest.mark.parametrize("first", [[], ["off"], ["off", "swapped"], ["deleted", "backbone"]])
    @pytest.mark.parametrize("count", [1, 4])
    def test_are_those_of_all_at_once(self, random, first, count):
        task = load_task("associative_retrieval", key_size=2)
        at = (random, task, f"{count}p", task.length(count))
        rest = [control for control in ALL if control not in first]
        whole, all_lines = measure_answers(*at, 12, ALL, 5)
        before, lines = measure_answers(*at, 12, first, 5)
        before["controls"] = first
        entry, lines = add_controls(random, task, task.length(count), before, lines, rest, 5)
        assert entry.pop("controls") == first
        assert lines == all_lines
        assert [list(line["answers"]) for line in lines] == [list(line["answers"]) for line in all_lines]
        assert list(entry["scores"]) == list(whole["scores"])
        clocks = {"tokens_per_s", "peak_gib"}
        assert {name: entry[name] for name in entry.keys() - clocks} == {
            name: whole[name] for name in whole.keys() - clocks
        }
        assert all(entry[name] == before[name] for name in clocks)

    def test_of_samples_in_one_segment_need_no_memory(self, talks):
        task = load_task("passkey", tokenizer=talks.tokenizer)
        talks.model.config.segment_size = 512
        try:
            samples = list(task.test(80, 3))
            whole = answer_samples(talks, task, samples, ["off", "swapped"]).texts
            texts = answer_samples(talks, task, samples, ["off", "swapped"], controls_only=True).texts
        finally:
            talks.model.config.segment_size = 32
        assert texts == {name: whole[name] for name in ("memory off", "memory swapped")}

    @pytest.mark.parametrize(("control", "readings"), [("off", 0), ("deleted", 1), ("swapped", 1)])
    def test_read_no_more_than_they_need(self, random, control, readings):
        task = load_task("associative_retrieval")
        tokens, read = task.length(4), []
        entry, lines = measure_answers(random, task, "4p", tokens, 6, [], None)
        add_controls(random, task, tokens, entry | {"controls": []}, lines, [control], None, read.append)
        whole = sum((sample["prompt_length"] - 1) // 4 * 4 for sample in task.test(tokens, 6))
        ends = sum((sample["prompt_length"] - 1) % 4 + 1 for sample in task.test(tokens, 6))
        assert sum(read) == readings * (whole + ends * (control == "deleted"))

    def test_leave_out_what_the_entry_does_not_have(self, random):
        """As after a kill between writing the answers and the entry."""
        task = load_task("associative_retrieval")
        entry, _ = measure_answers(random, task, "4p", task.length(4), 6, ["off"], None)
        _, lines = measure_answers(random, task, "4p", task.length(4), 6, ["off", "deleted"], None)
        entry, lines = add_controls(
            random, task, task.length(4), entry | {"controls": ["off"]}, lines, ["swapped"], None
        )
        names = ["memory", "memory off", "memory swapped"]
        assert list(entry["scores"]) == names and all(list(line["answers"]) == names for line in lines)

    def test_of_other_samples_are_refused_before_anything_is_read(self, random):
        task, read = load_task("associative_retrieval"), []
        entry, lines = measure_answers(random, task, "4p", task.length(4), 6, [], None)
        for other in (lines[::-1], lines[:-1]):
            with pytest.raises(ValueError, match="are of other samples. Remove them"):
                add_controls(
                    random, task, task.length(4), entry | {"controls": []}, other, ["deleted"], 2, read.append
                )
        assert not read


class TestDistances:
    def test_are_counted_in_segments_and_put_into_growing_bins(self):
        rows = [
            Row({"group": number}, 100, 20, distance, {}, {"memory": float(distance < 5), "memory off": 0.0})
            for number, distance in enumerate([0, 1, 2, 3, 4, 5, 8, 9, 16, 17])
        ]
        bins = scores_by_distance(rows)
        assert [(b["segments"], b["to"], b["samples"]) for b in bins] == [
            (0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 2), (9, 16, 2), (17, 32, 1)
        ]  # fmt: skip
        assert [b["mean"] for b in bins] == [1, 1, 1, 1, 0, 0, 0]
        assert bins[0]["controls"]["memory off"]["mean"] == 0

    def test_are_those_of_the_pairs(self, random, pairs):
        """One pair a segment: the pair before the question is one segment away."""
        task = load_task("associative_retrieval")
        subject = random
        entry = measure_answers(subject, task, "4p", task.length(4), 40, [], None)[0]
        samples = list(task.test(task.length(4), 40))
        expected = [(s["prompt_length"] - 1) // 4 - s["fact_spans"][0][0] // 4 for s in samples]
        found = {(b["segments"], b["to"]): b["samples"] for b in entry["by_distance"]}
        assert found == {
            (1, 1): expected.count(1),
            (2, 2): expected.count(2),
            (3, 4): expected.count(3) + expected.count(4),
        }


class TestIntervals:
    def test_of_all_or_none_right(self):
        assert wilson(1.0, 100) == (pytest.approx(0.963, abs=5e-4), 1.0)
        assert wilson(0.0, 100) == (0.0, pytest.approx(0.037, abs=5e-4))
        assert interval([1.0] * 100, range(100)) == {
            "mean": 1.0,
            "low": wilson(1, 100)[0],
            "high": 1.0,
            "samples": 100,
        }

    def test_of_independent_answers_is_wilsons(self):
        score = interval([1.0] * 50 + [0.0] * 50, range(100))
        assert (score["low"], score["high"]) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))

    def test_of_a_mean_is_that_of_the_normal_distribution(self):
        values = np.random.default_rng(0).normal(3, 2, 400)
        score = interval(values, range(400))
        half = 1.96 * values.std() / math.sqrt(400)
        assert (score["low"], score["high"]) == (
            pytest.approx(values.mean() - half, abs=0.02),
            pytest.approx(values.mean() + half, abs=0.02),
        )

    def test_asking_the_same_story_again_says_nothing_new(self):
        right = np.random.default_rng(0).integers(2, size=100).astype(float)
        once = interval(right, range(100))
        often = interval(right.repeat(20), np.arange(100).repeat(20))
        wrongly = interval(right.repeat(20), range(2000))
        assert often["samples"] == 2000
        assert often["high"] - often["low"] == pytest.approx(once["high"] - once["low"], rel=0.1)
        assert wrongly["high"] - wrongly["low"] < 0.3 * (often["high"] - often["low"])

    def test_of_all_right_in_few_stories_counts_the_stories(self):
        assert interval([1.0] * 500, [i // 5 for i in range(500)])["low"] == wilson(1.0, 100)[0]

    def test_of_one_book_is_unknown(self):
        assert interval([0.2, 0.4], ["book", "book"]) == {
            "mean": pytest.approx(0.3),
            "low": None,
            "high": None,
            "samples": 2,
        }
        assert interval([], []) == {"mean": None, "low": None, "high": None, "samples": 0}

    def test_of_columns_are_those_of_each_column(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(60, 3))
        values[::2, 2] = np.nan
        groups = list(rng.integers(12, size=60))
        columns = intervals(values, groups)
        assert columns[0] == pytest.approx(interval(values[:, 0], groups))
        assert columns[2]["samples"] == 30 and columns[2]["mean"] == pytest.approx(np.nanmean(values[:, 2]))

    def test_cover_the_truth_as_often_as_they_say(self):
        rng = np.random.default_rng(1)
        hits = 0
        for _ in range(100):
            story = rng.random(40)  # how easy each story is
            answers = (rng.random((40, 5)) < story[:, None]).astype(float).ravel()
            score = interval(answers, np.arange(40).repeat(5))
            hits += score["low"] <= 0.5 <= score["high"]
        assert 0.86 <= hits / 100 <= 0.99


class TestCapacity:
    def test_is_what_guessing_leaves(self):
        task = load_task("associative_retrieval", key_size=2)
        score = {"mean": 0.53125, "low": 0.0625, "high": 1.0, "samples": 1000}
        assert stored_pairs(task, task.length(100), score) == {
            "mean": pytest.approx(50), "low": 0, "high": 100, "samples": 1000
        }  # fmt: skip

    def test_has_no_meaning_where_keys_come_again(self):
        task = load_task("associative_retrieval", rewrite=True)
        assert stored_pairs(task, task.length(100), {"mean": 1.0, "low": 1.0, "high": 1.0, "samples": 1}) is None

    def test_of_a_checkpoint_is_the_largest(self):
        entries = [{"length": f"{n}p", "stored_pairs": {"mean": m}} for n, m in ((10, 10), (50, 31), (200, 12))]
        assert capacity(entries)["length"] == "50p"
        assert capacity([{"length": "4k"}]) is None


class TestBatches:
    def test_are_as_equal_as_can_be(self):
        assert even_sizes(10, 4) == [4, 3, 3]
        assert even_sizes(1000, 999) == [500, 500]
        assert even_sizes(3, 8) == [3]

    def test_are_smaller_from_where_they_do_not_fit(self):
        tried = []

        def run(batch):
            tried.append(len(batch))
            if len(batch) > 4:
                raise torch.OutOfMemoryError("too large")
            return len(batch)

        found = list(in_batches(run, range(24), 8, 24))
        assert [part for part, _ in found] == [list(range(i, i + 4)) for i in range(0, 24, 4)]
        assert tried == [8, 4, 4, 4, 4, 4, 4]
        assert [len(part) for part, _ in in_batches(run, range(7), 3)] == [3, 3, 1]

    def test_that_do_not_fit_are_halved(self):
        tried = []

        def run(batch):
            tried.append(len(batch))
            if len(batch) > 3:
                raise torch.OutOfMemoryError("too large")
            return sum(batch)

        found = list(halved_if_too_large(run, list(range(10))))
        assert found == [([0, 1], 1), ([2, 3, 4], 9), ([5, 6], 11), ([7, 8, 9], 24)]
        assert tried == [10, 5, 2, 3, 5, 2, 3]

    def test_of_one_sample_that_does_not_fit_fail(self):
        def run(batch):
            raise torch.OutOfMemoryError("too large")

        with pytest.raises(torch.OutOfMemoryError):
            list(halved_if_too_large(run, [1]))


def test_stats_are_summarized_over_layers_rows_and_batches():
    batches = [{0: {"A_norm": [1.0, 3.0], "min": None}, 2: {"A_norm": [8.0, None]}}, {0: {"A_norm": [4.0]}}, {}]
    assert summarize_stats(batches) == {"A_norm": {"least": 1.0, "mean": 4.0, "largest": 8.0, "layer_of_largest": 2}}
    assert summarize_stats([{}]) is None


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # peft asks by the old name
def test_an_adapter_answers_with_itself_and_its_backbone_without(talks):
    model = copy.deepcopy(talks.model)
    adapted = get_peft_model(model, lora_config(model, r=2))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    subject = dataclasses.replace(talks, model=adapted.eval(), stop_ids=frozenset())
    task = load_task("passkey", tokenizer=talks.tokenizer)
    samples = list(task.test(90, 2))
    texts = answer_samples(subject, task, samples, ["backbone"]).texts
    for row, sample in enumerate(samples):
        count = task.max_new_tokens
        assert texts["memory"][row] == task.decode(greedy(adapted, prompt_of(sample), count))
        assert texts["backbone"][row] == task.decode(greedy(talks.model.model, prompt_of(sample), count))
        assert texts["memory"][row] != texts["backbone"][row]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_lora_is_computed_in_the_dtype_of_the_backbone(dtype, tmp_path):
    talking_model(tmp_path / "base")
    model, _ = load_checkpoint(tmp_path / "base", device="cpu")
    get_peft_model(model, lora_config(model, r=2)).save_pretrained(tmp_path / "adapter")
    subject = load_subject(tmp_path / "adapter", "adapter", dtype, "cpu", compiled=False)
    dtypes = {"lora": set(), "memory": set(), "other": set()}
    for name, parameter in subject.model.named_parameters():
        kind = "lora" if "lora_" in name else "memory" if "memory" in name else "other"
        dtypes[kind].add(parameter.dtype)
    dtype = getattr(torch, dtype)
    assert dtypes == {"lora": {dtype}, "memory": {torch.promote_types(dtype, torch.float32)}, "other": {dtype}}
