"""`armt train`: what a recipe makes of a model, how a run is resumed and shared, and how it fails."""

import ast
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
)

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.checkpoints import load_checkpoint
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.tasks import load_task
from modeling_armt.conversion.tasks.associative_retrieval import AssociativeRetrieval
from modeling_armt.conversion.training import batches as batches_module
from modeling_armt.conversion.training.batches import StageBatches, load_batches
from modeling_armt.conversion.training.collating import collate
from modeling_armt.conversion.training.curriculum import Curriculum
from modeling_armt.conversion.training.data import StageData
from modeling_armt.conversion.training.distillation import Teacher, divergence
from modeling_armt.conversion.training.recipe import (
    Background,
    Distillation,
    Lora,
    Recipe,
    Stage,
    make_recipe,
    read_recipe,
)
from modeling_armt.conversion.training.scoring import exact_matches
from modeling_armt.conversion.training.train import load_model, make_trainable, train
from modeling_armt.conversion.training.trainer import CurriculumTrainer, training_arguments


# PEFT asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

CARDS = Path(__file__).parents[1] / "model_cards" / "associative_retrieval"
make_backbone = runpy.run_path(str(CARDS / "make_backbone.py"))["make_backbone"]

# A run of seconds: two stages of three steps, with a checkpoint in the middle of each.
QUICK = {
    "task": "associative_retrieval",
    "method": "full",
    "stages": [{"pairs": 1, "max_steps": 3}, {"pairs": 2, "max_steps": 3}],
    "batch_size": 4,
    "eval_steps": 2,
    "validation_samples": 8,
    "logging_steps": 1,
    "save_steps": 2,
    "workers": 0,
    "lr": 1e-2,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def symbols(tmp_path_factory) -> Path:
    """A tiny checkpoint for associative retrieval, without a tokenizer."""
    folder = tmp_path_factory.mktemp("symbols") / "model"
    make_backbone(folder, width=16, layers=2, heads=2, num_mem_tokens=2, d_mem=4)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A tiny checkpoint with the tokenizer of the demonstration."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    AutoTokenizer.from_pretrained(BACKBONE).save_pretrained(folder / "backbone")
    convert(folder / "backbone", folder / "model", segment_size=48, num_mem_tokens=2, d_mem=4)
    return folder / "model"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Twenty plain texts."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(20):
        sentences = [f"In year {i} of book {number} rain fell on {i * 7 % 89} roofs." for i in range(100)]
        (folder / f"{number}.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture
def recipe(symbols, tmp_path):
    """Makes a quick recipe, with changes."""
    return lambda **changes: make_recipe({"model": symbols, "out": tmp_path / "out", **QUICK, **changes})


@pytest.fixture(scope="module")
def plain(symbols, tmp_path_factory) -> dict:
    """What a quick run without changes comes to."""
    return train(make_recipe({"model": symbols, "out": tmp_path_factory.mktemp("plain") / "out", **QUICK}))


@pytest.fixture(scope="module")
def guesser(symbols) -> ARMTForCausalLM:
    """A model that has learned what answers look like, so that it guesses some."""
    model, _ = load_checkpoint(symbols, device="cpu")
    task = load_task("associative_retrieval")
    samples = list(task.validation(task.length(1), 40))
    batch = collate([s["input_ids"] for s in samples], [s["labels"] for s in samples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def fails(capsys):
    """Runs a command that has to fail, and returns the one line it says."""

    def fails(*arguments: str | Path) -> str:
        assert main(["train", *map(str, arguments)]) == 1
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in lines if line.startswith("armt: ")]
        assert len(lines) == 1
        return lines[0]

    return fails


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}))
    return path


def numbers(summary: dict) -> dict:
    """Of a run, what does not depend on the clock or on the machine."""
    stages = [{key: value for key, value in stage.items() if key != "seconds"} for stage in summary["stages"]]
    return {key: summary[key] for key in ("loss", "divergence", "tokens", "steps")} | {"stages": stages}


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


class TestRecipe:
    def test_survives_being_written_and_read(self, recipe, tmp_path):
        original = recipe(distillation={"source": "t"}, background={"segments": 3}, stages=[{"segments": 2}])
        (tmp_path / "recipe.yaml").write_text(original.to_yaml())
        assert make_recipe(read_recipe(tmp_path / "recipe.yaml")) == original

    def test_takes_numbers_that_yaml_takes_for_texts(self, recipe):
        assert recipe(lr="3e-4").lr == 3e-4

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"learning_rate": 1}, "unknown key learning_rate; the keys are: model, task,"),
            ({"lora": {"rank": 4}}, "unknown key rank in lora; the keys are: r, alpha, dropout"),
            ({"stages": [{"pairs": 1, "size": 3}]}, r"unknown key size in stages\[0\]"),
            ({"batch_size": "many"}, "batch_size is 'many'; it must be a whole number"),
            ({"batch_size": True}, "batch_size is True; it must be a whole number"),
            ({"stages": []}, "stages is empty"),
            ({"stages": [{}]}, "stages, number 1: give one of segments, pairs and length, not none"),
            ({"stages": [{"pairs": 1, "segments": 1}]}, "not segments and pairs"),
            ({"stages": [{"pairs": 1, "at_least": 2}]}, "number 1: pairs is 1; it must be at least 2"),
            ({"method": "prefix"}, "method is 'prefix'; it must be one of: lora, full, memory"),
            ({"workers": 3}, "workers is 3; it must be one of: 0, 1, 2, 4, 8"),
            ({"method": "memory", "distillation": {"source": "t"}}, "with the method memory it does not change"),
            ({"distillation": {"weight": 1}}, "distillation needs source"),
            ({"distillation": {"source": "t", "batch_size": 0}}, "distillation.batch_size is 0"),
            ({"background": {"segments": 0}}, "background.segments is 0; it must be at least 1"),
            ({"background": {"segments": 2, "share": 1.5}}, "background.share is 1.5; it must be at most 1"),
            ({"bptt_segments": 0}, "bptt_segments is 0; it must be at least 1"),
            ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
            ({"lr": "nan"}, "lr is nan; it must be at least 0"),
            ({"lora": 16}, "lora is 16; it must be a mapping with keys of: r"),
        ],
    )
    def test_refuses_what_it_does_not_know(self, recipe, changes, message):
        with pytest.raises(ValueError, match=message):
            recipe(**changes)

    def test_documents_every_field(self):
        for kind in (Recipe, Stage, Lora, Background, Distillation):
            for name in kind.__dataclass_fields__:
                assert re.search(rf"^ +(\w+, )*{name}(, \w+)*: ", kind.__doc__, re.MULTILINE), (
                    f"{kind.__name__}.{name}"
                )


class TestBatches:
    def batches(self, count: int, workers: int = 0, **options) -> list[dict]:
        task = load_task("associative_retrieval", vary=False)
        dataset = StageBatches(task, [8, 12, 16], batch_size=4, seed=(0, 0), **options)
        return list(islice(load_batches(dataset, workers, torch.device("cpu")), count))

    def same(self, ones: list[dict], others: list[dict]) -> bool:
        pairs = zip(ones, others, strict=True)
        return all(torch.equal(a["input_ids"], b["input_ids"]) and a["tokens"] == b["tokens"] for a, b in pairs)

    def test_a_batch_has_one_length_and_lengths_vary(self):
        batches = self.batches(20)
        assert {batch["input_ids"].shape for batch in batches} == {(4, 8), (4, 12), (4, 16)}
        assert all("attention_mask" not in batch for batch in batches)

    def test_no_two_batches_are_the_same(self):
        assert len({str(batch["input_ids"].tolist()) for batch in self.batches(40)}) == 40

    @pytest.mark.parametrize("workers", [1, 2])
    def test_do_not_depend_on_the_number_of_workers(self, workers):
        assert self.same(self.batches(12), self.batches(12, workers))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_begin_anywhere(self, workers):
        assert self.same(self.batches(20)[7:], self.batches(13, workers, first=7))

    def test_a_worker_that_is_stuck_is_an_error(self, monkeypatch):
        monkeypatch.setattr(batches_module, "PATIENCE", 1)
        stuck = {"background": lambda tokens, rng: time.sleep(60), "background_lengths": [8], "background_share": 1.0}
        with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
            self.batches(1, workers=1, **stuck)

    def test_are_shared_by_processes(self):
        whole = self.batches(6)
        shares = [self.batches(6, process=number, processes=2) for number in range(2)]
        for batch, *parts in zip(whole, *shares, strict=True):
            assert torch.equal(batch["input_ids"], torch.cat([part["input_ids"] for part in parts]))
            assert {part["tokens"] for part in parts} == {batch["tokens"]}

    def test_pad_on_the_right(self):
        batch = collate([[5, 6, 7], [8]], [[-100, 6, 7], [8]])
        assert batch["input_ids"].tolist()[1][0] == 8
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


class TestScore:
    def test_equals_greedy_generation(self, guesser):
        task = load_task("associative_retrieval")
        samples = list(task.validation(task.length(1), 200))
        batch = collate([s["input_ids"] for s in samples], [s["labels"] for s in samples])
        right, _ = exact_matches(guesser, batch)
        prompts = torch.tensor([s["input_ids"][: s["prompt_length"]] for s in samples])
        output = guesser.generate(prompts, max_new_tokens=2, do_sample=False, eos_token_id=None)
        generated = [" ".join(map(str, ids)) for ids in output[:, prompts.shape[1] :].tolist()]
        expected = [task.score(text, sample) for text, sample in zip(generated, samples, strict=True)]
        assert right.float().tolist() == expected
        assert 0 < sum(expected) < len(expected)

    def test_does_not_depend_on_padding(self, guesser):
        task = load_task("associative_retrieval")
        samples = [*task.validation(task.length(1), 20), *task.validation(task.length(3), 20)]
        together = exact_matches(guesser, collate([s["input_ids"] for s in samples], [s["labels"] for s in samples]))
        for number, sample in enumerate(samples):
            right, loss = exact_matches(guesser, collate([sample["input_ids"]], [sample["labels"]]))
            assert right.item() == together[0][number].item()
            assert loss.item() == pytest.approx(together[1][number].item(), abs=1e-4)


class TestCurriculum:
    def follow(self, recipe: Recipe, scores: list[float], exact: bool = True) -> list[int]:
        """By validation, the stage after it."""
        curriculum, state, control = Curriculum(recipe, exact), TrainerState(), TrainerControl()
        stages = []
        for score in scores:
            while not control.should_evaluate:
                state.global_step += 1
                curriculum.on_step_end(None, state, control)
            control.should_evaluate = False
            curriculum.on_evaluate(None, state, control, metrics={"eval_score": score, "eval_loss": 1.0})
            stages.append(-1 if control.should_training_stop else curriculum.number)
        self.steps = state.global_step
        return stages

    def test_a_stage_ends_by_its_score_or_by_its_steps(self, recipe):
        stages = [{"pairs": n, "until": 0.9, "max_steps": 6} for n in (1, 2, 3)]
        curriculum = recipe(stages=stages, eval_steps=2)
        assert self.follow(curriculum, [0.5, 0.9, 0.1, 0.2, 0.3, 0.95]) == [0, 1, 1, 1, 2, -1]
        assert self.steps == 4 + 6 + 2

    def test_losses_have_to_fall(self, recipe):
        changed = recipe(stages=[{"segments": 1, "until": 2.0, "max_steps": 9}, {"segments": 2}], eval_steps=2)
        assert self.follow(changed, [3.0, 1.9], exact=False) == [0, 1]

    def test_rates_rise_once_and_fall_in_every_stage(self, recipe):
        stages = [{"pairs": 1, "max_steps": 10}, {"pairs": 2, "max_steps": 10, "lr_scale": 0.5}]
        curriculum = Curriculum(recipe(stages=stages, warmup_steps=2, lr_schedule="linear", lr_end=0.5), exact=True)
        assert [curriculum.rate(step) for step in (0, 1, 5, 10)] == pytest.approx([0.5, 0.95, 0.75, 0.5])
        curriculum.number, curriculum.started = 1, 10
        assert curriculum.rate(10) == pytest.approx(0.5)

    def test_the_warm_up_is_a_share_of_the_run_unless_it_has_steps(self, recipe):
        stages = [{"pairs": 1, "max_steps": 20}, {"pairs": 2, "max_steps": 20}]
        rates = [Curriculum(recipe(stages=stages, warmup_steps=n), exact=True).rate for n in (0.1, 4, 100)]
        assert [rate(0) for rate in rates] == [0.25, 0.25, 0.01]
        assert [rate(3) for rate in rates] == [1.0, 1.0, 0.04]

    def test_no_run_ends_before_its_warm_up_by_default(self, symbols):
        curriculum = Curriculum(make_recipe({"model": symbols, "task": "text"}), exact=False)
        assert curriculum.rate(curriculum.max_steps // 10) == 1.0


class TestRun:
    def test_full_training_writes_a_whole_checkpoint(self, recipe, tmp_path):
        summary = train(recipe(), command="armt train ...")
        out = tmp_path / "out"
        assert sorted(os.listdir(tmp_path)) == ["out"]
        assert read_summary(out) == summary
        assert make_recipe(read_recipe(out / "recipe.yaml")) == recipe()
        assert [stage["steps"] for stage in summary["stages"]] == [3, 3]
        assert [step for step, _ in summary["loss"]] == [1, 2, 3, 4, 5, 6]
        assert summary["tokens"] > 6 * 4 * 8 and summary["seed"] == 0 and summary["command"] == "armt train ..."
        assert {"torch", "transformers", "peft"} <= set(summary["versions"])
        assert 0.1 < summary["peak_gib"] < 100
        model = AutoModelForCausalLM.from_pretrained(out)
        assert isinstance(model, ARMTForCausalLM)

    def test_says_what_is_trained_and_what_it_takes_from_the_first_step_on(self, recipe, capsys):
        summary = train(recipe(logging_steps=5, method="memory"))
        assert [step for step, _ in summary["loss"]] == [1, 5]
        lines = capsys.readouterr().out.replace("\r", "\n").splitlines()
        model, _ = load_checkpoint(recipe().model)
        assert f"training {summary['trainable_parameters']:,} of {model.num_parameters():,} parameters" in lines
        entries = [ast.literal_eval(line) for line in lines if line.startswith("{")]
        assert [float(entry["loss"]) for entry in entries] == pytest.approx(
            [loss for _, loss in summary["loss"]], 1e-3
        )
        assert all(0.1 < float(entry["peak_gib"]) <= summary["peak_gib"] + 0.01 for entry in entries)

    def test_a_validation_has_a_bar_of_its_own(self, recipe, capsys):
        train(recipe(validation_samples=12))  # batches of 4
        bars = re.findall(r"(\d+)/(\d+) \[", capsys.readouterr().err)
        assert {("3", "3"), ("6", "6")} <= set(bars)

    def test_learns(self, recipe):
        """Ever smaller loss on samples it has never seen."""
        losses = [loss for _, loss in train(recipe(stages=[{"pairs": 1, "max_steps": 25}]))["loss"]]
        assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])

    def test_a_rerun_gives_the_same_numbers(self, recipe, tmp_path):
        first = train(recipe(batch_size=6, gradient_accumulation=3, workers=1))
        again = make_recipe(read_recipe(tmp_path / "out" / "recipe.yaml") | {"out": tmp_path / "again"})
        assert numbers(train(again)) == numbers(first)
        weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "again")]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    def test_another_seed_gives_others(self, recipe, plain):
        assert numbers(train(recipe(seed=1)))["loss"] != plain["loss"]

    def test_a_stage_may_have_a_batch_of_its_own(self, recipe):
        summary = train(recipe(stages=[{"length": 8, "max_steps": 2}, {"length": 8, "max_steps": 1, "batch_size": 6}]))
        assert summary["tokens"] == (2 * 4 + 6) * 8

    def test_a_stage_has_its_rate_from_its_first_step_on(self, recipe, tmp_path):
        first = {"pairs": 1, "max_steps": 2}
        train(recipe(stages=[first], out=tmp_path / "before"))
        train(recipe(stages=[first, {"pairs": 2, "max_steps": 2, "lr_scale": 0.0}]))
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "out"))
        assert all(torch.equal(before[key], after[key]) for key in before)

    @pytest.mark.parametrize(
        "changes",
        [
            {"gradient_accumulation": 4},
            {"gradient_checkpointing": True},
            {"schedule": "diagonal"},
            {"bptt_segments": 8},
        ],
        ids=["accumulation", "checkpointing", "diagonal", "bptt beyond the text"],
    )
    def test_how_it_is_computed_does_not_change_the_loss(self, recipe, plain, changes):
        assert np.allclose(train(recipe(**changes))["loss"], plain["loss"], atol=1e-3)

    def test_truncation_changes_it(self, recipe, plain):
        assert not np.allclose(train(recipe(bptt_segments=1))["loss"], plain["loss"], atol=1e-4)

    def test_memory_only_leaves_the_backbone_as_it_is(self, recipe, symbols, tmp_path):
        train(recipe(method="memory"))
        before, after = (load_file(folder / "model.safetensors") for folder in (symbols, tmp_path / "out"))
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed and all(key.startswith("memory") for key in changed)
        assert any(key.startswith("memory_tokens") for key in changed)

    def test_segments_may_grow_with_the_stages(self, recipe, tmp_path):
        stages = [
            {"pairs": 2, "max_steps": 1},
            {"pairs": 2, "max_steps": 1, "segment_size": 6, "task_options": {"key_size": 3}},
        ]
        train(recipe(stages=stages))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.segment_size == 6

    def test_bfloat16(self, recipe, tmp_path):
        for precision, dtype in (("autocast", torch.float32), ("bfloat16", torch.bfloat16)):
            train(recipe(precision=precision, out=tmp_path / precision))
            model, _ = load_checkpoint(tmp_path / precision, device="cpu")
            assert model.model.dtype == dtype and model.memory_tokens.weight.dtype == torch.float32

    def test_command_overrides_the_recipe(self, symbols, tmp_path, capsys):
        file = write(tmp_path / "r.yaml", {"model": symbols, **QUICK})
        arguments = ["--out", tmp_path / "out", "--stages", 1, 2, 3, "--steps", 1, "--seed", 5, "--lr", "2e-3"]
        arguments += ["--task-option", "key_size=2", "--until", 0.5]
        assert main(["train", "--recipe", *map(str, [file, *arguments])]) == 0
        made = make_recipe(read_recipe(tmp_path / "out" / "recipe.yaml"))
        stages = [(stage.pairs, stage.max_steps, stage.until) for stage in made.stages]
        assert stages == [(1, 1, 0.5), (2, 1, 0.5), (3, 1, 0.5)]
        assert (made.seed, made.lr, made.task_options) == (5, 2e-3, {"key_size": 2})
        assert "is ready after 3 steps" in capsys.readouterr().err


class TestAdapters:
    CHANGES = {
        "task": "passkey",
        "task_options": {"digits": 2},
        "method": "lora",
        "stages": [{"segments": 2, "at_least": 2, "max_steps": 3}],
    }

    def test_lora_writes_an_adapter_on_its_base(self, recipe, words, tmp_path):
        train(recipe(model=words, **self.CHANGES))
        out = tmp_path / "out"
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(words)
        assert not (out / "config.json").exists() and not (out / "README.md").exists()
        model, tokenizer = load_checkpoint(out, device="cpu")
        assert isinstance(model, PeftModel) and tokenizer is not None
        trained = {name for name in load_file(out / "adapter_model.safetensors") if "lora_" in name}
        assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == {
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
        }  # fmt: skip
        assert not any("memory" in name for name in trained)

    def test_an_adapter_is_trained_further(self, recipe, words, tmp_path):
        """Same base, same adapter: it begins where the run before ended, and LoRA and memory go on changing."""
        changes = self.CHANGES | {"lora": {"r": 4, "alpha": 4}}
        train(recipe(model=words, out=tmp_path / "first", **changes))
        made, fresh = (
            recipe(model=tmp_path / "first", out=tmp_path / "second", **changes),
            recipe(model=words, **changes),
        )
        start, new = (make_trainable(of, load_model(of)[0], [48]) for of in (made, fresh))
        trained, expected = (
            {name for name, weight in model.named_parameters() if weight.requires_grad} for model in (start, new)
        )
        assert trained == expected
        first, _ = load_checkpoint(tmp_path / "first", device="cpu")
        ids = torch.arange(100).reshape(1, 100) % 50
        with torch.no_grad():
            logits = [model.eval()(ids, use_cache=False).logits for model in (start, first)]
        torch.testing.assert_close(*logits, atol=1e-6, rtol=0)
        train(made)
        config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(words)
        before, after = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("first", "second"))
        assert before.keys() == after.keys()
        assert not any(
            torch.equal(before[name], after[name]) for name in before if "lora_" in name or "memory" in name
        )

    def test_an_adapter_that_is_trained_further_keeps_its_precision(self, recipe, words, tmp_path):
        changes = self.CHANGES | {"precision": "bfloat16", "gradient_checkpointing": True}
        train(recipe(model=words, out=tmp_path / "first", **changes))
        made = recipe(model=tmp_path / "first", out=tmp_path / "second", **changes)
        saved = load_file(tmp_path / "first" / "adapter_model.safetensors")
        for name, weight in make_trainable(made, load_model(made)[0], [48]).named_parameters():
            if weight.requires_grad:
                assert weight.dtype == torch.float32
                where = name.replace(".default", "").replace(".modules_to_save", "")
                assert torch.equal(weight, saved[where].float()), name
        assert np.isfinite(train(made)["stages"][-1]["loss"])

    def test_an_adapter_is_trained_further_as_it_is(self, recipe, words, tmp_path):
        train(recipe(model=words, out=tmp_path / "first", **self.CHANGES))
        refused = {
            "train it with the method lora, or merge it into its base first": {"method": "full"},
            r"other LoRA than the recipe: give the recipe lora: {'r': 16, 'alpha': 32, 'dropout': 0\.0}": {
                "lora": {"r": 4}
            },
        }
        for error, change in refused.items():
            with pytest.raises(ValueError, match=error):
                train(recipe(model=tmp_path / "first", out=tmp_path / "second", **self.CHANGES | change))
        file = tmp_path / "first" / "adapter_config.json"
        config = json.loads(file.read_text()) | {"modules_to_save": ["memory_tokens"]}
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="not an adapter of LoRA and the memory in full"):
            train(recipe(model=tmp_path / "first", out=tmp_path / "second", **self.CHANGES))
        assert not (tmp_path / "second").exists() and not (tmp_path / "second.partial").exists()

    def test_rates_and_decay(self, recipe, words, tmp_path):
        made = recipe(model=words, lr=1e-3, memory_lr=1e-2, weight_decay=0.1, **self.CHANGES)
        model, tokenizer = load_model(made)
        adapted = make_trainable(made, model, [48])
        data, curriculum = StageData(made, 48, tokenizer), Curriculum(made, exact=True)
        arguments = training_arguments(made, curriculum, tmp_path)
        optimizer = CurriculumTrainer(data, curriculum, model=adapted, args=arguments).create_optimizer()
        names = {id(parameter): name for name, parameter in adapted.named_parameters()}
        rates = {
            names[id(parameter)]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert rates.keys() == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        for name, (lr, decay) in rates.items():
            assert lr == (1e-2 if "memory" in name else 1e-3), name
            assert decay == (0.0 if name.endswith("bias") or "memory_tokens" in name else 0.1), name

    def test_checkpointing_does_not_change_the_loss(self, recipe, words, tmp_path):
        summaries = [
            train(recipe(model=words, out=tmp_path / str(on), gradient_checkpointing=on, **self.CHANGES))
            for on in (False, True)
        ]
        assert np.allclose(summaries[0]["loss"], summaries[1]["loss"], atol=1e-5)

    def test_segments_must_end_as_those_of_the_base(self, recipe, words):
        stages = [{"segments": 2, "at_least": 2, "max_steps": 1, "segment_size": 60}]
        with pytest.raises(ValueError, match="segments of 60 tokens, but an adapter is read with those of its base"):
            train(recipe(model=words, **self.CHANGES | {"stages": stages}))


class TestTexts:
    """Plain text beside the task: distillation, and memories that a text left behind."""

    CHANGES = TestAdapters.CHANGES
    TEXT = {"task": "text", "task_options": {}, "method": "lora", "stages": [{"segments": 2, "max_steps": 3}]}

    def test_divergence_is_none_before_training(self, words):
        model, _ = load_checkpoint(words, device="cpu")
        ids = torch.arange(40).reshape(2, 20)
        assert divergence(model(ids).logits, Teacher(model).logits(ids)).item() == pytest.approx(0, abs=1e-7)

    def test_divergence_is_that_of_the_formula(self):
        a, b = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
        p, q = b.softmax(-1), a.softmax(-1)
        assert divergence(a, b).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)

    @pytest.mark.parametrize("method", ["lora", "full"])
    def test_distillation_holds_the_backbone(self, recipe, words, texts, tmp_path, method):
        """Training without it moves what the backbone predicts on short text further."""
        moved = {}
        original, tokenizer = load_checkpoint(words, device="cpu")
        ids = torch.tensor(tokenizer("In year 5 of book 7 rain fell on 9 roofs.")["input_ids"])
        for weight in (0.0, 30.0):
            out = tmp_path / str(weight)
            changes = self.CHANGES | {"method": method, "stages": [{"segments": 2, "at_least": 2, "max_steps": 8}]}
            distillation = {"source": str(texts), "weight": weight, "batch_size": 2, "tokens": 20}
            summary = train(recipe(model=words, out=out, distillation=distillation, **changes))
            assert len(summary["divergence"]) == 8
            model, _ = load_checkpoint(out, device="cpu")
            with torch.no_grad():
                moved[weight] = divergence(model(ids[None]).logits, original(ids[None]).logits).item()
        assert moved[30.0] < 0.7 * moved[0.0]

    def test_background_changes_what_is_learned(self, recipe, words, texts, tmp_path):
        plain = train(recipe(model=words, **self.CHANGES))
        background = {"segments": 3, "share": 1.0, "source": str(texts)}
        after = train(recipe(model=words, out=tmp_path / "after", background=background, **self.CHANGES))
        assert after["loss"][0] == pytest.approx(plain["loss"][0], rel=1e-3)  # fresh memories hold nothing
        assert after["loss"][2] != plain["loss"][2]

    def test_a_batch_begins_with_the_memory_of_its_background(self, recipe, words, texts):
        """The gradient of a batch after a background is that of one forward pass over both, without its part."""
        made = recipe(model=words, background={"segments": 2, "share": 1.0, "source": str(texts)}, **self.CHANGES)
        data = StageData(made, 48, AutoTokenizer.from_pretrained(words))
        batch = next(data.train(0, 0, torch.device("cpu")))
        assert batch["background"].shape[1] in (48, 96)
        model, _ = load_checkpoint(words, device="cpu")
        for memory in model.memory.values():
            torch.nn.init.normal_(memory.memory_value.weight, std=0.1)
        whole = torch.cat([batch["background"].expand(len(batch["input_ids"]), -1), batch["input_ids"]], dim=1)
        masked = torch.cat([torch.full_like(whole[:, : batch["background"].shape[1]], -100), batch["labels"]], dim=1)
        at_once = model(whole, labels=masked).loss
        memory = model.read(batch["background"]).cache
        split = model(batch["input_ids"], labels=batch["labels"], cache=memory, return_logits=False).loss
        assert split.item() == pytest.approx(at_once.item(), rel=1e-5)

    def test_the_background_of_rewriting_is_pairs_written_before(self, recipe, symbols):
        task = {"key_size": 1, "value_size": 1, "rewrite": True}
        made = recipe(background={"segments": 9, "share": 1.0}, task_options=task)
        data = StageData(made, 4, None)
        batch = next(data.train(0, 0, torch.device("cpu")))
        pairs = batch["background"].view(-1, 4)
        assert 1 <= len(pairs) <= 9
        assert set(pairs[:, 1].tolist()) == {AssociativeRetrieval.sep_token_id}
        assert set(pairs[:, 3].tolist()) == {AssociativeRetrieval.eos_token_id}

    def test_what_shall_be_remembered_has_no_background(self, recipe):
        """A pair before the sample could have the key that is asked for."""
        with pytest.raises(ValueError, match="stage 1: background needs a source"):
            train(recipe(background={"segments": 9, "share": 1.0}))

    def test_text_trains_on_its_loss(self, recipe, words, texts):
        summary = train(recipe(model=words, **self.TEXT | {"task_options": {"source": str(texts)}}))
        stage = summary["stages"][0]
        assert stage["score"] == stage["loss"] > 0

    def test_babilong(self, recipe, words, texts, tmp_path):
        """Facts alone, then facts in novels, which are the background of later batches too."""
        cache = str(tmp_path / "cache")
        stages = [
            {"length": 0, "max_steps": 2},
            {
                "segments": 4,
                "at_least": 3,
                "max_steps": 2,
                "task_options": {"background": str(texts), "cache": cache},
                "background_segments": 2,
            },
        ]
        changes = {"task": "babilong", "task_options": {"task": "qa1"}, "stages": stages, "method": "lora"}
        background = {"segments": 2, "share": 1.0}
        with pytest.raises(ValueError, match="stage 1: background needs a source"):
            train(recipe(model=words, background=background, **changes))
        stages[0]["background_segments"] = 0
        summary = train(recipe(model=words, background=background, **changes))
        assert [stage["steps"] for stage in summary["stages"]] == [2, 2]


def armt(*arguments: str | Path, launcher: tuple = (), **options) -> subprocess.Popen:
    """The command in a process of its own, or several."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, launcher), "-m", "modeling_armt.conversion", "train", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


@contextmanager
def interrupted(monkeypatch, step: int):
    """A run in here is interrupted, as by Ctrl-C, before it begins its step after `step`."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Curriculum, "on_step_begin", on_step_begin)
        yield


class TestResume:
    def test_killed_run_comes_to_the_same_end(self, recipe, symbols, tmp_path):
        """kill -9 after a checkpoint, in the middle of a stage."""
        stages = [{"pairs": 1, "max_steps": 5}, {"pairs": 2, "max_steps": 40}]
        changes = {"stages": stages, "save_steps": 4, "eval_steps": 20, "logging_steps": 2}
        undisturbed = train(recipe(**changes, out=tmp_path / "whole"))
        file = write(tmp_path / "r.yaml", {"model": symbols, "out": tmp_path / "out", **QUICK, **changes})
        process = armt("--recipe", file)
        partial = tmp_path / "out.partial"
        try:
            while not any(partial.glob("checkpoint-[1-9][0-9]/trainer_state.json")):
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        assert not (tmp_path / "out").exists()
        assert main(["train", "--resume", "--out", str(tmp_path / "out")]) == 0
        assert numbers(read_summary(tmp_path / "out")) == numbers(undisturbed)
        assert not partial.exists()

    def test_adapters_resume_too(self, recipe, words, tmp_path, texts, monkeypatch):
        changes = TestAdapters.CHANGES | {"stages": [{"segments": 2, "at_least": 2, "max_steps": 5}]}
        changes |= {"lora": {"dropout": 0.1}}
        changes |= {"model": words, "distillation": {"source": str(texts), "batch_size": 2, "tokens": 20}}
        undisturbed = train(recipe(**changes, out=tmp_path / "whole"))
        with interrupted(monkeypatch, step=3):
            train(recipe(**changes))
        assert numbers(train(recipe(**changes), resume=True)) == numbers(undisturbed)

    def test_a_run_that_trains_an_adapter_further_resumes_too(self, recipe, words, tmp_path, monkeypatch):
        changes = TestAdapters.CHANGES | {"stages": [{"segments": 2, "at_least": 2, "max_steps": 5}]}
        train(recipe(**changes, model=words, out=tmp_path / "first"))
        changes["model"] = tmp_path / "first"
        undisturbed = train(recipe(**changes, out=tmp_path / "whole"))
        with interrupted(monkeypatch, step=3):
            train(recipe(**changes))
        assert numbers(train(recipe(**changes), resume=True)) == numbers(undisturbed)

    def test_a_run_that_only_lacks_its_folder_gets_it(self, recipe, plain, tmp_path, monkeypatch):
        def interrupt(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("modeling_armt.conversion.training.train.save", interrupt)
            train(recipe())
        before = load_file(tmp_path / "out.partial" / "checkpoint-6" / "model.safetensors")
        assert numbers(train(recipe(), resume=True)) == numbers(plain)
        after = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_an_unfinished_run_is_not_begun_again(self, recipe, monkeypatch):
        with interrupted(monkeypatch, step=3):
            train(recipe())
        with pytest.raises(FileExistsError, match="unfinished run: go on with --resume, or remove it"):
            train(recipe())
        with pytest.raises(ValueError, match="has another recipe"):
            train(recipe(lr=0.5), resume=True)

    def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(self, recipe, plain, tmp_path, monkeypatch):
        """A real failure to write: the process may not make large files from the second checkpoint on."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def on_save(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

        monkeypatch.setattr(Curriculum, "on_save", on_save)
        try:
            with pytest.raises(OSError, match=r"checkpoint of step 4 could not be written.*checkpoint-2 is whole"):
                train(recipe())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monkeypatch.undo()
        assert [path.name for path in (tmp_path / "out.partial").glob("checkpoint-*")] == ["checkpoint-2"]
        assert numbers(train(recipe(), resume=True)) == numbers(plain)


class TestProcesses:
    def test_two_give_the_loss_of_one(self, recipe, words, texts, tmp_path):
        """Under `accelerate launch` with gloo, with all that a step can consist of."""
        changes = {
            "model": words,
            **TestAdapters.CHANGES,
            "gradient_accumulation": 2,
            "stages": [{"segments": 2, "at_least": 2, "max_steps": 2}, {"length": 60, "max_steps": 2}],
            "distillation": {"source": str(texts), "batch_size": 2, "tokens": 20},
            "background": {"segments": 2, "source": str(texts)},
        }
        alone = train(recipe(**changes))
        file = write(tmp_path / "r.yaml", {**QUICK, **changes, "out": tmp_path / "two"})
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
        launcher += ["--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no"]
        process = armt("--recipe", file, launcher=launcher)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        together = read_summary(tmp_path / "two")
        assert (alone["processes"], together["processes"]) == (1, 2)
        for name in ("loss", "divergence"):
            assert np.allclose(together[name], alone[name], atol=1e-5), name
        assert together["tokens"] == alone["tokens"]
        assert [s["score"] for s in together["stages"]] == [s["score"] for s in alone["stages"]]


class TestBadInput:
    def quick(self, tmp_path: Path, **changes) -> Path:
        return write(tmp_path / "r.yaml", {**QUICK, "out": tmp_path / "out", **changes})

    def test_unknown_key(self, fails, symbols, tmp_path):
        file = self.quick(tmp_path, model=symbols, memorylr=1)
        assert fails("--recipe", file).startswith(f"armt: {file}: unknown key memorylr; the keys are: model, task")

    def test_recipe_that_is_none(self, fails, tmp_path):
        (tmp_path / "r.yaml").write_text("stages: [")
        assert "is not YAML" in fails("--recipe", tmp_path / "r.yaml")
        (tmp_path / "r.yaml").write_text("text")
        assert "must be a mapping of fields" in fails("--recipe", tmp_path / "r.yaml")
        assert "No such file" in fails("--recipe", tmp_path / "absent.yaml")

    def test_nothing_to_start_from(self, fails, symbols, tmp_path):
        assert "the options: needs model, task" in fails()
        assert "the recipe has no out" in fails(symbols, "--task", "associative_retrieval", "--stages", 1)
        assert "no unfinished run" in fails("--resume", "--out", tmp_path / "out")

    def test_a_folder_with_something_in_it(self, fails, symbols, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").touch()
        assert "exists and is not empty" in fails("--recipe", self.quick(tmp_path, model=symbols))
        assert os.listdir(tmp_path / "out") == ["thesis.txt"]

    def test_checkpoint_that_is_not_armt(self, fails, tmp_path):
        message = fails("--recipe", self.quick(tmp_path, model=BACKBONE))
        assert "is a plain llama model, not an ARMT checkpoint" in message

    def test_unknown_task_and_option(self, fails, symbols, tmp_path):
        file = self.quick(tmp_path, model=symbols)
        assert "There is no task 'juggling'" in fails("--recipe", file, "--task", "juggling")
        assert "has no option size" in fails("--recipe", file, "--task-option", "size=2")
        assert "must be KEY=VALUE" in fails("--recipe", file, "--task-option", "size")
        message = fails("--recipe", file, "--task-option", "pairs=many")
        assert "The option pairs of the task 'associative_retrieval' is 'many'; it must be a whole number" in message

    def test_model_without_the_tokenizer_that_a_task_needs(self, fails, symbols, tmp_path):
        file = self.quick(tmp_path, model=symbols, task="passkey", stages=[{"segments": 9}])
        assert "has no tokenizer" in fails("--recipe", file)

    def test_tokenizer_without_special_tokens(self, fails, words, tmp_path):
        model, tokenizer = load_checkpoint(words, device="cpu")
        model.save_pretrained(tmp_path / "model")
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path / "model")
        changes = {"model": tmp_path / "model", "stages": [{"segments": 9}]}
        file = self.quick(tmp_path, **changes, task="babilong", task_options={"task": "qa1"})
        assert "no end-of-text token" in fails("--recipe", file)
        file = self.quick(tmp_path, **changes, task="chat", task_options={"source": "talk.jsonl"})
        assert "chat template" in fails("--recipe", file)

    def test_length_shorter_than_its_facts(self, fails, words, tmp_path):
        file = self.quick(tmp_path, model=words, task="passkey", stages=[{"segments": 1}])
        assert "stage 1: A passkey sample without any filler has " in fails("--recipe", file)
        file = self.quick(tmp_path, model=words, task="babilong", task_options={"task": "qa1"}, stages=[{"length": 9}])
        assert "stage 1: 9 tokens are too few for qa1" in fails("--recipe", file)

    def test_length_that_nothing_fills(self, fails, words, tmp_path):
        stages = [{"length": 2000}]
        file = self.quick(tmp_path, model=words, task="babilong", task_options={"task": "qa1"}, stages=stages)
        assert "stage 1: Without a background there is nothing to fill 2,000 tokens" in fails("--recipe", file)

    def test_distillation_on_more_than_a_segment(self, fails, words, texts, tmp_path):
        distillation = {"source": str(texts), "tokens": 100_000}
        changes = {"task": "text", "task_options": {"source": str(texts)}, "stages": [{"segments": 2}]}
        file = self.quick(tmp_path, model=words, method="full", distillation=distillation, **changes)
        assert "stage 1: distillation.tokens is 100000, but a segment has" in fails("--recipe", file)

    def test_a_run_that_diverges(self, fails, symbols, tmp_path):
        changes = {"lr": 1e30, "memory_lr": 1e30, "warmup_steps": 0, "max_grad_norm": 0}
        message = fails("--recipe", self.quick(tmp_path, model=symbols, **changes))
        assert re.search(r"the validation loss after step \d+ is (nan|inf): the run has diverged", message)
        assert not (tmp_path / "out").exists()

    def test_broken_archive_and_broken_line(self, fails, words, tmp_path):
        (tmp_path / "novels.tar.xz").write_bytes(b"not an archive")
        changes = {"model": words, "stages": [{"segments": 1}]}
        file = self.quick(tmp_path, **changes, task="text", task_options={"source": str(tmp_path / "novels.tar.xz")})
        assert "novels.tar.xz" in fails("--recipe", file)
        file = self.quick(tmp_path, **changes, task="text", task_options={"source": str(tmp_path / "absent.tar.xz")})
        assert "absent.tar.xz" in fails("--recipe", file)
        model, tokenizer = load_checkpoint(words, device="cpu")
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user"')
        changes["model"] = tmp_path / "model"
        file = self.quick(tmp_path, **changes, task="chat", task_options={"source": str(tmp_path / "talk.jsonl")})
        assert "talk.jsonl, line 1 is not JSON" in fails("--recipe", file)

    def test_stories_that_are_not_there(self, fails, words, tmp_path):
        changes = {"model": words, "task": "babilong", "stages": [{"length": 0}]}
        for content in (None, b"half an archive"):
            archive = tmp_path / "babi.tar.xz"
            if content:
                archive.write_bytes(content)
            file = self.quick(tmp_path, **changes, task_options={"task": "qa4", "babi": str(archive)})
            assert str(archive) in fails("--recipe", file)

    def test_batches_that_cannot_be_divided(self, fails, symbols, tmp_path):
        file = self.quick(tmp_path, model=symbols, gradient_accumulation=3)
        assert "batch_size 4 cannot be divided by 1 processes and gradient_accumulation 3" in fails("--recipe", file)

    def test_nothing_is_left_behind(self, fails, symbols, tmp_path):
        fails("--recipe", self.quick(tmp_path, model=symbols, gradient_accumulation=3))
        assert os.listdir(tmp_path) == ["r.yaml"]


@pytest.mark.parametrize(
    "file", sorted(CARDS.parent.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_recipes_that_come_with_the_package_are_recipes(file):
    assert make_recipe(read_recipe(file), str(file)).out
