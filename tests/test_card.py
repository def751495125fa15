"""`armt card`: what a model card says, what it may say, and when there is none."""

import ast
import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluated
import pytest
import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment
from local_hub.metadata import check_card
from markdown_it import MarkdownIt
from markdown_it.token import Token
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.evaluation.subject import hash_weights
from modeling_armt.conversion.provenance import describe_backbone
from modeling_armt.conversion.publishing import tables
from modeling_armt.conversion.publishing.card import CardError, card_of, render_card
from modeling_armt.conversion.publishing.facts import gather
from modeling_armt.conversion.publishing.folders import FolderError, inspect_folder
from modeling_armt.conversion.publishing.publish import prepare, publish
from modeling_armt.conversion.publishing.records import without_places
from modeling_armt.conversion.publishing.results import ResultsError, check_results
from modeling_armt.model_cards import TEMPLATE


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A conversion that was never trained."""
    folder = tmp_path_factory.mktemp("card") / "fresh"
    evaluated.checkpoint(folder, trained=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint that was trained and evaluated."""
    folder = tmp_path_factory.mktemp("card") / "qa1"
    evaluated.checkpoint(folder)
    evaluated.evaluated(folder)
    return folder


@pytest.fixture
def changeable(folder: Path, tmp_path: Path) -> Path:
    """A copy of that folder to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "qa1"))


@pytest.fixture(scope="module")
def card(folder: Path) -> str:
    facts = gather(inspect_folder(folder), repository="ann/qa1", tag="armt-0123456789ab", base="bob/llama")
    return render_card(facts)


def write_page(path: Path, weights: str) -> None:
    path.write_text(f'<script type="application/json" id="numbers">{json.dumps({"weights": weights})}</script>')


def section(card: str, name: str) -> str:
    return re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", card, flags=re.M | re.S)[1]


def code(card: str) -> str:
    """The example of a card."""
    return next(token.content for token in tokens(card) if token.type == "fence" and token.info == "python")


def tokens(card: str) -> Iterator[Token]:
    """A card's Markdown as a reader's browser understands it."""
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(card).text):
        yield token
        yield from token.children or ()


def numbers(text: str) -> list[str]:
    """Numbers outside of code, links and names of papers; `d_mem` and `qa1` have none."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|arXiv [\d.]+", " ", text, flags=re.S)
    return re.findall(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])", text)


def leaves(value: Any) -> list[Any]:
    """All numbers and texts in a nested value, keys included."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


def sources(folder: Path) -> tuple[list[float], list[str]]:
    """Every number of the folder's JSON files, and the numbers in their texts, such as dates and versions."""
    files = [json.loads((folder / name).read_text()) for name in ("results.json", "training.json", "config.json")]
    found = leaves(files)
    texts = " ".join(leaf for leaf in found if isinstance(leaf, str))
    return [float(leaf) for leaf in found if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)], numbers(
        texts
    )


def is_rounding_of(written: str, value: float) -> bool:
    """Whether a written number is `value`, or its percentage, to the places that are written."""
    digits = written.replace(",", "")
    places = len(digits.partition(".")[2]) if "e" not in digits else 0
    return any(abs(float(digits) - scaled) <= 0.5 * 10.0**-places + 1e-9 for scaled in (value, 100 * value))


class TestNumbers:
    @pytest.mark.parametrize("name", ["Results", "Speed and memory", "State of the memory", "Training", "Model"])
    def test_are_all_in_the_files(self, card, folder, name):
        values, texts = sources(folder)
        found = numbers(section(card, name))
        assert len(found) >= 4
        allowed = {"95"}  # the intervals' own percentage
        invented = [
            number
            for number in found
            if number not in allowed and number not in texts and not any(is_rounding_of(number, v) for v in values)
        ]
        assert not invented

    def test_of_the_rest_are_none(self, card):
        """What the words around the tables claim in numbers would not be measured."""
        words = "".join(section(card, name) for name in ("Security", "Limits"))
        assert not numbers(words)

    def test_every_score_of_every_seed_is_shown(self, card, folder):
        results = json.loads((folder / "results.json").read_text())
        rows = [line for line in section(card, "Results").splitlines() if line.startswith("|")]
        for run in results["runs"]:
            for entry in run["lengths"]:
                row = next(r for r in rows if r.startswith(f"| {entry['length']} |") and f"| {run['seed']} | " in r)
                for score in entry["scores"].values():
                    assert f"{100 * score['mean']:.1f}% [{100 * score['low']:.1f}, {100 * score['high']:.1f}]" in row

    def test_a_score_that_was_not_measured_stays_empty(self, card):
        rows = [line for line in section(card, "Results").splitlines() if line.startswith("| 4k |")]
        assert len(rows) == 3
        assert all(row.endswith("|  |") for row in rows)  # the backbone does not fit

    def test_baselines_are_shown(self, card):
        assert "| chance | 16.7% | 16.7% |" in card
        assert "| last location mentioned | 52.7% | 51.5% |" in card


class TestText:
    def test_has_its_sections(self, card):
        found = re.findall(r"^## (.*)", card, flags=re.M)
        assert found == [
            "Use", "Security", "Model", "Training", "Results", "Speed and memory", "State of the memory", "Limits",
            "Citation",
        ]  # fmt: skip

    @pytest.mark.parametrize("name", ["fresh", "folder"])
    def test_has_no_empty_section(self, request, name):
        text = card_of(request.getfixturevalue(name))
        for part in re.split(r"^## .*", text, flags=re.M)[1:]:
            assert len(part.strip()) > 80
        assert "More Information Needed" not in text
        assert "None" not in text and "undefined" not in text.lower()

    def test_example_pins_the_revision(self, card):
        assert 'name, revision = "ann/qa1", "armt-0123456789ab"' in code(card)
        loads = [line for line in code(card).splitlines() if "from_pretrained" in line]
        assert len(loads) == 2
        assert all("revision=revision" in line for line in loads)

    def test_warns_of_remote_code(self, card):
        assert "trust_remote_code=True" in section(card, "Security")
        assert "full\ncommit id" in section(card, "Security")

    def test_explains_every_control_of_its_tables(self, card):
        for control in ("memory off", "memory swapped", "fact deleted", "backbone"):
            assert f"- **{control}**: " in section(card, "Results")

    def test_names_the_backbone_and_its_licence(self, card):
        assert "[bob/llama](https://huggingface.co/bob/llama)" in card
        assert "apache-2.0, holds for this model too" in card

    def test_tells_of_the_text_around_the_facts_once(self):
        notes = {"4k": (10_000, False), "8k": (10_000, False), "64k": (10_000, True), "0k": None}
        found = [
            {"length": length, "background": note and dict(zip(("unique_tokens", "repeated"), note, strict=True))}
            for length, note in notes.items()
        ]
        assert tables.backgrounds({"runs": [{"lengths": found}, {"lengths": found}]}) == [
            "4k, 8k: 10,000 different background tokens, none of them repeated.",
            "64k: 10,000 different background tokens, repeated to that length.",
        ]

    def test_shows_the_plots(self, card):
        assert "![score by length](score_by_length.png)" in card

    def test_links_the_page_of_inspect(self, changeable, tmp_path):
        """Beside the results, or in the checkpoint's folder."""
        write_page(changeable / "inspect.html", hash_weights(changeable))
        assert "[inspect.html](inspect.html)" in section(card_of(changeable), "State of the memory")
        other = tmp_path / "evaluation"
        other.mkdir()
        for name in ("results.json", "inspect.html"):
            (changeable / name).rename(other / name)
        assert "[inspect.html](inspect.html)" in card_of(changeable, results=other)
        prepared = tmp_path / "prepared"
        prepared.mkdir()
        prepare(gather(inspect_folder(changeable), results=other), prepared)
        assert (prepared / "inspect.html").read_bytes() == (other / "inspect.html").read_bytes()

    def test_page_of_another_seed_beside_the_results_is_not_this_ones(self, changeable, tmp_path):
        other = tmp_path / "evaluation"
        other.mkdir()
        (changeable / "results.json").rename(other / "results.json")
        write_page(other / "inspect.html", f"{1:016x}")
        assert "inspect.html" not in card_of(changeable, results=other)

    def test_recipe_leaves_out_what_is_not_set(self, changeable):
        training = evaluated.training()
        training["recipe"] |= {"distillation": None, "report_to": [], "stages": [{"segments": 2, "until": None}]}
        evaluated.write(changeable / "training.json", training)
        text = section(card_of(changeable), "Training")
        assert "- segments: 2" in text
        assert not re.search("null|distillation|report_to", text)

    def test_names_every_device_and_all_days(self, changeable):
        results = evaluated.results(changeable)
        results["runs"][1]["lengths"][1] |= {"device": "NVIDIA H100", "date": "2026-11-26T08:00:00+00:00"}
        evaluated.write(changeable / "results.json", results)
        assert "Measured on NVIDIA H200 and NVIDIA H100, 2026-11-24 to 2026-11-26." in card_of(changeable)

    def test_says_in_words_what_was_measured_of_the_memory(self, card):
        assert "lambda" not in section(card, "State of the memory")

    def test_tells_the_recipe_but_not_the_place(self, card):
        assert "task: babilong" in section(card, "Training")
        assert "/home/ann" not in card

    def test_untrained_model_says_so(self, fresh):
        text = card_of(fresh)
        assert "has not been trained" in text
        assert "## Training" not in text and "## Results" not in text

    @pytest.mark.parametrize("evaluated_too", [True, False])
    def test_model_that_something_else_trained_is_not_called_untrained(self, changeable, evaluated_too):
        """The stock Trainer leaves no `training.json`."""
        (changeable / "training.json").unlink()
        if not evaluated_too:
            (changeable / "results.json").unlink()
        text = card_of(changeable)
        assert "has not been trained" not in text and "## Training" not in text
        assert ("has not been evaluated" in section(text, "Results")) is not evaluated_too

    def test_model_without_results_says_so(self, changeable):
        (changeable / "results.json").unlink()
        assert "has not been evaluated" in section(card_of(changeable), "Results")

    def test_is_markdown_with_whole_tables(self, card):
        """Every row of a table has as many cells as its head, which is what makes it one."""
        html = MarkdownIt("commonmark").enable("table").render(ModelCard(card).text)
        tables = re.findall(r"<table>.*?</table>", html, flags=re.S)
        assert len(tables) == 7
        for table in tables:
            rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.S)
            counts = {len(re.findall(r"<t[hd]", row)) for row in rows}
            assert len(rows) > 1 and len(counts) == 1
        outside = re.sub(r"<table>.*?</table>|<pre>.*?</pre>", "", html, flags=re.S)
        assert "|" not in outside


class TestOtherKinds:
    """Adapters, and models of symbols, which have no tokenizer."""

    @pytest.fixture(scope="class")
    @classmethod
    def adapter_folder(cls, folder, tmp_path_factory) -> Path:
        """An adapter on that checkpoint."""
        adapter = tmp_path_factory.mktemp("card") / "lora"
        model = AutoModelForCausalLM.from_pretrained(folder)
        get_peft_model(model, lora_config(model, r=2)).save_pretrained(adapter)
        AutoTokenizer.from_pretrained(folder).save_pretrained(adapter)
        return adapter

    @pytest.fixture(scope="class")
    @classmethod
    def adapter(cls, adapter_folder) -> str:
        facts = gather(inspect_folder(adapter_folder), "ann/lora", "armt-0123456789ab", "ann/base", "0" * 40)
        return render_card(facts)

    @pytest.fixture
    def symbols(self, changeable) -> Path:
        """A checkpoint without a tokenizer."""
        (changeable / "results.json").unlink()
        for path in changeable.glob("tokenizer*"):
            path.unlink()
        training = evaluated.training()
        training["recipe"]["task"] = "associative_retrieval"
        evaluated.write(changeable / "training.json", training)
        return changeable

    @pytest.mark.parametrize("kind", ["folder", "adapter_folder", "symbols"])
    def test_example_runs_where_the_folder_is(self, request, kind, monkeypatch, capsys):
        folder = request.getfixturevalue(kind)
        monkeypatch.chdir(folder.parent)
        exec(code(card_of(folder)), {})
        assert capsys.readouterr().out

    def test_adapter_carries_the_licence_of_its_bases_backbone(self, adapter, adapter_folder):
        for text in (adapter, card_of(adapter_folder)):
            assert ModelCard(text).data.license == "apache-2.0"
            assert "Its licence, apache-2.0, holds for this adapter too." in section(text, "Model")

    def test_adapter_is_loaded_by_peft(self, adapter):
        example = code(adapter)
        assert "AutoPeftModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)" in example
        assert "`torch`, `transformers` and `peft`" in section(adapter, "Use")

    def test_adapter_names_its_base_at_a_commit(self, adapter):
        data = ModelCard(adapter).data
        assert (data.base_model, data.base_model_relation, data.library_name) == ("ann/base", "adapter", "peft")
        assert "0" * 40 in section(adapter, "Security")
        assert check_card(adapter) == ([], [])

    def test_adapters_rank_is_told(self, adapter):
        assert "| **LoRA** | r = 2, alpha = 32 |" in section(adapter, "Model")

    def test_model_of_symbols(self, symbols):
        text = card_of(symbols)
        assert "AutoTokenizer" not in code(text)
        assert "pairs of random keys and values" in section(text, "Training")


class TestMetadata:
    @pytest.mark.parametrize("name", ["fresh", "folder"])
    def test_is_valid_on_the_hub(self, request, name):
        assert check_card(card_of(request.getfixturevalue(name))) == ([], [])

    def test_says_what_it_is(self, card):
        data = ModelCard(card).data
        assert (data.library_name, data.pipeline_tag, data.license) == (
            "transformers",
            "text-generation",
            "apache-2.0",
        )
        assert (data.base_model, data.base_model_relation) == ("bob/llama", "finetune")
        assert {"armt", "custom_code"} <= set(data.tags)

    def test_has_the_scores_of_this_seed_alone(self, card, folder):
        results = json.loads((folder / "results.json").read_text())
        entries = {entry["length"]: entry["scores"]["memory"]["mean"] for entry in results["runs"][0]["lengths"]}
        found = {result.dataset_config: result.metric_value for result in ModelCard(card).data.eval_results}
        assert found == entries

    def test_folder_name_is_not_a_base_model(self, fresh):
        """The backbone was a folder of this machine."""
        assert ModelCard(card_of(fresh)).data.base_model is None

    def test_round_trip_keeps_the_card(self, card):
        assert str(ModelCard(card)) == card


HOSTILE = {
    "html": "<script>alert(1)</script>",
    "comment": "<!-- the rest",
    "entity": "&lt;b&gt;",
    "link": "[here](https://evil.example)",
    "bare link": "https://evil.example",
    "reference": "[here]\n\n[here]: https://evil.example",
    "picture": "![](https://evil.example/a.png)",
    "emphasis": "**very** _much_ ~~gone~~ a_b*c",
    "cell": "a | b",
    "span": "a `b` c``",
    "backslash": "a\\",
    "heading": "a\n\n# b #",
    "rule": "a\n---\nlicense: mit\n---\nb",
    "fence": "a\n```\n~~~\n````\nb",
    "quotes": '"""\'); import os; os.abort() #',
    "template": "{{ 7 * 7 }}{% raw %}",
    "what is not seen": "a\u202eb\u200bc\x00\x1b[31m\u2028d\ud800",
}


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE.keys())
def hostile(request) -> str:
    return request.param


class TestValues:
    """What files, options and the Hub say is text on the card, whatever it holds."""

    @staticmethod
    def card_with(folder: Path, value: str) -> str:
        """The card of a copy of a checkpoint with a value wherever somebody can put one."""
        seen = value.replace("/", ":").encode(errors="replace").decode().replace("\0", "")  # what can name a file
        named = folder.parent / f"{seen} 1"
        shutil.copytree(folder, named, copy_function=lambda source, target: Path(target).hardlink_to(source))
        config = json.loads((folder / "config.json").read_text())
        terms = {"license": "other", "license_name": value, "license_link": value}
        training = evaluated.training() | {value: value, "device": value, "date": value, "versions": {value: value}}
        training["recipe"] |= {"model": value, value: [value]}
        training["stages"][0]["score"] = value
        results = evaluated.results(folder)
        results["task"]["options"] = {"task": value, value: value}
        results["baselines"][value] = 0.5
        for run in results["runs"]:
            entry = run["lengths"][1]
            entry |= {"length": value, "device": value, "stats": {value: {value: 1.0}}}
            entry["scores"][value] = entry["scores"]["memory"]
        files = {"training.json": training, "results.json": results}
        for name, content in (files | {"config.json": config | {"converted_from": {"name": value, **terms}}}).items():
            (named / name).unlink()
            evaluated.write(named / name, content)
        (named / f"{seen}.png").write_bytes(evaluated.PICTURE)
        return card_of(named)

    @pytest.fixture(scope="class")
    @classmethod
    def harmless(cls, folder, tmp_path_factory) -> list[tuple[str, str]]:
        copied = shutil.copytree(folder, tmp_path_factory.mktemp("card") / "qa1")
        return cls.structure(cls.card_with(Path(copied), "harmless"))

    @staticmethod
    def structure(card: str) -> list[tuple[str, str]]:
        return [(token.type, token.tag) for token in tokens(card) if token.type not in ("text", "softbreak")]

    def test_make_no_markup(self, changeable, hostile, harmless):
        card = self.card_with(changeable, hostile)
        assert self.structure(card) == harmless
        text = " ".join("".join(c if c.isprintable() else " " for c in hostile).split())
        cells = [token.content for token in tokens(card) if token.type == "text_special" or token.type == "text"]
        assert text in "".join(cells)
        outside = re.sub(r"^(`{3,}).*?^\1$", "", ModelCard(card).text, flags=re.M | re.S)
        assert "https://evil" not in outside  # which GitHub makes a link of

    def test_stay_themselves_in_code_and_metadata(self, changeable, hostile):
        card = self.card_with(changeable, hostile)
        assignment = next(node for node in ast.walk(ast.parse(code(card))) if isinstance(node, ast.Assign))
        name = ast.literal_eval(assignment.value)
        assert (changeable.parent / name).is_dir()
        blocks = [yaml.safe_load(token.content) for token in tokens(card) if token.info == "yaml"]
        assert [block.get("lr") for block in blocks] == [3e-4, None]
        assert blocks[0][hostile] == [hostile]
        data = ModelCard(card).data
        assert (data.license, data.license_name, data.base_model) == ("other", hostile, None)


class TestResultsThatMayNotBeShown:
    """Results come with controls, intervals and every length of every seed, or there is no card."""

    def spoil(self, change) -> str:
        results = copy.deepcopy(evaluated.results())
        change(results)
        with pytest.raises(ResultsError) as error:
            check_results(results)
        return str(error.value)

    def test_complete_ones_may(self):
        check_results(evaluated.results())

    @pytest.mark.parametrize("control", ["memory off", "memory swapped"])
    def test_without_a_control(self, control):
        message = self.spoil(lambda results: results["runs"][1]["lengths"][1]["scores"].pop(control))
        assert f"{control} at 4k of seed 1" in message

    def test_length_that_only_some_seeds_have(self):
        assert "4k of seed2" in self.spoil(lambda results: results["runs"][2]["lengths"].pop())

    def test_without_chance(self):
        assert "chance" in self.spoil(lambda results: results["baselines"].pop("chance"))

    def test_without_intervals(self):
        message = self.spoil(lambda results: results["runs"][0]["lengths"][0]["scores"]["memory"].pop("low"))
        assert "intervals at 0k of seed 0" in message

    def test_something_else_altogether(self):
        with pytest.raises(ResultsError, match="not what `armt evaluate` writes"):
            check_results({"runs": [3]})

    def test_no_card_is_written(self, changeable, capsys, tmp_path):
        results = evaluated.results(changeable)
        del results["runs"][0]["lengths"][0]["scores"]["memory off"]
        evaluated.write(changeable / "results.json", results)
        assert main(["card", str(changeable), "--out", str(tmp_path / "card.md")]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / "card.md").exists()

    def test_of_other_weights(self, changeable):
        """The same seed trained once more is another model."""
        evaluated.write(changeable / "results.json", evaluated.results())
        with pytest.raises(ResultsError, match=r"not of qa1: .* of seed0 \(seed 0\), seed1"):
            card_of(changeable)

    def test_of_weights_that_were_on_the_hub(self, changeable):
        results = evaluated.results()
        for run in results["runs"]:
            run["weights"] = None
        evaluated.write(changeable / "results.json", results)
        assert len(ModelCard(card_of(changeable)).data.eval_results) == 2

    def test_of_the_adapter_that_was_merged(self, changeable):
        evaluated.write(changeable / "results.json", evaluated.results())
        evaluated.write(changeable / "training.json", evaluated.training() | {"merged_from": f"{0:016x}"})
        assert len(ModelCard(card_of(changeable)).data.eval_results) == 2

    def test_single_segment_needs_no_control(self):
        results = evaluated.results()
        for run in results["runs"]:
            run["lengths"][0]["segments"] = 1
            for control in ("memory off", "memory swapped"):
                del run["lengths"][0]["scores"][control]
        check_results(results)


class TestFewSeeds:
    """Are shown, and claim nothing over seeds."""

    @staticmethod
    def results_with(folder: Path, seeds: list[int | None]) -> str:
        results = evaluated.results(folder)
        results["runs"] = results["runs"][: len(seeds)]
        for run, seed in zip(results["runs"], seeds, strict=True):
            run["seed"] = seed
        evaluated.write(folder / "results.json", results)
        return section(card_of(folder), "Results")

    @pytest.mark.parametrize(("seed", "shown"), [(0, "0"), (None, "unknown")])
    def test_one(self, changeable, seed, shown):
        text = self.results_with(changeable, [seed])
        assert "**One seed** was measured: the intervals are over samples, and nothing is claimed over seeds." in text
        assert f"| 4k | 5,123 | 161 | 1,000 | {shown} | 95.0% [93.7, 96.1] |" in text
        assert "All seeds" not in text

    @pytest.mark.parametrize("seeds", [[0, 1], [7, 7, 7], [0, 1, None]])
    def test_fewer_than_three(self, changeable, seeds):
        text = self.results_with(changeable, seeds)
        assert "**Fewer than three different seeds** were measured" in text and "All seeds" not in text

    def test_three(self, card):
        text = section(card, "Results")
        assert "All seeds that were measured are shown, none is picked; this repository holds seed 0." in text
        assert "nothing is claimed" not in text

    def test_one_is_marked_on_the_leaderboard_too(self, changeable):
        self.results_with(changeable, [0])
        entries = gather(inspect_folder(changeable)).leaderboard_entries()
        assert all(entry.notes.endswith("; one seed") for entry in entries) and len(entries) == 2


class TestLossResults:
    """Tasks without right answers."""

    @pytest.fixture
    def results(self, changeable) -> dict[str, Any]:
        def losses(start: float) -> list[dict[str, float]]:
            means = [start - 0.0511 * segment for segment in range(3)]
            return [{"mean": mean, "low": mean - 0.0213, "high": mean + 0.0219} for mean in means]

        results = evaluated.results(changeable)
        results["task"] = {"name": "text", "options": {}}
        results["baselines"] = {}
        for run in results["runs"]:
            for entry in run["lengths"]:
                del entry["scores"], entry["by_distance"]
                starts = {"memory": 3.1, "memory off": 3.2, "carried tokens": 3.15}
                entry["loss_by_segment"] = {name: losses(start) for name, start in starts.items()}
                entry["memory_minus"] = {"memory off": {"mean": -0.1, "low": -0.1313, "high": -0.0717}}
        return results

    def test_are_shown_by_segment(self, results, changeable):
        evaluated.write(changeable / "results.json", results)
        text = section(card_of(changeable), "Results")
        assert "| 4k | 2 | 1 | 3.049 [3.028, 3.071] | 3.149 [3.128, 3.171] | 3.099 [3.078, 3.121] |" in text
        assert "| 4k | 2 | -0.100 [-0.131, -0.072] |" in text
        assert "Share of right answers" not in text

    def test_need_their_controls(self, results):
        del results["runs"][0]["lengths"][0]["loss_by_segment"]["carried tokens"]
        with pytest.raises(ResultsError, match="carried tokens at 0k of seed 0"):
            check_results(results)


class TestProvenance:
    """What a conversion notes of its backbone."""

    def backbone(self, folder: Path, card: str | None) -> Path:
        folder = folder / "tiny-llama"
        folder.mkdir()
        if card is not None:
            (folder / "README.md").write_text(card)
        return folder

    def test_name_and_licence(self, tmp_path):
        card = "---\nlicense: other\nlicense_name: my-terms\nlicense_link: LICENSE\nlanguage: en\n---\n# Mine\n"
        assert describe_backbone(self.backbone(tmp_path, card)) == {
            "name": "tiny-llama", "license": "other", "license_name": "my-terms", "license_link": "LICENSE",
        }  # fmt: skip

    @pytest.mark.parametrize("card", [None, "# No metadata\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n"])
    def test_unknown_licence(self, tmp_path, card):
        assert describe_backbone(self.backbone(tmp_path, card)) == {"name": "tiny-llama"}

    def test_card_that_is_no_text(self, tmp_path):
        folder = self.backbone(tmp_path, "")
        (folder / "README.md").write_bytes(b"\xff\xfe---")
        assert describe_backbone(folder) == {"name": "tiny-llama"}

    def test_hub_that_is_out_of_reach(self):
        assert describe_backbone("bob/nonesuch") == {"name": "bob/nonesuch"}

    def test_several_licences(self, tmp_path, changeable):
        several = describe_backbone(self.backbone(tmp_path, "---\nlicense: [mit, apache-2.0]\n---\n"))
        config = json.loads((changeable / "config.json").read_text())
        evaluated.write(changeable / "config.json", config | {"converted_from": several})
        text = card_of(changeable)
        assert ModelCard(text).data.license == ["mit", "apache-2.0"]
        assert "Its licence, mit, apache-2.0, holds for this model too." in section(text, "Model")

    def test_is_carried_to_the_card(self, changeable):
        config = json.loads((changeable / "config.json").read_text())
        terms = {"license": "other", "license_name": "my-terms", "license_link": "https://example.org/terms"}
        evaluated.write(changeable / "config.json", config | {"converted_from": {"name": "bob/llama", **terms}})
        data = ModelCard(card_of(changeable)).data.to_dict()
        assert {name: data[name] for name in (*terms, "base_model")} == {**terms, "base_model": "bob/llama"}


class TestLicence:
    """The backbone's holds for what was made from it, and stands on the card."""

    @pytest.fixture
    def unknown(self, changeable) -> Path:
        config = json.loads((changeable / "config.json").read_text())
        del config["converted_from"]["license"]
        evaluated.write(changeable / "config.json", config)
        return changeable

    def test_unknown_one_is_said_to_be(self, unknown):
        text = card_of(unknown)
        assert "**The licence of the backbone is not known**" in section(text, "Model")
        assert ModelCard(text).data.license == "unknown"
        assert check_card(text) == ([], [])

    def test_unknown_one_is_not_published(self, unknown):
        with pytest.raises(FolderError, match="--license"):
            publish(unknown, "ann/qa1", dry_run=True)

    def test_that_is_given(self, unknown):
        text = card_of(unknown, license="mit")
        assert ModelCard(text).data.license == "mit"
        assert "Its licence, mit, holds for this model too." in section(text, "Model")

    def test_that_is_given_wins_and_the_backbones_is_told(self, folder):
        text = card_of(folder, license="mit")
        assert ModelCard(text).data.license == "mit"
        assert "too (the backbone's own card says apache-2.0)." in section(text, "Model")

    def test_that_is_given_as_it_is_keeps_what_belongs_to_it(self, changeable):
        config = json.loads((changeable / "config.json").read_text())
        config["converted_from"] |= {"license": "other", "license_name": "my-terms"}
        evaluated.write(changeable / "config.json", config)
        assert ModelCard(card_of(changeable, license="other")).data.license_name == "my-terms"


class TestPlaces:
    @pytest.mark.parametrize(
        ("written", "shown"),
        [
            ("/home/ann/armt", "armt"),
            ("armt train /home/ann/armt --task-option babi=/home/ann/babi", "armt train armt --task-option babi=babi"),
            ("armt evaluate '/home/ann lee/qa1' seed1", "armt evaluate 'qa1' seed1"),
            ("ann/armt", "ann/armt"),
            ("1/3 of it, and/or more", "1/3 of it, and/or more"),
        ],
    )
    def test_are_not_shown(self, written, shown):
        assert without_places({"a": [written]}) == {"a": [shown]}


class TestErrors:
    def test_field_that_the_facts_do_not_have(self, folder, tmp_path):
        template = tmp_path / "card.md.jinja"
        template.write_text(TEMPLATE.read_text() + "\n{{ carbon_footprint }}\n")
        with pytest.raises(CardError, match="'carbon_footprint' is undefined"):
            render_card(gather(inspect_folder(folder)), template)

    def test_template_without_metadata(self, folder, tmp_path):
        (tmp_path / "card.md.jinja").write_text("# {{ name }}\n")
        with pytest.raises(CardError, match="no metadata"):
            render_card(gather(inspect_folder(folder)), tmp_path / "card.md.jinja")

    def test_base_that_can_be_no_name(self, folder):
        with pytest.raises(FolderError, match="'ann/' cannot be a name on the Hub"):
            card_of(folder, base="ann/")

    def test_results_that_are_not_there(self, folder, tmp_path):
        with pytest.raises(FolderError, match="no results.json"):
            card_of(folder, results=tmp_path)

    def test_page_of_another_checkpoint(self, changeable):
        write_page(changeable / "inspect.html", f"{1:016x}")
        with pytest.raises(FolderError, match=r"inspect\.html shows another checkpoint"):
            card_of(changeable)

    def test_page_of_something_else(self, changeable):
        (changeable / "inspect.html").write_text("<html></html>")
        with pytest.raises(FolderError, match="is not a page of `armt inspect`"):
            card_of(changeable)

    @pytest.mark.parametrize("content", ['{"recipe": null}', '{"recipe": []}', '{"stages": 3}', '{"stages": [1]}'])
    def test_training_that_is_something_else(self, changeable, content):
        (changeable / "training.json").write_text(content)
        with pytest.raises(FolderError, match="training.json is not what `armt train` writes"):
            card_of(changeable)

    @pytest.mark.parametrize("name", ["results.json", "training.json", "config.json"])
    def test_list_in_place_of_fields(self, changeable, name):
        (changeable / name).write_text("[]")
        with pytest.raises(FolderError, match=f"{name} holds no fields"):
            card_of(changeable)

    def test_folder_in_place_of_the_card(self, folder, tmp_path, capsys):
        assert main(["card", str(folder), "--out", str(tmp_path)]) == 1
        assert "is a folder. Name the file to write" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["results.json", "training.json"])
    def test_damaged_file(self, changeable, name):
        (changeable / name).write_text('{"half": ')
        with pytest.raises(FolderError, match=f"{name} is not JSON"):
            card_of(changeable)


class TestCommand:
    def test_prints_the_card(self, folder, capsys):
        assert main(["card", str(folder)]) == 0
        assert capsys.readouterr().out == card_of(folder) + "\n"

    def test_writes_the_card_and_leaves_the_folder_alone(self, folder, tmp_path):
        before = evaluated.contents(folder)
        assert main(["card", str(folder), "--out", str(tmp_path / "card.md")]) == 0
        assert (tmp_path / "card.md").read_text() == card_of(folder)
        assert evaluated.contents(folder) == before

    def test_writes_its_own_card_again(self, folder, tmp_path):
        out = tmp_path / "card.md"
        for options in ([], ["--base", "bob/llama"]):
            assert main(["card", str(folder), "--out", str(out), *options]) == 0
        assert out.read_text() == card_of(folder, base="bob/llama")

    @pytest.mark.parametrize("change", [lambda card: "# Mine\n", lambda card: "", lambda card: card + "Mine.\n",
                                        lambda card: card.replace("95%", "99%")])  # fmt: skip
    def test_leaves_alone_what_it_did_not_write(self, folder, tmp_path, capsys, change):
        out = tmp_path / "card.md"
        out.write_text(change(card_of(folder)))
        before = out.read_bytes()
        assert main(["card", str(folder), "--out", str(out)]) == 1
        assert "was not written by `armt card`, or was changed since" in capsys.readouterr().err
        assert out.read_bytes() == before

    def test_takes_results_from_another_folder(self, changeable, tmp_path):
        other = tmp_path / "evaluation"
        other.mkdir()
        for name in ("results.json", "score_by_length.png"):
            (changeable / name).rename(other / name)
        text = card_of(changeable, results=other)
        assert "| chance | 16.7% | 16.7% |" in text and "score_by_length.png" in text


def test_template_is_plain_jinja():
    Environment().parse(TEMPLATE.read_text(encoding="utf-8"))
