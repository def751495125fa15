"""model_cards/: what is recorded there is whole, and the trained weights do what is said of them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt import ARMTCache
from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.evaluation.controls import CONTROLS
from modeling_armt.conversion.evaluation.evaluate import OWN_TO_A_SEED
from modeling_armt.conversion.evaluation.losses import LOSS_CONTROLS
from modeling_armt.conversion.merging import merge_adapter
from modeling_armt.conversion.publishing.card import card_of
from modeling_armt.conversion.tasks.babi import PERSONS
from modeling_armt.conversion.tasks.babi import PLACES as BABI_PLACES
from modeling_armt.conversion.training.recipe import make_recipe, read_recipe


ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
FACTS = [
    " Mary moved to the bathroom.",
    " John went to the hallway.",
    " Daniel journeyed to the kitchen.",
    " Sandra travelled to the office.",
    " Mary went back to the garden.",
]
PLACES = {"Mary": "garden", "John": "hallway", "Daniel": "kitchen", "Sandra": "office"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the adapters find their base, as model_cards/babilong/README.md has it."""
    folder = tmp_path_factory.mktemp("qa1")
    convert(CARDS / "backbone" / "model", folder / "qa1-base", segment_size=512, num_mem_tokens=16, d_mem=64)
    return folder


# PEFT asks by the old name.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
class TestQa1:
    @torch.no_grad()
    def test_facts_segments_ago_answer_many_questions(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        merge_adapter(CARDS / "babilong" / "qa1-0", "qa1-0")
        model = AutoModelForCausalLM.from_pretrained("qa1-0", dtype=torch.float32, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained("qa1-0")

        def encode(text: str) -> torch.Tensor:
            return tokenizer(text, return_tensors="pt").input_ids

        licence = (ROOT / "LICENSE").read_text(encoding="utf-8")  # nothing like what it was trained on
        part = len(licence) // (len(FACTS) + 1)
        text = "".join(licence[part * number : part * (number + 1)] + fact for number, fact in enumerate(FACTS))
        read, nothing = ARMTCache(), ARMTCache()
        model.read(encode(text + licence[part * len(FACTS) :]), cache=read)
        model.read(encode(licence), cache=nothing)
        assert read.segments == [7]
        told, untold = (
            {name: self.ask(model, tokenizer, encode(f" Where is {name}?"), cache) for name in PLACES}
            for cache in (read, nothing)
        )
        assert told == PLACES
        assert untold != PLACES

    def test_card_is_what_its_records_give(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        card = card_of(CARDS / "babilong" / "qa1-0", results=CARDS / "babilong" / "results")
        kept = (CARDS / "babilong" / "qa1-0" / "README.md").read_text(encoding="utf-8")
        assert card.rpartition("\n<!--")[0] == kept.replace("](../results/", "](")

    @staticmethod
    def ask(model, tokenizer, question: torch.Tensor, cache: ARMTCache) -> str:
        ids = model.generate(question, cache=cache.fork(), max_new_tokens=2, do_sample=False)
        return tokenizer.decode(ids[0, question.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "path", sorted(CARDS.glob("*/results*/results*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_results_have_what_a_reader_needs_to_trust_them(path: Path):
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {"device", "versions", "date", "command"} <= results["environment"].keys()
    if "carry" in results:  # by carried.py: one run, without a memory to be switched off
        assert results["seed"] is not None and results["lengths"]
        for entry in results["lengths"]:
            assert entry["score"]["low"] <= entry["score"]["mean"] <= entry["score"]["high"]
        return
    for run in results["runs"]:
        assert run["seed"] is not None
        assert run["weights"]
        for entry in run["lengths"]:
            scores = entry.get("scores") or entry["loss"]
            assert {"memory", "memory off"} <= scores.keys()
            names = CONTROLS if "scores" in entry else LOSS_CONTROLS
            assert {names[control] for control in entry["controls"]} == scores.keys() - {"memory"}
            for score in scores.values():
                assert score["low"] <= score["mean"] <= score["high"]


@pytest.mark.parametrize(
    ("recipe", "runs"),
    [
        ("babilong/qa1.yaml", "qa1-?/training.json"),
        ("babilong/budget.yaml", "results-uncorrected/training-?.json"),
        ("associative_retrieval/rewrite.yaml", "results-rewrite/training-?.json"),
        ("associative_retrieval/rewrite.yaml", "results-rewrite-off/training-?.json"),
        ("associative_retrieval/rewrite_long.yaml", "results-rewrite-long/training-?.json"),
        ("associative_retrieval/remember.yaml", "results-remember/training-?.json"),
        ("associative_retrieval/remember.yaml", "results-remember-off/training-?.json"),
        ("associative_retrieval/remember_50.yaml", "results-remember-50/training-?.json"),
    ],
)
def test_all_seeds_were_trained_by_the_recipe_beside_them(recipe: str, runs: str):
    def told(values: dict) -> dict:
        fields = dataclasses.asdict(make_recipe(values))
        return {name: value for name, value in fields.items() if name not in OWN_TO_A_SEED}

    file = CARDS / recipe
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(file.parent.glob(runs))]
    assert [record["seed"] for record in records] == [0, 1, 2]
    assert all(told(record["recipe"]) == told(read_recipe(file)) for record in records)


def test_the_figure_of_qa1_has_all_lengths_and_both_controls_of_training():
    figure = load_script("babilong/figure.py").draw()
    (axes,) = figure.axes
    assert {tick.get_text() for tick in axes.get_xticklabels()} >= {"0k", "128k", "1M"}
    lines = [line.get_label() for line in axes.get_lines()]
    shown = ("memory", "memory off", "memory swapped", "fact deleted", "correction off", "states carried")
    assert {name: lines.count(name) for name in shown} == dict.fromkeys(shown, 3)
    deleted = [line.get_xdata() for line in axes.get_lines() if line.get_label() == "fact deleted"]
    assert all(max(xs) > 1e6 for xs in deleted)  # to 1M


def test_no_record_names_a_folder_of_the_machine_it_comes_from():
    for path in [*CARDS.rglob("*.json"), *CARDS.rglob("*.yaml"), *CARDS.rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(tmp|home|root|work)/", text), path


def test_cards_of_qa1_say_that_it_knows_nobody_else():
    text = (CARDS / "babilong" / "README.md").read_text(encoding="utf-8")
    assert "closed list" in text and all(word in text for word in (*PERSONS, *BABI_PLACES))
    for card in [*CARDS.glob("babilong/qa1-*/README.md"), ROOT / "README.md"]:
        assert "closed list" in card.read_text(encoding="utf-8"), card
