"""The control without associative memory: what is carried from one segment to the next, and that it learns."""

import json
from pathlib import Path

import pytest
import torch
from helpers import load_script
from transformers import AutoTokenizer

from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.training.recipe import make_recipe


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

SEGMENT, MEMORY = 32, 4
TASK = {"task": "qa1"}


@pytest.fixture(scope="module")
def script():
    return load_script("carried.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("carried") / "base"
    convert(BACKBONE, out, segment_size=SEGMENT, num_mem_tokens=MEMORY, d_mem=8)
    return out


@pytest.fixture(params=["states", "tokens"])
def model(script, base, request):
    return script.load(base, request.param, torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 2000, (2, 3 * SEGMENT), generator=torch.Generator().manual_seed(0))


class TestModel:
    def test_reading_in_parts_changes_nothing(self, model, ids):
        with torch.no_grad():
            whole = model(ids).logits
            past = model.read(ids[:, : 2 * SEGMENT]).cache
            rest = model(ids[:, 2 * SEGMENT :], cache=past).logits
        torch.testing.assert_close(rest, whole[:, 2 * SEGMENT :])

    def test_padding_changes_nothing(self, model, ids):
        short = ids[:, : SEGMENT + 5]
        padded = torch.nn.functional.pad(short, (0, 7))
        mask = (torch.arange(padded.shape[1]) < short.shape[1]).long().expand(2, -1)
        with torch.no_grad():
            logits = model(padded, attention_mask=mask).logits[:, : short.shape[1]]
            torch.testing.assert_close(logits, model(short).logits, rtol=1e-4, atol=1e-4)

    def test_loss_is_that_of_the_logits(self, model, ids):
        labels = torch.where(torch.arange(ids.shape[1]) % 3 == 0, ids, -100)
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            torch.testing.assert_close(model(ids, labels=labels).loss, expected)

    def test_tokens_are_the_last_of_the_segment_before(self, script, base, ids):
        """The backbone's own logits, with so many more tokens in front."""
        model = script.load(base, "tokens", torch.float32).eval()
        with torch.no_grad():
            logits = model(ids).logits
            own = model.model(ids[:, SEGMENT - MEMORY : 2 * SEGMENT], use_cache=False).logits[:, MEMORY:]
        torch.testing.assert_close(logits[:, SEGMENT : 2 * SEGMENT], own)

    def test_tokens_reach_no_further(self, script, base, ids):
        model, other = script.load(base, "tokens", torch.float32).eval(), ids.clone()
        other[:, : SEGMENT - MEMORY] = 5
        with torch.no_grad():
            torch.testing.assert_close(model(other).logits[:, SEGMENT:], model(ids).logits[:, SEGMENT:])

    def test_states_reach_from_the_first_segment_to_the_last(self, script, base, ids):
        model, other = script.load(base, "states", torch.float32).eval(), ids.clone()
        other[:, 0] = 5
        with torch.no_grad():
            assert not torch.equal(model(other).logits[:, 2 * SEGMENT :], model(ids).logits[:, 2 * SEGMENT :])

    def test_recomputing_segments_gives_the_same_gradients(self, script, base, ids, monkeypatch):
        labels = torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100)
        gradients = []
        for few in (8, 1):
            monkeypatch.setattr(script, "FEW_SEGMENTS", few)
            model = script.load(base, "states", torch.float32).train()
            model(ids, labels=labels).loss.backward()
            gradients.append(model.memory_tokens.weight.grad)
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(*gradients)

    @torch.no_grad()
    def test_compiled_segments_carry_the_same(self, script, base, ids):
        model = script.load(base, "states", torch.float32).eval()
        carried = model.segment(ids[:, :SEGMENT], None, None, True)[1]
        arguments = (ids[:, SEGMENT : 2 * SEGMENT], None, carried, True)
        torch.testing.assert_close(model.compiled_segment(*arguments), model.segment(*arguments))


class TestRun:
    @pytest.mark.parametrize("carry", ["states", "tokens"])
    def test_trains_and_is_evaluated(self, script, base, tmp_path, carry):
        values = {"model": str(base), "task": "babilong", "task_options": TASK, "out": str(tmp_path / "out")}
        values |= {"stages": [{"length": 0, "max_steps": 4}], "batch_size": 4, "validation_samples": 4, "workers": 0}
        values |= {"eval_steps": 4, "logging_steps": 2, "warmup_steps": 0}
        summary = script.train(make_recipe(values), carry, False, "the command")
        assert summary["carry"] == carry and summary["loss"][0][1] > 0
        result = script.evaluate(tmp_path / "out", "babilong", dict(TASK), ["0k"], 6, "cpu")
        assert result["carry"] == carry and result["lengths"][0]["score"]["samples"] == 6

    def test_writes_results(self, script, base, tmp_path, monkeypatch):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            json.dumps(
                {"model": str(base), "task": "babilong", "task_options": TASK, "batch_size": 4, "workers": 0,
                 "stages": [{"length": 0, "max_steps": 2}], "validation_samples": 4}
            )
        )  # fmt: skip
        out, results = tmp_path / "out", tmp_path / "results"
        for words in (
            ["train", "--recipe", recipe, "--out", out, "--seed", 3],
            ["evaluate", out, "--task", "babilong", "--task-option", "task=qa1", "--lengths", "0k", "--samples", 4,
             "--out", results],
        ):  # fmt: skip
            monkeypatch.setattr(script.sys, "argv", ["carried.py", *map(str, words)])
            script.main()
        found = json.loads((results / "results.json").read_text())
        assert found["seed"] == 3 and found["lengths"][0]["length"] == "0k"
        assert found["environment"].keys() == {"command", "date", "device", "versions"}
        assert AutoTokenizer.from_pretrained(out).eos_token_id is not None
