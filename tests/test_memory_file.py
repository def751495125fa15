"""The memory file: what another process reads, what is refused, and saves that fail."""

import copy
import itertools
import json
import os
import random
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import NUM_MEM_TOKENS, SEGMENT_SIZE, random_ids, tiny_model
from helpers import cache_contents, difference, pad_left, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt import memory_file_armt as memory_file


LENGTH = 2 * SEGMENT_SIZE + 3
VERSION_2 = Path(__file__).parent / "memory_files" / "version_2.safetensors"


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


class TestWeightsAreChecksummedOnce:
    """Per load of a model, and again whenever its weights have changed."""

    @pytest.fixture
    def checksums(self, monkeypatch) -> list[torch.Size]:
        """Shapes of the tensors that were checksummed."""
        shapes, checksum = [], memory_file._checksum
        monkeypatch.setattr(memory_file, "_checksum", lambda tensor: shapes.append(tensor.shape) or checksum(tensor))
        return shapes

    @pytest.fixture
    def own(self, model) -> ARMTForCausalLM:
        return copy.deepcopy(model)

    def test_once(self, own, tmp_path, checksums):
        for name in ("one", "two"):
            own.save_memory(read(own), tmp_path / name)
            own.load_memory(tmp_path / name)
        inverse_frequencies = sum(name.endswith(".inv_freq") for name, _ in own.named_buffers())
        assert len(checksums) == len(own.state_dict()) + inverse_frequencies

    @pytest.mark.parametrize("change", [
        lambda weight: weight.data[0].mul_(2), lambda weight: weight.detach().numpy().fill(1),
        lambda weight: weight.detach().copy_(weight.flip(0)), lambda weight: setattr(weight, "data", weight.data + 1),
        lambda weight: weight.data.view(-1)[:3].copy_(torch.ones(3)),
    ])  # fmt: skip
    def test_again_after_any_change(self, own, tmp_path, change):
        own.save_memory(read(own), tmp_path / "memory")
        own.load_memory(tmp_path / "memory")
        change(own.memory["0"].memory_key.weight)
        with pytest.raises(ValueError, match="belongs to another model"):
            own.load_memory(tmp_path / "memory")

    def test_again_in_a_copy(self, own, tmp_path, checksums):
        own.save_memory(read(own), tmp_path / "memory")
        other = copy.deepcopy(own)
        checksums.clear()
        other.load_memory(tmp_path / "memory")
        assert checksums
        other.memory["0"].memory_key.weight.data.zero_()
        own.load_memory(tmp_path / "memory")

    def test_weights_made_in_inference_mode(self, tmp_path):
        """They count no changes."""
        with torch.inference_mode():
            own = tiny_model("llama")
            own.save_memory(own(random_ids(1, LENGTH)).cache, tmp_path / "memory")
            own.load_memory(tmp_path / "memory")
            own.memory["0"].memory_key.weight.copy_(own.memory["0"].memory_key.weight.flip(0))
            with pytest.raises(ValueError, match="belongs to another model"):
                own.load_memory(tmp_path / "memory")


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


@pytest.mark.parametrize("version", ["1", "4", "99"])
def test_another_version_of_the_format_is_refused(version: str, model, tmp_path):
    path = tmp_path / "memory"
    model.save_memory(read(model), path)
    rewrite(path, lambda tensors, metadata: metadata.update(version=version))
    with pytest.raises(ValueError, match=f"memory format {version}"):
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


def test_a_file_that_is_replaced_keeps_its_mode(model, tmp_path):
    path = tmp_path / "memory"
    path.touch(mode=0o640)
    for mode in (0o600, 0o664, 0o400):
        path.chmod(mode)
        model.save_memory(read(model), path)
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(value: float, model, tmp_path):
    cache = read(model)
    cache.states[1].A[0, 2, 3] = value
    with pytest.raises(ValueError, match="states.1.A has values that are not finite"):
        model.save_memory(cache, tmp_path / "memory")
    assert not any(tmp_path.iterdir())


# Damage


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Changes the tensors and the metadata of a file in place, as somebody would who knows nothing of digests."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> bytes:
    """A file with two rows, the second of which has written one segment less."""
    path = tmp_path_factory.mktemp("saved") / "memory"
    ids, mask = pad_left([random_ids(LENGTH), random_ids(LENGTH - SEGMENT_SIZE)])
    with torch.no_grad():
        model.save_memory(model(ids, attention_mask=mask).cache, path)
    return path.read_bytes()


def damaged_files(saved: bytes, path: Path, count: int, seed: int) -> Iterator[str]:
    """Writes `count` files, each damaged in another way, and says how."""
    rng = random.Random(seed)
    header = 8 + int.from_bytes(saved[:8], "little")

    def flip(start: int, end: int) -> str:
        place, bit = rng.randrange(start, end), rng.randrange(8)
        path.write_bytes(saved[:place] + bytes([saved[place] ^ 1 << bit]) + saved[place + 1 :])
        return f"bit {bit} of byte {place}"

    def cut() -> str:
        length = rng.randrange(len(saved))
        path.write_bytes(saved[:length])
        return f"the first {length} bytes"

    def swap_blocks() -> str:
        size = rng.choice([1, 4, 64, 512])
        a, b = sorted(rng.sample(range(header, len(saved) - size, size), 2))
        first, second = saved[a : a + size], saved[b : b + size]
        path.write_bytes(saved[:a] + second + saved[a + size : b] + first + saved[b + size :])
        return f"{size} bytes at {a} and {b} swapped"

    def swap_tensors() -> str:
        path.write_bytes(saved)

        def edit(tensors, metadata):
            pairs = [(a, b) for a, b in itertools.combinations(sorted(tensors), 2) if not same(tensors[a], tensors[b])]
            edit.names = a, b = rng.choice(pairs)
            tensors[a], tensors[b] = tensors[b], tensors[a]

        rewrite(path, edit)
        return f"{edit.names} swapped"

    def change_rows() -> str:
        path.write_bytes(saved)

        def edit(tensors, metadata):
            rows = json.loads(metadata["rows"])
            name = rng.choice(sorted(rows))
            rows[name][rng.randrange(2)] += rng.choice([-1, 1, SEGMENT_SIZE, 10**9])
            metadata["rows"] = edit.rows = json.dumps(rows)

        rewrite(path, edit)
        return edit.rows

    def change_metadata() -> str:
        path.write_bytes(saved)

        def edit(tensors, metadata):
            name = rng.choice(sorted(metadata))
            place = rng.randrange(len(metadata[name]))
            letter = rng.choice([c for c in "0123456789abcdef{}[]" if c != metadata[name][place]])
            metadata[name] = edit.text = metadata[name][:place] + letter + metadata[name][place + 1 :]

        rewrite(path, edit)
        return edit.text

    ways = [lambda: flip(0, header), lambda: flip(header, len(saved)), cut]
    ways += [swap_blocks, swap_tensors, change_rows, change_metadata]
    made = 0
    while made < count:
        way = ways[made % len(ways)]()
        if path.read_bytes() != saved:  # two blocks that are swapped may be equal
            made += 1
            yield way


def test_of_500_damaged_files_none_loads(model, saved, tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(saved)
    model.load_memory(path)
    for way in damaged_files(saved, path, count=500, seed=0):
        try:
            model.load_memory(path)
        except ValueError as error:
            assert str(path) in str(error), way
        else:
            raise AssertionError(f"a file loads in spite of its damage: {way}")


def rows(**changes: list) -> Callable:
    def edit(tensors, metadata):
        metadata["rows"] = json.dumps({**json.loads(metadata["rows"]), **changes})

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable:
    return lambda tensors, metadata: change(tensors)


def shorten_keys(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("keys.")]:
        tensors[name] = tensors[name][:, :, 1:]


def keep_one_row(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][:1]


def drop_layer_of_keys(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["keys.1.keys"], tensors["keys.1.values"]


WRONG = {
    "an open segment that is too long": (rows(opened=[99, 3]), "row 0 has 19 tokens in 2 segments and 99"),
    "fewer tokens than segments": (rows(tokens=[19, 3]), "row 1 has 3 tokens in 1 segments"),
    "a negative number": (rows(segments=[-1, 1]), "row 0 has 19 tokens in -1 segments"),
    "a number beyond all bounds": (rows(segments=[2**63, 1], tokens=[2**63 + 3, 11]), "row 0 has 9223372036854775811"),
    "no number": (rows(tokens=[19, None]), "not lists of integers"),
    "a truth value": (rows(opened=[3, True]), "not lists of integers"),
    "a number for a list": (rows(opened=3), "not lists of integers"),
    "more rows of one kind": (rows(tokens=[19, 11, 3]), "not equally many"),
    "no rows": (rows(opened=[], segments=[], tokens=[]), "not equally many"),
    "one row for two": (rows(opened=[3], segments=[2], tokens=[19]), r"has shape \(2, .*\), not \(1, "),
    "another attribute": (rows(lent_to=[1, 2]), "do not have opened, segments, tokens, and nothing else"),
    "no object": (lambda tensors, metadata: metadata.update(rows="[1]"), "do not have opened"),
    "no JSON": (lambda tensors, metadata: metadata.update(rows="{"), "is damaged"),
    "very deep JSON": (lambda tensors, metadata: metadata.update(rows="[" * 100_000), "is damaged"),
    "more metadata": (lambda tensors, metadata: metadata.update(more="1"), "metadata are format, model, more"),
    "no metadata of the model": (lambda tensors, metadata: metadata.pop("model"), "metadata are format, rows"),
    "keys of another length": (tensors(shorten_keys), r"has shape \(2, 2, 2, 12\), not \(2, 2, 3, 12\)"),
    "a tensor of one row": (tensors(keep_one_row), r"has shape \(1, .*\), not \(2, "),
    "keys of fewer layers": (tensors(drop_layer_of_keys), "lacks the tensors .'keys.1.keys', 'keys.1.values'"),
    "a missing tensor": (tensors(lambda t: t.pop("states.0.z")), "lacks the tensors .'states.0.z'"),
    "another tensor": (tensors(lambda t: t.update(more=torch.zeros(2))), "has .'more'"),
    "a layer more": (tensors(lambda t: t.update({"states.7.A": t["states.0.A"].clone()})), "has .'states.7.A'"),
    "NaN": (
        tensors(lambda t: t["keys.0.values"].view(-1)[5:6].fill_(float("nan"))),
        "keys.0.values has .* not finite",
    ),
    "infinite": (tensors(lambda t: t["states.1.A"].view(-1)[5:6].fill_(float("inf"))), "states.1.A has .* not finite"),
    "integers": (tensors(lambda t: t.update(last_hidden=t["last_hidden"].int())), "last_hidden is torch.int32"),
    "a state in bfloat16": (
        tensors(lambda t: t.update({"states.0.A": t["states.0.A"].bfloat16()})),
        "is torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_without_a_digest_all_else_is_checked(case: str, model, saved, tmp_path):
    """As in a file of version 2, or one that somebody made."""
    edit, message = WRONG[case]
    path = tmp_path / "memory"
    path.write_bytes(saved)

    def edit_and_forget(tensors, metadata):
        edit(tensors, metadata)
        del metadata["digest"]
        metadata["version"] = "2"

    rewrite(path, edit_and_forget)
    with pytest.raises(ValueError, match=message) as error:
        model.load_memory(path)
    assert str(path) in str(error.value)


@torch.no_grad()
def counted_model() -> ARMTForCausalLM:
    """A model whose weights are counted out, so that they are the same on every machine."""
    config = LlamaConfig(vocab_size=61, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    options = {"segment_size": SEGMENT_SIZE, "num_mem_tokens": NUM_MEM_TOKENS, "d_mem": 4}
    model = ARMTForCausalLM.from_backbone(LlamaForCausalLM(config), **options).eval()
    for number, parameter in enumerate(model.parameters()):
        values = (torch.arange(parameter.numel()) * (number + 7)) % 97 - 48
        parameter.copy_(values.view_as(parameter) / 64)
    return model


def test_a_file_of_version_2_loads_with_a_warning(caplog):
    """It was written by the code that wrote version 2, after these ids; it has no digest."""
    model = counted_model()
    with torch.no_grad():
        live = model(torch.arange(19)[None] + 3).cache
    loaded = model.load_memory(VERSION_2)
    assert "has memory format 2, which has no digest" in caplog.text
    assert repr(loaded) == repr(live)
    assert difference(answer(model, loaded), answer(model, live)) < 1e-5
    assert loaded.stats()[0]["A_norm"] == pytest.approx([2.605221748352051], rel=1e-5)


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
