"""`armt evaluate`: what it writes, how it goes on where it was cut off, and how it fails."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from evaluation_models import symbol_model, talking_model, with_memory, write_training
from PIL import Image
from transformers import AutoTokenizer

from modeling_armt.conversion.cli import main
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.evaluation.controls import CONTROLS, MEMORY
from modeling_armt.conversion.evaluation.evaluate import evaluate
from modeling_armt.conversion.evaluation.plots import score_by_length
from modeling_armt.conversion.evaluation.results import Results
from modeling_armt.conversion.files import write_whole


RETRIEVAL = ("--task", "associative_retrieval")


@pytest.fixture(scope="module")
def symbols(tmp_path_factory):
    """A folder of a random model of symbols, without a tokenizer."""
    folder = tmp_path_factory.mktemp("command") / "symbols"
    with_memory(symbol_model(1, hidden=32, layers=2)).save_pretrained(folder)
    write_training(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A folder of a model of text, with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("command") / "talks"
    talking_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder of sixty short books."""
    folder = tmp_path_factory.mktemp("library")
    for book in range(60):
        sentences = [
            f"The {thing} of house {book} was old. It stood there." for thing in ("door", "roof", "wall") * 15
        ]
        (folder / f"book{book}.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture
def armt(capsys):
    """Runs the command; returns its exit code and what it said."""

    def run(*arguments):
        code = main(["evaluate", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def fails(armt):
    """Runs the command, which has to fail; returns the one line it says."""

    def run(*arguments):
        code, out, err = armt(*arguments)
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("armt: ")]
        assert (code, out, len(lines)) == (1, "", 1), err
        return lines[0]

    return run


def read(folder):
    return json.loads((folder / "results.json").read_text())


def without_clocks(content):
    """Results without what differs from run to run."""
    content = json.loads(json.dumps(content))
    content.pop("environment")
    for run in content["runs"]:
        for entry in run["lengths"]:
            del entry["tokens_per_s"], entry["peak_gib"], entry["date"]
    return content


class TestCommand:
    def test_writes_results_of_all_seeds(self, armt, symbols, tmp_path):
        other = tmp_path / "other"
        with_memory(symbol_model(2, hidden=32, layers=2)).save_pretrained(other)
        write_training(other, seed=1, out="elsewhere", model="another-start")
        out = tmp_path / "out"
        arguments = (*RETRIEVAL, "--lengths", "2p,20p", "--samples", 12, "--task-option", "rewrite=true")
        code, printed, said = armt(symbols, other, *arguments, "--out", out)
        assert code == 0
        content = read(out)
        assert content["task"] == {"name": "associative_retrieval", "options": {"rewrite": True}}
        assert content["environment"]["device"] == "CPU"
        assert {"torch", "transformers"} <= content["environment"]["versions"].keys()
        assert content["environment"]["date"] and content["environment"]["command"].startswith("armt ")
        assert content["baselines"].keys() == {"chance", "last value seen"}
        assert content["baselines"] == content["runs"][0]["lengths"][1]["baselines"]  # at the longest length
        assert [(run["checkpoint"], run["seed"]) for run in content["runs"]] == [("symbols", 0), ("other", 1)]
        for run in content["runs"]:
            assert [entry["length"] for entry in run["lengths"]] == ["2p", "20p"]
            for entry, controls in zip(run["lengths"], ({"backbone"}, set()), strict=True):
                assert entry["scores"].keys() == {"memory", "memory off", "memory swapped", "fact deleted"} | controls
                for score in entry["scores"].values():
                    assert 0 <= score["low"] <= score["mean"] <= score["high"] <= 1 and score["samples"] == 12
        assert {path.name for path in out.iterdir()} == {
            "results.json", "answers", "score_by_length.png", "score_by_distance.png"
        }  # fmt: skip
        assert len((out / "answers" / "other-20p.jsonl").read_text().splitlines()) == 12
        for name in ("symbols, seed 0", "other, seed 1", "2p", "20p", "memory", "95%", "swapped", "tokens/s"):
            assert name in printed, printed
        assert re.findall(r"^(\w+ \w+): memory [\d.]+, .*; 12 samples in \d+ s$", said, re.M) == [
            "symbols 2p", "symbols 20p", "other 2p", "other 20p"
        ]  # fmt: skip
        table = printed[: printed.index("Scored without reading")]
        assert max(map(len, table.splitlines())) <= 80 and "…" not in table

    def test_says_how_it_is_used(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["evaluate", "--help"])
        printed = capsys.readouterr().out
        options = ["--task", "--lengths", "--out", "--samples", "--task-option", "--controls", "--compile"]
        assert all(option in printed for option in options)

    @pytest.mark.parametrize("task", ["babilong", "passkey", "needle"])
    def test_answers_every_task_with_right_answers(self, armt, talks, library, tmp_path, task):
        options = {
            "babilong": [f"background={library}", f"cache={tmp_path / 'cache'}", "task=qa1"],
            "passkey": [],
            "needle": [f"background={library}"],
        }[task]
        arguments = [argument for option in options for argument in ("--task-option", option)]
        out = tmp_path / "out"
        code, printed, err = armt(talks, "--task", task, "--lengths", 400, "--samples", 3, *arguments, "--out", out)
        assert code == 0, err
        (entry,) = read(out)["runs"][0]["lengths"]
        assert entry["scores"].keys() == {"memory", "memory off", "memory swapped", "fact deleted"}
        assert entry["tokens"] > 300 and entry["samples"] == 3
        assert ("by_depth" in entry) is (task != "babilong")
        if task == "babilong":
            assert entry["background"]["unique_tokens"] > 400 and entry["background"]["repeated"] is False
        assert "chance" in read(out)["baselines"]

    def test_asks_instruction_models_for_labels(self, armt, talks, tmp_path):
        options = ["--task-option", "task=qa1", "--task-option", "protocol=instruct"]
        code, _, err = armt(
            talks, "--task", "babilong", "--lengths", "0k", "--samples", 2, *options, "--out", tmp_path / "out"
        )
        assert code == 0, err
        lines = (tmp_path / "out" / "answers" / "talks-0k.jsonl").read_text().splitlines()
        assert all(json.loads(line)["question"].startswith("Where is") for line in lines)

    @pytest.mark.parametrize("task", ["text", "chat"])
    def test_measures_the_loss_of_the_other_tasks(self, armt, talks, library, tmp_path, task):
        if task == "chat":
            source = tmp_path / "talks.jsonl"
            turns = [[("user", f"What is {n}?"), ("assistant", f"It is number {n}. " * 6)] for n in range(60)]
            source.write_text(
                "\n".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in turn]}) for turn in turns)
            )
        else:
            source = library
        out = tmp_path / "out"
        code, printed, err = armt(
            talks, "--task", task, "--task-option", f"source={source}", "--lengths", 100, "--out", out
        )
        assert code == 0, err
        (entry,) = read(out)["runs"][0]["lengths"]
        assert entry["samples"] > 2  # as many as there are
        names = {"memory", "memory off", "carried tokens", "full attention"}
        assert entry["loss_by_segment"].keys() == entry["loss"].keys() == names
        assert entry["memory_minus"].keys() == names - {"memory"}
        assert entry["groups"] > 1 and "scores" not in entry
        assert (out / "loss_by_segment.png").exists()
        assert "minus" in printed and "full attention" in printed

    def test_draws_figures_that_show_something(self, armt, symbols, tmp_path):
        armt(symbols, *RETRIEVAL, "--lengths", "2p,9p", "--samples", 5, "--out", tmp_path / "out")
        for name in ("score_by_length.png", "score_by_distance.png"):
            with Image.open(tmp_path / "out" / name) as image:
                assert image.width > 600 and len(image.convert("RGB").getcolors(2**20)) > 100

    def test_what_is_written_beside_a_figure_does_not_overlap(self):
        score = {"mean": 0.5, "low": 0.4, "high": 0.6, "samples": 9}
        baselines = {"chance": 0.1, "majority": 0.11, "last location mentioned": 0.527}
        scores = dict.fromkeys([MEMORY, *CONTROLS.values()], score)
        entry = {"length": "4k", "tokens": 4000, "baselines": baselines, "scores": scores}
        runs = [{"checkpoint": f"qa1-{seed}", "seed": seed, "lengths": [entry]} for seed in range(3)]
        figure = score_by_length({"task": {"name": "babilong", "options": {"task": "qa1"}}, "runs": runs}, runs)
        figure.draw_without_rendering()
        labels = [text for text in figure.axes[0].texts if text.get_text().replace("_", " ") in baselines]
        boxes = [artist.get_window_extent() for artist in (*labels, *figure.legends)]
        assert len(boxes) == 4
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)

    def test_writes_results_where_there_is_no_matplotlib(self, symbols, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.warns(UserWarning, match="matplotlib is not installed: pip install"):
            evaluate([symbols], "associative_retrieval", ["2p"], tmp_path / "out", samples=2, controls=[])
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "answers"}


class TestResume:
    def test_measures_only_what_is_not_there(self, armt, symbols, tmp_path):
        out = tmp_path / "out"
        arguments = (symbols, *RETRIEVAL, "--samples", 5, "--out", out)
        armt(*arguments, "--lengths", "2p")
        before = read(out)
        before["runs"][0]["lengths"][0]["scores"]["memory"]["mean"] = 0.123  # would not survive being measured again
        (out / "results.json").write_text(json.dumps(before))
        code, _, _ = armt(*arguments, "--lengths", "7p,2p")
        assert code == 0
        first, second = read(out)["runs"][0]["lengths"]
        assert first == before["runs"][0]["lengths"][0] and second["length"] == "7p"

    def test_goes_on_where_it_was_killed(self, armt, symbols, tmp_path):
        arguments = (symbols, *RETRIEVAL, "--task-option", "rewrite=true", "--samples", 40, "--controls", "off")
        out, whole = tmp_path / "out", tmp_path / "whole"
        command = [
            sys.executable,
            "-m",
            "modeling_armt.conversion",
            "evaluate",
            *map(str, arguments),
            "--out",
            str(out),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*command, "--lengths", "2p,2kp"], env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while not (out / "results.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was at work
        left = read(out)
        assert [entry["length"] for entry in left["runs"][0]["lengths"]] == ["2p"]
        armt(*arguments, "--lengths", "2p,9p", "--out", out)
        armt(*arguments, "--lengths", "2p,9p", "--out", whole)
        assert read(out)["runs"][0]["lengths"][0] == left["runs"][0]["lengths"][0]
        assert without_clocks(read(out)) == without_clocks(read(whole))

    def test_names_each_command_once(self, tmp_path):
        for command in ("armt a", "armt b", None, "armt b", "armt a", "armt c"):
            results = Results(tmp_path, {"task": "", "options": {}}, {"command": command})
            results.write()
        assert read(tmp_path)["environment"]["command"] == "armt a && armt b && armt c"

    def test_a_control_can_come_later(self, armt, symbols, tmp_path):
        out, whole = tmp_path / "out", tmp_path / "whole"
        arguments = (symbols, *RETRIEVAL, "--lengths", "2p,9p", "--samples", 20)
        armt(*arguments, "--out", out, "--controls", "off", "swapped")
        before = read(out)
        code, _, said = armt(*arguments, "--out", out, "--controls", "off", "deleted")
        assert code == 0, said
        armt(*arguments, "--out", whole, "--controls", "off", "swapped", "deleted")
        found = read(out)
        assert found["environment"]["command"].count("--controls") == 2
        assert "again" not in said
        for entry, old in zip(found["runs"][0]["lengths"], before["runs"][0]["lengths"], strict=True):
            assert entry["controls"] == ["off", "swapped", "deleted"]
            assert (entry["date"], entry["tokens_per_s"]) == (old["date"], old["tokens_per_s"])
            (added,) = entry.pop("added")
            assert added["controls"] == ["deleted"] and added["device"] == "CPU" and added["date"] >= old["date"]
        assert without_clocks(found) == without_clocks(read(whole))
        for name in ("symbols-2p.jsonl", "symbols-9p.jsonl"):
            assert (out / "answers" / name).read_text() == (whole / "answers" / name).read_text()

        kept = read(out)
        for controls in (["off", "deleted"], ["off", "swapped"]):  # all there: neither measured nor written down again
            armt(*arguments, "--out", out, "--controls", *controls)
            assert read(out) == kept

    def test_without_its_answers_a_length_is_measured_again(self, armt, symbols, tmp_path):
        arguments = (symbols, *RETRIEVAL, "--lengths", "2p", "--samples", 20, "--out", tmp_path / "out")
        armt(*arguments, "--controls", "off", "swapped")
        (tmp_path / "out" / "answers" / "symbols-2p.jsonl").unlink()
        _, _, said = armt(*arguments, "--controls", "deleted")
        assert "symbols 2p: measured again, with deleted, since its answers are not there." in said
        (entry,) = read(tmp_path / "out")["runs"][0]["lengths"]
        assert entry["controls"] == ["off", "swapped", "deleted"] and "added" not in entry
        assert entry["scores"].keys() == {"memory", "memory off", "memory swapped", "fact deleted"}
        assert len((tmp_path / "out" / "answers" / "symbols-2p.jsonl").read_text().splitlines()) == 20

    def test_a_control_of_a_loss_can_come_later(self, armt, talks, library, tmp_path):
        arguments = (talks, "--task", "text", "--task-option", f"source={library}", "--lengths", 100)
        for controls in (["off"], ["carried"]):
            armt(*arguments, "--out", tmp_path / "out", "--controls", *controls)
        armt(*arguments, "--out", tmp_path / "whole", "--controls", "off", "carried")
        assert without_clocks(read(tmp_path / "out")) == without_clocks(read(tmp_path / "whole"))

    def test_a_seed_can_come_later(self, armt, symbols, tmp_path):
        other, out = tmp_path / "other", tmp_path / "out"
        shutil.copytree(symbols, other)
        write_training(other, seed=1)
        arguments = (*RETRIEVAL, "--lengths", "2p", "--samples", 3, "--out", out)
        armt(symbols, *arguments)
        armt(other, *arguments)
        assert [run["seed"] for run in read(out)["runs"]] == [0, 1]

    def test_writes_the_whole_file_or_none(self, tmp_path):
        file = tmp_path / "results.json"
        write_whole(file, "old")
        with pytest.raises(UnicodeEncodeError):
            write_whole(file, "new \ud800")
        assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


class TestErrors:
    @pytest.fixture
    def out(self, tmp_path):
        return tmp_path / "out"

    def test_of_a_checkpoint(self, fails, symbols, talks, out, tmp_path):
        lengths = ("--lengths", "2p", "--out", out)
        assert "is a plain llama model, not an ARMT checkpoint" in fails(BACKBONE, *RETRIEVAL, *lengths)
        assert "there is no checkpoint /no/such/folder" in fails("/no/such/folder", *RETRIEVAL, *lengths)
        assert "a checkpoint is named twice" in fails(symbols, symbols, *RETRIEVAL, *lengths)
        assert "the checkpoint has no tokenizer" in fails(symbols, "--task", "passkey", "--lengths", 300, "--out", out)
        other = tmp_path / "other"
        shutil.copytree(symbols, other)
        write_training(other, seed=1, lr=1.0)
        assert "are not seeds of one recipe: they differ in lr. " in fails(symbols, other, *RETRIEVAL, *lengths)
        (other / "training.json").write_text("{")
        assert re.search(r"training.json is damaged", fails(symbols, other, *RETRIEVAL, *lengths))
        assert not out.exists()

    def test_of_a_tokenizer_without_its_special_tokens(self, fails, talks, out, tmp_path):
        folder = tmp_path / "talks"
        shutil.copytree(talks, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.eos_token = tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        lengths = ("--lengths", 300, "--out", out)
        assert "The tokenizer has no end-of-text token" in fails(
            folder, "--task", "babilong", "--task-option", "task=qa1", *lengths
        )
        assert "has no chat template" in fails(folder, "--task", "chat", "--task-option", "source=x", *lengths)
        assert not out.exists()

    def test_of_a_task(self, fails, symbols, talks, out):
        lengths = ("--lengths", "2p", "--out", out)
        assert "There is no task 'memory'; it must be one of: associative_retrieval" in fails(
            symbols, "--task", "memory", *lengths
        )
        assert "has no option colour; its options are: key_size" in fails(
            symbols, *RETRIEVAL, "--task-option", "colour=red", *lengths
        )
        assert "'key_size' is not NAME=VALUE" in fails(symbols, *RETRIEVAL, "--task-option", "key_size", *lengths)
        assert "there are only 16 of key_size 1" in fails(symbols, *RETRIEVAL, "--lengths", "20p", "--out", out)
        assert "has no control carried; it has: off" in fails(symbols, *RETRIEVAL, *lengths, "--controls", "carried")
        assert not out.exists()

    def test_of_a_length(self, fails, symbols, talks, out):
        assert "'soon' is not a length" in fails(symbols, *RETRIEVAL, "--lengths", "soon", "--out", out)
        assert "there are no lengths" in fails(symbols, *RETRIEVAL, "--lengths", ",", "--out", out)
        assert "1 pairs need a length of 8 tokens, not 5" in fails(symbols, *RETRIEVAL, "--lengths", 5, "--out", out)
        assert "A passkey sample without any filler has" in fails(
            talks, "--task", "passkey", "--lengths", "1k,20", "--out", out
        )
        assert "samples is 0" in fails(symbols, *RETRIEVAL, "--lengths", "2p", "--samples", 0, "--out", out)
        assert not out.exists()

    def test_of_a_folder_with_other_results(self, fails, armt, symbols, out, tmp_path):
        arguments = (symbols, *RETRIEVAL, "--lengths", "2p", "--out", out)
        armt(*arguments, "--samples", 3)
        kept = (out / "results.json").read_bytes()
        assert "has results of another command, with samples 3 instead of 4" in fails(*arguments, "--samples", 4)
        assert "with options {} instead of {'rewrite': True}" in fails(
            *arguments, "--samples", 3, "--task-option", "rewrite=true"
        )
        changed = tmp_path / "symbols"
        with_memory(symbol_model(5, hidden=32, layers=2)).save_pretrained(changed)
        assert "has results of other weights under the name symbols" in fails(changed, *arguments[1:], "--samples", 3)
        assert (out / "results.json").read_bytes() == kept
        for damaged in (kept[:100], b"[]", b'{"runs": []}'):
            (out / "results.json").write_bytes(damaged)
            assert "results.json is not a file of results, or a damaged one" in fails(*arguments, "--samples", 3)
            assert (out / "results.json").read_bytes() == damaged
        file = tmp_path / "file"
        file.write_text("")
        assert "is a file; name a folder" in fails(symbols, *RETRIEVAL, "--lengths", "2p", "--out", file)

    def test_of_damaged_answers(self, fails, armt, symbols, out):
        arguments = (symbols, *RETRIEVAL, "--lengths", "2p", "--out", out, "--samples", 3, "--controls")
        armt(*arguments, "off")
        kept = (out / "results.json").read_bytes()
        answers = out / "answers" / "symbols-2p.jsonl"
        lines = answers.read_text().splitlines(keepends=True)
        nothing = json.dumps({"answers": {}}) + "\n"
        for damaged, complaint in (
            ("{", "symbols-2p.jsonl is damaged (JSONDecodeError"),
            ("1\n" * 3, "symbols-2p.jsonl is damaged (TypeError"),
            (nothing * 3, "symbols-2p.jsonl is damaged (KeyError: 'scores')"),
            (lines[0], "The answers that were kept are of other samples. Remove them"),
        ):
            answers.write_text(damaged)
            assert complaint in fails(*arguments, "deleted")
            assert (out / "results.json").read_bytes() == kept
