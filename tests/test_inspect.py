"""`armt inspect`: the weights of segments are exact, the numbers are the model's, the page needs only itself."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SEGMENT_SIZE, random_ids, tiny_model
from matplotlib.figure import Figure
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.evaluation.subject import hash_weights
from modeling_armt.conversion.inspecting import record as recording
from modeling_armt.conversion.inspecting.figures import label
from modeling_armt.conversion.inspecting.page import inspect_text
from modeling_armt.conversion.inspecting.record import record
from modeling_armt.conversion.inspecting.weights import ReplayedWrites, one_hot_of_segment


SEGMENTS = 5
LENGTH = SEGMENTS * SEGMENT_SIZE + 3
TEXT = "The old house stood at the end of the road, and <b>nobody</b> went there & came back.\n" * 9


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


MEMORIES = {
    "default": {},
    "paper": {"normalize_features": False, "gamma_eps": 1e-5},
    "no correction": {"correction": False},
    "no denominator": {"use_denom": False},
}


# The weights


class Watched:
    """The terms of all reads and writes of one layer, one segment after the other."""

    def __init__(self, model: ARMTForCausalLM, layer: int, ids: torch.Tensor):
        memory, self.reads, self.writes = model.memory[str(layer)], [], []
        read, write = memory.read, memory.write

        def watched_read(x, state):
            x, terms = read(x, state)
            self.reads.append(terms)
            return x, terms

        def watched_write(*args):
            state, terms = write(*args)
            self.writes.append(terms)
            return state, terms

        memory.read, memory.write = watched_read, watched_write
        model(ids[None], use_cache=True, schedule="sequential")
        del memory.read, memory.write


@pytest.mark.parametrize("kind", MEMORIES)
def test_weights_times_values_are_the_read(kind: str):
    """With a one-hot for every memory token, weights times what was written is what the model read, to rounding."""
    model, ids = tiny_model("llama", **MEMORIES[kind]), random_ids(LENGTH)
    for layer in (0, 1):
        seen = Watched(model, layer, ids)
        m = seen.writes[0].k.shape[1]
        assert len(seen.writes) == len(seen.reads) == SEGMENTS  # the first segment reads nothing, the tail does
        replayed = ReplayedWrites(seen.writes[0].k, SEGMENTS * m)
        one_hots = torch.eye(SEGMENTS * m, dtype=torch.float64).split(m)
        values = torch.cat([terms.v[0] for terms in seen.writes])
        for read, write, one_hot in zip(seen.reads, seen.writes, one_hots, strict=True):
            replayed.write(write, one_hot)
            rebuilt = replayed.read(read) @ values
            assert read.answer.abs().max() > 1e-3
            torch.testing.assert_close(rebuilt, read.answer[0], rtol=1e-9, atol=1e-12)


def test_a_segment_with_the_same_value_in_all_tokens_comes_back_by_its_weight():
    """What the page says of a weight: what a segment wrote comes back multiplied by it."""
    model, ids = tiny_model("llama"), random_ids(LENGTH)
    seen = Watched(model, 0, ids)
    weights, real = (ReplayedWrites(seen.writes[0].k, width) for width in (SEGMENTS, 7))
    values = torch.randn(SEGMENTS, 7, dtype=torch.float64)
    for number, terms in enumerate(seen.writes):
        weights.write(terms, one_hot_of_segment(number, terms, SEGMENTS))
        real.write(terms, values[number].expand(terms.k.shape[1], -1))
    torch.testing.assert_close(weights.read(seen.reads[-1]) @ values, real.read(seen.reads[-1]))


@pytest.mark.parametrize("layer", [0, 1])
def test_recorded_weights_are_means_over_the_tokens_of_a_segment(layer: int):
    model, ids = tiny_model("llama"), random_ids(LENGTH)
    found, seen = record(model, ids).layers[layer], Watched(model, layer, ids)
    assert found.weights.shape == (SEGMENTS + 1, SEGMENTS)
    assert found.weights[0].isnan().all()
    replayed = ReplayedWrites(seen.writes[0].k, SEGMENTS)
    for number, (read, write) in enumerate(zip(seen.reads, seen.writes, strict=True)):
        replayed.write(write, one_hot_of_segment(number, write, SEGMENTS))
        tokens = replayed.read(read)[:SEGMENT_SIZE]
        torch.testing.assert_close(found.weights[number + 1], tokens.mean(0))
    torch.testing.assert_close(found.last_weights, tokens)
    assert len(tokens) == 3


def test_groups_of_segments_have_the_sum_of_their_weights(monkeypatch):
    model, ids = tiny_model("llama"), random_ids(LENGTH)
    one_by_one = record(model, ids).layers[0].last_weights
    monkeypatch.setattr(recording, "MOST_GROUPS", 3)
    grouped = record(model, ids)
    assert grouped.group == 2
    expected = torch.stack([one_by_one[:, :2].sum(1), one_by_one[:, 2:4].sum(1), one_by_one[:, 4]], dim=1)
    torch.testing.assert_close(grouped.layers[0].last_weights, expected)
    assert grouped.layers[0].weights.shape == (3, 3)


# The other numbers


@pytest.mark.parametrize("length", [LENGTH, SEGMENTS * SEGMENT_SIZE, SEGMENT_SIZE + 2])
def test_losses_are_those_of_the_model(length: int):
    model, ids = tiny_model("llama"), random_ids(length)
    found = record(model, ids)
    logits = model(ids[None], use_cache=False).logits[0]
    expected = nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
    assert torch.allclose(found.loss.float(), expected, atol=1e-6)
    alone = torch.cat([model(piece[None], use_cache=False).logits[0] for piece in ids.split(SEGMENT_SIZE)])
    expected = nn.functional.cross_entropy(alone[:-1].float(), ids[1:], reduction="none")
    assert torch.allclose(found.loss_alone.float(), expected, atol=1e-6)
    assert torch.equal(found.loss[: SEGMENT_SIZE - 1], found.loss_alone[: SEGMENT_SIZE - 1])
    assert not torch.allclose(found.loss[SEGMENT_SIZE:], found.loss_alone[SEGMENT_SIZE:])


def test_norms_and_gammas_are_those_of_the_cache():
    model, ids = tiny_model("llama"), random_ids(LENGTH)
    found = record(model, ids)
    for number in range(1, SEGMENTS + 1):
        stats = model(ids[None, : number * SEGMENT_SIZE], use_cache=True).cache.stats()
        for layer, values in stats.items():
            of = found.layers[layer]
            assert of.A_norm[number - 1] == pytest.approx(values["A_norm"][0], rel=1e-9)
            assert of.z_norm[number - 1] == pytest.approx(values["z_norm"][0], rel=1e-9)
            assert np.mean(of.gamma[:number]) == pytest.approx(values["mean_gamma"][0], rel=1e-9)
    whole = model(ids[None], use_cache=True).cache.stats()
    assert found.stats[0]["lambda_max"] == pytest.approx(whole[0]["lambda_max"])


def test_the_model_is_left_as_it_was():
    model, ids = tiny_model("llama"), random_ids(LENGTH)
    before = [dict(vars(memory)) for memory in model.memory.values()]
    record(model, ids)
    with pytest.raises(ZeroDivisionError):
        record(model, ids, progress=lambda tokens: 1 / 0)
    assert [vars(memory).keys() for memory in model.memory.values()] == [of.keys() for of in before]


# The page


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The demonstration's backbone with memories that matter, in segments of 16 tokens."""
    folder = tmp_path_factory.mktemp("inspect") / "armt"
    with torch.no_grad():
        model = convert(BACKBONE, folder, segment_size=16, num_mem_tokens=4, d_mem=16)
        torch.manual_seed(0)
        for memory in model.memory.values():
            nn.init.normal_(memory.memory_value.weight, std=0.05)
    model.save_pretrained(folder)
    return folder


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.links, self.text, self.inside, self.scripts = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.inside == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.inside[-1:] in (["script"], ["style"]) else self.text).append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(checkpoint, tmp_path_factory) -> tuple[Page, dict]:
    """The page that the command writes, and the numbers in it."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "house.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["inspect", str(checkpoint), "--text", str(folder / "house.txt"), "--out", str(folder / "page.html")]
    assert main([*arguments, "--layers", "0", "3"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["house.txt", "page.html"]
    found = Page((folder / "page.html").read_text(encoding="utf-8"))
    return found, json.loads(next(script for script in found.scripts if script.startswith("{")))


def test_the_page_needs_nothing_but_itself(page):
    found, _ = page
    assert found.links and all(link.startswith("data:image/svg+xml;base64,") for link in found.links)
    style = "".join(found.scripts)
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert [attributes["type"] for attributes in found.all("script")] == ["application/json"]


def test_the_page_says_what_it_shows(page):
    found, numbers = page
    text = " ".join(found.text)
    assert "What the memory of armt does on house.txt" in text
    assert len(found.all("h2")) == 6 and len(found.all("img")) == 4
    assert all(image["alt"] for image in found.all("img"))
    assert re.search(r"loss\s+is \d+\.\d{3} nats a token with memory and \d+\.\d{3} with each segment alone", text)
    for heading in ("largest lambda", "least q·z", "share of gammas 0", "doublings of |A| per 1,000 segments"):
        assert heading in text
    assert f"segment {numbers['segments']}" in text


def test_the_numbers_on_the_page_are_the_models(page, checkpoint):
    _, numbers = page
    model = ARMTForCausalLM.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT, return_tensors="pt")["input_ids"]
    output = model(ids, use_cache=True)
    stats = output.cache.stats()
    assert numbers["segments"] == ids.shape[1] // 16
    losses = nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:], reduction="none").split(16)
    assert numbers["loss_by_segment"]["memory"] == pytest.approx([loss.mean().item() for loss in losses], rel=1e-3)
    for layer, values in stats.items():
        mine = numbers["layers"][str(layer)]
        assert mine["A_norm"][-1] == pytest.approx(values["A_norm"][0], rel=1e-3)
        assert np.mean(mine["gamma"]) == pytest.approx(values["mean_gamma"][0], rel=1e-3)
        assert numbers["stats"][str(layer)]["min_qz"] == pytest.approx(values["min_qz"], rel=1e-3)
    assert [layer for layer, of in numbers["layers"].items() if "weights" in of] == ["0", "3"]


def test_text_of_the_file_is_text_on_the_page(page):
    found, _ = page
    assert not found.all("b")
    assert "nobody" in " ".join(found.text)


def test_a_long_text_makes_no_larger_page(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "MOST_GROUPS", 4)
    sizes = []
    for times in (1, 3):
        page = tmp_path / f"{times}.html"
        found = inspect_text(checkpoint, TEXT * times, page)
        assert found.segments > 4 * times and found.layers[0].weights.shape[1] <= 4
        sizes.append(page.stat().st_size)
        assert f"{found.group} neighbouring segments share a row" in page.read_text(encoding="utf-8")
    assert sizes[1] < 1.3 * sizes[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_an_adapter_is_inspected_on_its_base(checkpoint, tmp_path):
    model = ARMTForCausalLM.from_pretrained(checkpoint)
    adapted = get_peft_model(model, lora_config(model, r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name and "memory_value" in name:
                parameter.mul_(3)
    adapted.save_pretrained(tmp_path / "adapter")
    plain = inspect_text(checkpoint, TEXT, tmp_path / "plain.html")
    found = inspect_text(tmp_path / "adapter", TEXT, tmp_path / "adapted.html")
    assert found.layers[0].A_norm[0] == pytest.approx(3 * plain.layers[0].A_norm[0], rel=1e-3)


def test_an_untrained_memory_without_denominator_is_shown_as_what_it_is(checkpoint, tmp_path):
    model = ARMTForCausalLM.from_pretrained(checkpoint)
    model.config.use_denom = False
    for memory in model.memory.values():
        nn.init.zeros_(memory.memory_value.weight)
    shutil.copytree(checkpoint, tmp_path / "fresh")
    model.save_pretrained(tmp_path / "fresh")
    inspect_text(tmp_path / "fresh", TEXT, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "is not trained" in page and "vector z" not in page and "nan" not in " ".join(Page(page).text)


# What is refused


def refused(capsys, *arguments) -> str:
    assert main(["inspect", *map(str, arguments)]) == 1
    return capsys.readouterr().err


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_text_within_one_segment_shows_nothing(checkpoint, tmp_path, capsys):
    path, page = tmp_path / "short.txt", tmp_path / "page.html"
    path.write_text("Too short.", encoding="utf-8")
    earlier = '<script type="application/json" id="numbers">{}</script>'
    page.write_text(earlier, encoding="utf-8")
    assert "segments of 16 tokens" in refused(capsys, checkpoint, "--text", path, "--out", page)
    assert page.read_text(encoding="utf-8") == earlier
    assert sorted(each.name for each in tmp_path.iterdir()) == ["page.html", "short.txt"]


def test_layers_without_memory_are_refused(checkpoint, text, tmp_path, capsys):
    message = refused(capsys, checkpoint, "--text", text, "--out", tmp_path / "page.html", "--layers", 1, 99)
    assert "[99]" in message and "[0, 1, 2, 3, 4]" in message


def test_a_missing_folder_is_named_before_anything_is_read(text, tmp_path, capsys):
    message = refused(capsys, "no-checkpoint-either", "--text", text, "--out", tmp_path / "nowhere" / "page.html")
    assert "nowhere" in message and "no-checkpoint-either" not in message


def test_a_file_that_is_no_text_is_named(checkpoint, tmp_path, capsys):
    path = tmp_path / "picture"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "not UTF-8" in refused(capsys, checkpoint, "--text", path, "--out", tmp_path / "page.html")
    assert "nothing.txt" in refused(capsys, checkpoint, "--text", tmp_path / "nothing.txt")


def test_a_plain_backbone_is_refused(text, tmp_path, capsys):
    assert "armt convert" in refused(capsys, BACKBONE, "--text", text, "--out", tmp_path / "page.html")


def test_a_checkpoint_without_tokenizer_is_refused(checkpoint, text, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "armt")
    for path in (tmp_path / "armt").glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in refused(capsys, tmp_path / "armt", "--text", text, "--out", tmp_path / "page.html")


def test_a_folder_in_place_of_the_page(checkpoint, text, tmp_path, capsys):
    """Found out before the text is read."""
    assert "is a folder. Name the file to write" in refused(capsys, checkpoint, "--text", text, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == [text]


def test_what_is_no_page_stays_as_it_is(checkpoint, text, capsys):
    """The text itself, say."""
    before = text.read_bytes()
    assert "It stays as it is" in refused(capsys, checkpoint, "--text", text, "--out", text)
    assert text.read_bytes() == before


def test_the_page_says_which_weights_it_shows(page, checkpoint):
    _, numbers = page
    assert numbers["weights"] == hash_weights(checkpoint)


def test_segments_are_counted_in_whole_numbers():
    axes = Figure().subplots()
    axes.plot(range(1, 5))
    label(axes, "segment", "")
    assert all(place.is_integer() for place in axes.get_xticks())
