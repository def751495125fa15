"""The cache as an object: forks, copies, statistics, and the memory file that another process reads."""

import copy
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import NUM_MEM_TOKENS, SEGMENT_SIZE, random_ids, tiny_model
from helpers import cache_contents, difference, pad_left, read_in_chunks, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt import memory_file_armt as memory_file


LENGTH = 2 * SEGMENT_SIZE + 3


@pytest.fixture(scope="module")
def model() -> ARMTForCausalLM:
    return tiny_model("gemma3_text").float()


@torch.no_grad()
def read(model: ARMTForCausalLM, length: int = LENGTH, rows: int = 1) -> ARMTCache:
    return model(random_ids(rows, length)).cache


@torch.no_grad()
def answer(model: ARMTForCausalLM, cache: ARMTCache) -> torch.Tensor:
    """What the model says to a next text, without the cache noticing."""
    return model(random_ids(cache.batch_size, LENGTH, seed=5), cache=cache.fork()).logits


# The object


def test_an_empty_cache_is_the_start_of_a_text(model):
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        assert torch.equal(model(ids, cache=ARMTCache()).logits, model(ids).logits)


def test_the_length_is_the_number_of_columns_read(model):
    ids, mask = pad_left([random_ids(LENGTH), random_ids(3)])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).cache
    assert cache.get_seq_length() == LENGTH
    assert cache.tokens == [LENGTH, 3]


def test_a_cache_says_what_it_holds(model):
    assert repr(read(model, rows=2)) == f"ARMTCache(tokens=[{LENGTH}, {LENGTH}], segments=[2, 2], opened=[3, 3])"


def test_reset_forgets_everything(model):
    cache = read(model, rows=2)
    cache.reset()
    assert same(cache_contents(cache), cache_contents(ARMTCache()))
    assert not cache.is_initialized


@pytest.mark.parametrize("duplicate", [ARMTCache.fork, copy.deepcopy], ids=["fork", "deepcopy"])
@torch.no_grad()
def test_neither_side_sees_what_the_other_reads(duplicate, model):
    cache = read(model)
    before, expected = cache_contents(cache), answer(model, cache)
    twin = duplicate(cache)
    model(random_ids(1, LENGTH, seed=1), cache=twin)
    assert same(cache_contents(cache), before)
    twin = duplicate(cache)
    model(random_ids(1, LENGTH, seed=2), cache=cache)
    assert torch.equal(answer(model, twin), expected)


def test_a_fork_starts_a_new_conversation(model):
    fork = read(model).fork()
    assert fork.get_seq_length() == 0
    assert fork.tokens == [LENGTH]


def test_a_copy_goes_on_with_the_conversation(model):
    assert copy.deepcopy(read(model)).get_seq_length() == LENGTH


def test_a_fork_costs_no_memory(model):
    cache = read(model)
    fork = cache.fork()
    for layer, state in cache.states.items():
        assert fork.states[layer].A.data_ptr() == state.A.data_ptr()


def test_a_cache_cannot_be_cropped(model):
    with pytest.raises(NotImplementedError, match="cannot be taken back"):
        read(model).crop(1)


def test_attention_layers_cannot_advance_the_cache(model):
    with pytest.raises(NotImplementedError, match="model's forward"):
        read(model).update(torch.zeros(1), torch.zeros(1), 0)


# Statistics


@contextmanager
def recorded(model: ARMTForCausalLM, layer: int) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """All denominators, and all gammas, that one layer's memory uses."""
    memory, denominators, gammas = model.memory[str(layer)], [], []
    original = memory.read, memory.write

    def read(*args):
        x, terms = original[0](*args)
        denominators.append(terms.denominator)
        return x, terms

    def write(*args):
        state, terms = original[1](*args)
        denominators.append(terms.denominator)
        gammas.append(terms.gamma)
        return state, terms

    memory.read, memory.write = read, write
    try:
        yield denominators, gammas
    finally:
        del memory.read, memory.write


@pytest.mark.parametrize("layer", [0, 1])
def test_statistics_are_those_of_all_reads_and_writes(layer: int, model):
    with recorded(model, layer) as (denominators, gammas):
        cache = read(model, length=4 * SEGMENT_SIZE + 3)
    found, state = cache.stats()[layer], cache.states[layer]
    assert found["A_norm"] == pytest.approx([state.A.norm().item()])
    assert found["z_norm"] == pytest.approx([state.z.norm().item()])
    assert found["min_denominator"] == pytest.approx([min(d.min().item() for d in denominators[1:])])
    assert found["mean_gamma"] == pytest.approx([torch.cat(gammas, 1).mean().item()])
    assert len(gammas) == 4 and gammas[0].numel() == NUM_MEM_TOKENS


@pytest.mark.parametrize("sizes", [None, [5, 1, 9, 12], [1] * 27], ids=["at once", "in chunks", "token by token"])
@torch.no_grad()
def test_statistics_of_a_row_are_those_of_the_row_alone(sizes, model):
    rows = [random_ids(length, seed=length) for length in (27, 3, SEGMENT_SIZE, SEGMENT_SIZE + 2)]
    ids, mask = pad_left(rows)
    cache = read_in_chunks(model, ids, sizes or [27], mask, ARMTCache())[1]
    zeros = ("A_norm", "z_norm", "mean_gamma", "zero_gamma_share")
    for number, row in enumerate(rows):
        alone = model(row[None]).cache.stats()
        for layer, values in cache.stats().items():
            for name in values:
                value = alone[layer][name][0] if layer in alone else 0.0 if name in zeros else None
                expected = None if value is None else pytest.approx(value, rel=1e-3)
                assert values[name][number] == expected, f"row {number}, {name}"


def test_there_are_no_statistics_before_the_first_write(model):
    assert read(model, length=SEGMENT_SIZE - 1).stats() == {}


def test_without_denominator_there_are_no_statistics_of_it():
    found = read(tiny_model("llama", use_denom=False)).stats()[0]
    assert found["z_norm"] is None and found["min_denominator"] is None
    assert found["A_norm"][0] > 0


def test_a_cache_made_in_training_knows_norms_only():
    model = tiny_model("llama").train()
    with torch.no_grad():
        found = model(random_ids(1, LENGTH), use_cache=True).cache.stats()[0]
    assert found["A_norm"][0] > 0
    assert found["mean_gamma"] is None and found["min_denominator"] is None


def test_statistics_are_plain_numbers(model):
    found = read(model, rows=2).stats()
    assert {int(layer): values for layer, values in json.loads(json.dumps(found)).items()} == found


# The memory file


SAVED = {
    "open segment": lambda model: read(model),
    "complete segments": lambda model: read(model, length=2 * SEGMENT_SIZE),
    "before the first write": lambda model: read(model, length=3),
    "ragged rows": lambda model: ragged(model),
    "a fork": lambda model: read(model).fork(),
}


@torch.no_grad()
def ragged(model: ARMTForCausalLM) -> ARMTCache:
    ids, mask = pad_left([random_ids(length, seed=length) for length in (LENGTH, 3, SEGMENT_SIZE)])
    return model(ids, attention_mask=mask).cache


@pytest.mark.parametrize("kind", SAVED)
def test_a_loaded_memory_answers_like_the_live_one(kind: str, model, tmp_path):
    cache = SAVED[kind](model)
    model.save_memory(cache, tmp_path / "memory")
    loaded = model.load_memory(tmp_path / "memory")
    assert loaded.get_seq_length() == 0
    assert torch.equal(answer(model, loaded), answer(model, cache))
    assert loaded.stats() == cache.stats()


@pytest.mark.parametrize("options", [{"use_denom": False}, {"memory_layers": [1]}], ids=str)
def test_every_kind_of_memory_can_be_saved(options: dict, tmp_path):
    model = tiny_model("llama", **options)
    cache = read(model)
    model.save_memory(cache, tmp_path / "memory")
    assert torch.equal(answer(model, model.load_memory(tmp_path / "memory")), answer(model, cache))


OTHER_PROCESS = """
import sys
import torch
from families import random_ids
from modeling_armt import ARMTForCausalLM
torch.set_num_threads(1)
model = ARMTForCausalLM.from_pretrained(sys.argv[1])
cache = model.load_memory(sys.argv[2])
with torch.no_grad():
    torch.save(model(random_ids(1, int(sys.argv[4]), seed=5), cache=cache).logits, sys.argv[3])
"""


def test_another_process_answers_exactly_like_the_live_memory(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    live = ARMTForCausalLM.from_pretrained(tmp_path / "model")
    cache = read(live)
    live.save_memory(cache, tmp_path / "memory")
    arguments = [tmp_path / "model", tmp_path / "memory", tmp_path / "logits", str(LENGTH)]
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, *arguments], cwd=Path(__file__).parent, check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), answer(live, cache))


def test_a_model_in_another_dtype_is_the_same_model(model, tmp_path):
    model.save_memory(read(model), tmp_path / "memory")
    loaded = copy.deepcopy(model).bfloat16()
    loaded.memory.float()
    cache = loaded.load_memory(tmp_path / "memory")
    assert answer(loaded, cache).dtype == torch.bfloat16
    assert cache.states[0].A.dtype == torch.float32


def test_a_float64_model_takes_a_float32_memory(model, tmp_path):
    model.save_memory(read(model), tmp_path / "memory")
    double = copy.deepcopy(model).double()
    cache = double.load_memory(tmp_path / "memory")
    assert cache.states[0].A.dtype == torch.float64
    assert difference(answer(double, cache), answer(model, read(model)).double()) < 1e-4


@torch.no_grad()
def other_seed(model: ARMTForCausalLM) -> ARMTForCausalLM:
    return tiny_model("gemma3_text", seed=1).float()


def other_segments(model: ARMTForCausalLM) -> ARMTForCausalLM:
    return tiny_model("gemma3_text", segment_size=SEGMENT_SIZE + 1).float()


def other_norms(model: ARMTForCausalLM) -> ARMTForCausalLM:
    model = copy.deepcopy(model)
    model.config.text_config.rms_norm_eps *= 10  # the same weights, but not what they compute
    return model


def trained(model: ARMTForCausalLM) -> ARMTForCausalLM:
    model, ids = copy.deepcopy(model), random_ids(2, LENGTH)
    model(ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-4).step()
    return model


@pytest.mark.parametrize("other", [other_seed, other_segments, other_norms, trained])
def test_a_memory_of_another_model_is_refused(other, model, tmp_path):
    model.save_memory(read(model), tmp_path / "memory")
    with pytest.raises(ValueError, match="belongs to another model"):
        other(model).load_memory(tmp_path / "memory")


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(path: Path):
    path.write_bytes(path.read_bytes()[:50])


def empty(path: Path):
    path.write_bytes(b"")


def replace_by_text(path: Path):
    path.write_text("once upon a time there was a memory")


@pytest.mark.parametrize("damage", [truncate, truncate_header, empty, replace_by_text])
def test_a_damaged_file_is_refused(damage, model, tmp_path):
    path = tmp_path / "memory"
    model.save_memory(read(model), path)
    damage(path)
    with pytest.raises(ValueError, match="truncated or not a memory file"):
        model.load_memory(path)


def test_other_safetensors_files_are_refused(model, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a memory written by save_memory"):
        model.load_memory(tmp_path / "weights")


def test_another_version_of_the_format_is_refused(model, tmp_path):
    path = tmp_path / "memory"
    model.save_memory(read(model), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "version": "99"})
    with pytest.raises(ValueError, match="memory format 99"):
        model.load_memory(path)


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        model.load_memory(tmp_path / "nowhere")


@pytest.mark.parametrize("cache", [ARMTCache(), DynamicCache(), None], ids=lambda cache: type(cache).__name__)
def test_there_must_be_a_memory_to_save(cache, model, tmp_path):
    with pytest.raises(ValueError, match="no memory to save"):
        model.save_memory(cache, tmp_path / "memory")
    assert not any(tmp_path.iterdir())


def test_a_memory_file_has_the_usual_permissions(model, tmp_path):
    model.save_memory(read(model), tmp_path / "memory")
    (tmp_path / "other").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("memory", "other")]
    assert modes[0] == modes[1]


# A save that fails


@contextmanager
def full_disk(monkeypatch) -> Iterator[None]:
    """No file may grow beyond 4 kB: a write fails half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def interrupt(monkeypatch) -> Iterator[None]:
    """The user stops the program when everything is written but the name."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        yield


@contextmanager
def interrupt_while_writing(monkeypatch) -> Iterator[None]:
    def write_half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memory_file, "safe_save_file", write_half)
        yield


@pytest.mark.parametrize("failure", [full_disk, interrupt, interrupt_while_writing])
@pytest.mark.parametrize("before", [True, False], ids=["old file", "no file"])
def test_a_failed_save_leaves_what_was_there(failure, before: bool, model, tmp_path, monkeypatch):
    path = tmp_path / "memory"
    if before:
        model.save_memory(read(model, length=3), path)
    expected = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    cache = read(model)
    with pytest.raises(BaseException), failure(monkeypatch):  # noqa: B017 (an interrupt or an error of safetensors)
        model.save_memory(cache, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == expected


def test_a_later_save_replaces_the_file(model, tmp_path):
    for length in (3, LENGTH):
        model.save_memory(read(model, length=length), tmp_path / "memory")
    assert model.load_memory(tmp_path / "memory").tokens == [LENGTH]
    assert [file.name for file in tmp_path.iterdir()] == ["memory"]


def test_saving_leaves_the_cache_alone(model, tmp_path):
    cache = read(model)
    before = cache_contents(cache)
    model.save_memory(cache, tmp_path / "memory")
    assert same(cache_contents(cache), before)
    assert difference(answer(model, cache), answer(model, cache.fork())) == 0
