"""The backbone of the results: what it is trained on, and what it must never see."""

import json
import tarfile
from argparse import Namespace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt.conversion.pretraining import PretrainingError, make_llama
from modeling_armt.conversion.tasks.babi import generate_stories
from modeling_armt.conversion.tasks.babilong import Babilong, sample_key
from modeling_armt.conversion.tasks.documents import side_of_book


WORDS = {"train": "harbour", "validation": "mountain", "test": "cathedral"}
SIZES = ["--vocab", 320, "--hidden", 16, "--layers", 1, "--heads", 2, "--kv-heads", 2, "--intermediate", 32]
SIZES += ["--context", 64, "--minutes", 0.02, "--batch", 8, "--stories", 40, "--validation", 8, "--no-compile"]


@pytest.fixture(scope="module")
def script():
    return load_script("backbone/make_backbone.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Books of all sides, each side with a word of its own; and bAbI files whose stories are held out."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "novels").mkdir()
    for number in range(24):
        name = f"Author_Book{number}_1900"
        word = WORDS[side_of_book(name)]
        text = "\n\n".join(f"They went to the {word} on day {day}. The {word} was cold." for day in range(40))
        (folder / "novels" / f"{name}.txt").write_text(text)
    stories = generate_stories("qa1", np.random.default_rng(5))
    for subset, side in (("en-10k", "test"), ("en", "train")):
        lines = []
        for _ in range(10):
            story, number = next(stories), 0
            for place, fact in enumerate(story.facts, 1):
                number += 1
                lines.append(f"{number} {fact}")
                for question in story.questions:
                    if question.position == place:
                        number += 1
                        supports = " ".join(str(s + 1 + sum(q.position <= s for q in story.questions))
                                            for s in question.supports)  # fmt: skip
                        lines.append(f"{number} {question.text} \t{question.answer}\t{supports}")
        path = folder / "babi" / subset / f"qa1_single-supporting-fact_{side}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def arguments(script, data, tmp_path_factory) -> Namespace:
    """As parsed."""
    out = tmp_path_factory.mktemp("made") / "backbone"
    paths = ["--novels", data / "novels", "--babi", data / "babi", "--cache", data / "cache", "--out", out]
    return script.parse_args([str(word) for word in [*paths, *SIZES]])


@pytest.fixture(scope="module")
def seen(script, arguments) -> dict:
    """What reaches the trainings of tokenizer and model in a whole run, recorded on its way."""
    recorded: dict = {"tokenizer": [], "windows": []}
    train_tokenizer, windows_of = script.train_tokenizer, script.Windows.__call__

    def record_texts(texts, vocab_size):
        recorded["tokenizer"] += texts
        return train_tokenizer(texts, vocab_size)

    def record_windows(self):
        batch = windows_of(self)
        recorded["windows"].append(batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_tokenizer", record_texts)
        patch.setattr(script.Windows, "__call__", record_windows)
        recorded["facts"] = script.make_backbone(arguments, "the command")
    recorded["task"] = Babilong(
        "qa1", AutoTokenizer.from_pretrained(arguments.out), arguments.babi, arguments.novels, arguments.cache
    )
    return recorded


class TestSides:
    """Other books than those for training are never read, and no question that a task holds out is asked."""

    def test_tokenizer_is_of_books_for_training(self, seen):
        text = " ".join(seen["tokenizer"])
        assert "harbour" in text and "mountain" not in text and "cathedral" not in text

    def test_model_is_of_books_for_training(self, seen):
        text = " ".join(seen["task"].tokenizer.batch_decode(torch.cat([windows for windows, _ in seen["windows"]])))
        assert "harbour" in text and "mountain" not in text and "cathedral" not in text

    def test_books_are_those_of_the_tasks(self, script, seen):
        """The same ids that samples of the training side are cut from, all of them."""
        tokens = script.side_tokens(seen["task"], "train")
        assert len(tokens) == seen["task"].unique_background_tokens("train") == seen["facts"]["novel_tokens"]

    def test_held_out_stories_are_left_out(self, script, seen):
        stories = [story for story, _ in seen["task"].held_out["test"]]
        assert all(script.write_story(seen["task"], story, np.random.default_rng(0)) is None for story in stories)

    def test_what_is_left_shares_no_question(self, script, seen):
        rng = np.random.default_rng(1)
        stories = list(islice(generate_stories("qa1", rng), 300))
        kept = [story for story in stories if script.write_story(seen["task"], story, rng) is not None]
        keys = {sample_key(story, question) for story in kept for question in story.questions}
        assert len(kept) > 200 and not keys & seen["task"].held_out_keys


class TestWindows:
    def test_begin_with_a_story_and_weigh_answers(self, script, seen, arguments):
        windows, weights = seen["windows"][0]
        tokenizer = seen["task"].tokenizer
        assert windows.shape == (arguments.batch, arguments.context + 1)
        assert weights.shape == (arguments.batch, arguments.context)
        heavy = windows[:, 1:][weights > 1]
        assert set(weights.unique().tolist()) == {1.0, arguments.answer_weight}
        words = tokenizer.decode(heavy).replace(tokenizer.eos_token, " ").split()
        assert set(words) <= {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}

    def test_end_answers_as_the_task_does(self, script, seen):
        """A story without novels, cut at a question, is the task's sample of it."""
        task, rng = seen["task"], np.random.default_rng(4)
        for story in islice(generate_stories("qa1", rng), 100):
            ids, answers = script.write_story(task, story, rng) or ((), ())
            for question in story.questions:
                sample = task.sample("train", story, question, 0, rng)
                if np.array_equal(ids, sample["input_ids"]):
                    assert np.array_equal(answers, sample["labels"] != -100)
                    return
        pytest.fail("no story was written as the task writes it")

    def test_stories_are_in_a_row(self, script, seen):
        """A story more is added at the end."""
        fewer, more = (script.make_stories(seen["task"], count, 0) for count in (20, 21))
        end = more["starts"][-1]
        assert len(fewer["starts"]) == 20 and end == len(fewer["ids"])
        assert torch.equal(more["starts"][:-1], fewer["starts"])
        for name in ("ids", "answers"):
            assert torch.equal(more[name][:end], fewer[name])


class TestFolder:
    def test_loads(self, seen, arguments):
        model = AutoModelForCausalLM.from_pretrained(arguments.out)
        assert model.dtype == torch.bfloat16
        assert model.num_parameters() == seen["facts"]["parameters"]

    def test_says_how_it_was_made(self, seen, arguments):
        facts = json.loads((arguments.out / "training.json").read_text())
        assert facts["command"] == "the command" and facts["steps"] >= 1
        assert set(facts["right_answers"]) == {"0", "32", "64"}
        assert f"{facts['parameters']:,} parameters" in (arguments.out / "README.md").read_text()

    def test_default_sizes_are_within_the_limit(self, script, seen, data):
        args = script.parse_args(["--novels", "n", "--babi", "b", "--out", "o"])
        tokenizer = AutoTokenizer.from_pretrained(seen["task"].tokenizer.name_or_path)
        tokenizer.add_tokens([f"<{number}>" for number in range(args.vocab - len(tokenizer))])
        model = make_llama(tokenizer, vars(args), script.MAX_PARAMETERS)
        assert 11_000_000 < model.num_parameters() <= 12_000_000
        assert args.context >= 512 + 16
        with pytest.raises(PretrainingError, match="choose sizes"):
            make_llama(tokenizer, vars(args) | {"layers": 7}, script.MAX_PARAMETERS)

    def test_an_existing_folder_is_left_alone(self, script, seen, arguments):
        with pytest.raises(FileExistsError):
            script.make_backbone(arguments, "again")

    def test_a_damaged_archive_leaves_nothing(self, script, arguments, tmp_path):
        broken = tmp_path / "novels.tar"
        with tarfile.open(broken, "w") as archive:
            archive.add(arguments.novels, "novels")
        broken.write_bytes(broken.read_bytes()[:5000])
        args = Namespace(**vars(arguments) | {"novels": broken, "out": tmp_path / "out"})
        with pytest.raises(ValueError, match="damaged"):
            script.make_backbone(args, "the command")
        assert not args.out.exists()
