"""`read`: token ids from anywhere, block by block; the result is that of one forward call."""

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from families import SEGMENT_SIZE, VOCABULARY, random_ids, tiny_model
from helpers import cache_contents, difference, examples, same
from hypothesis import given
from hypothesis import strategies as st

from modeling_armt import ARMTCache, ARMTForCausalLM


TOKENS = 75  # nine segments and three tokens


@pytest.fixture(scope="module")
def model() -> ARMTForCausalLM:
    return tiny_model()


@pytest.fixture
def ids() -> torch.Tensor:
    return random_ids(TOKENS)


@torch.no_grad()
def forward(model: ARMTForCausalLM, ids: torch.Tensor, cache: ARMTCache | None = None):
    return model(ids, cache=cache, use_cache=True, logits_to_keep=1)


def assert_same_result(output, expected):
    assert output.logits.shape == expected.logits.shape
    assert difference(output.logits, expected.logits) < 1e-9
    assert repr(output.cache) == repr(expected.cache)
    assert output.cache.columns == expected.cache.columns
    for layer, state in expected.cache.states.items():
        if state is not None:
            assert difference(output.cache.states[layer].A, state.A) < 1e-9


def mapped(dtype) -> Callable:
    """Ids in a file that is mapped into memory by numpy."""

    def source(ids: torch.Tensor, folder) -> np.ndarray:
        np.save(folder / "ids.npy", ids.numpy().astype(dtype))
        return np.load(folder / "ids.npy", mmap_mode="r")

    return source


def mapped_by_torch(ids: torch.Tensor, folder) -> torch.Tensor:
    ids.to(torch.uint16).numpy().tofile(folder / "ids.bin")
    return torch.from_file(str(folder / "ids.bin"), size=len(ids), dtype=torch.uint16)


def raw_memmap(ids: torch.Tensor, folder) -> np.memmap:
    ids.to(torch.int32).numpy().tofile(folder / "ids.bin")
    return np.memmap(folder / "ids.bin", dtype=np.int32, mode="r")


SOURCES: dict[str, Callable] = {
    "row": lambda ids, _: ids,
    "batch of one": lambda ids, _: ids[None],
    "int32": lambda ids, _: ids.int(),
    "uint16": lambda ids, _: ids.to(torch.uint16),
    "uint8": lambda ids, _: ids.to(torch.uint8),
    "array": lambda ids, _: ids.numpy(),
    "mapped int64": mapped(np.int64),
    "mapped uint16": mapped(np.uint16),
    "mapped uint32": mapped(np.uint32),
    "raw memmap": raw_memmap,
    "torch.from_file": mapped_by_torch,
    "list": lambda ids, _: ids.tolist(),
    "ints": lambda ids, _: iter(ids.tolist()),
    "numpy scalars": lambda ids, _: iter(ids.numpy()),
    "tensor scalars": lambda ids, _: iter(ids),
    "tensors": lambda ids, _: iter(ids.split(7)),
    "arrays": lambda ids, _: (chunk.numpy().astype(np.uint16) for chunk in ids.split(20)),
    "lists": lambda ids, _: (chunk.tolist() for chunk in ids.split(11)),
    "single ids": lambda ids, _: iter(ids.split(1)),
    "one chunk": lambda ids, _: iter([ids]),
    "empty chunks": lambda ids, _: iter([[], *ids.split(30), []]),
}


class TestSources:
    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
    @pytest.mark.parametrize("block_segments", [1, 2, 512])
    def test_equals_one_call(self, model, ids, tmp_path, source, block_segments):
        output = model.read(source(ids, tmp_path), block_segments=block_segments)
        assert_same_result(output, forward(model, ids[None]))

    def test_batch(self, model):
        ids = random_ids(3, TOKENS)
        assert_same_result(model.read(ids.int(), block_segments=2), forward(model, ids))

    def test_batch_in_a_mapped_array(self, model, tmp_path):
        ids = random_ids(3, TOKENS)
        output = model.read(mapped(np.uint16)(ids, tmp_path), block_segments=2)
        assert_same_result(output, forward(model, ids))

    @examples(50)
    @given(data=st.data())
    def test_chunks_of_any_sizes_on_any_cache(self, model, data):
        sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any))
        before, block_segments = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 4))
        ids = random_ids(before + sum(sizes))
        cache = forward(model, ids[None, :before]).cache if before else None
        output = model.read(iter(ids[before:].split(sizes)), cache, block_segments=block_segments)
        assert_same_result(output, forward(model, ids[None]))

    @pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
    def test_every_schedule(self, model, schedule):
        ids = random_ids(2, TOKENS)
        assert_same_result(model.read(ids, schedule=schedule, block_segments=4), forward(model, ids))

    def test_is_without_gradients(self, model, ids):
        assert not model.read(ids).logits.requires_grad

    @pytest.mark.parametrize("length", [1, SEGMENT_SIZE, 2 * SEGMENT_SIZE])
    def test_text_that_ends_with_a_block(self, model, length):
        ids = random_ids(length)
        assert_same_result(model.read(iter(ids.tolist()), block_segments=1), forward(model, ids[None]))


class TestCache:
    def test_goes_on_in_an_open_segment(self, model, ids):
        cache = forward(model, ids[None, :13]).cache
        output = model.read(ids[13:], cache, block_segments=2)
        assert output.cache is cache
        assert_same_result(output, forward(model, ids[None]))

    def test_forward_goes_on_from_it(self, model, ids):
        cache = model.read(ids[:50], block_segments=2).cache
        assert_same_result(forward(model, ids[None, 50:], cache), forward(model, ids[None]))

    def test_rows_at_different_places(self, model):
        ids, more = random_ids(2, 20), random_ids(2, TOKENS, seed=1)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        caches = [model(ids, attention_mask=mask, use_cache=True).cache for _ in range(2)]
        output = model.read(more, caches[0], block_segments=2)
        assert_same_result(output, forward(model, more, caches[1]))

    def test_one_memory_for_many_rows(self, model, ids):
        cache, more = forward(model, ids[None]).cache, random_ids(3, 30, seed=1)
        expected = forward(model, more, cache.fork())
        assert_same_result(model.read(more, cache.fork(), block_segments=1), expected)

    @pytest.mark.parametrize("opened", [0, 3])
    def test_no_block_ends_inside_a_segment(self, model, ids, opened, monkeypatch):
        cache = forward(model, ids[None, :opened]).cache if opened else ARMTCache()
        widths, call = [], type(model).forward

        def spy(self, input_ids, **kwargs):
            widths.append(input_ids.shape[1])
            return call(self, input_ids, **kwargs)

        monkeypatch.setattr(type(model), "forward", spy)
        model.read(ids, cache, block_segments=2)
        ends = torch.tensor(widths).cumsum(0) + opened
        assert len(widths) > 3
        assert not (ends[:-1] % SEGMENT_SIZE).any()

    @pytest.mark.parametrize("opened", [0, 13])
    @pytest.mark.parametrize("wrong", ["id", "source"])
    def test_failure_half_way_leaves_it_untouched(self, model, ids, opened, wrong):
        cache = forward(model, ids[None, :opened]).cache if opened else ARMTCache()
        before = cache_contents(cache)

        def broken() -> Iterator[int]:
            yield from ids.tolist()
            if wrong == "source":
                raise OSError("the disk is gone")
            yield VOCABULARY

        with pytest.raises((ValueError, OSError), match="the disk is gone|vocabulary"):
            model.read(broken(), cache, block_segments=1)
        assert same(cache_contents(cache), before)


class TestLaziness:
    @pytest.mark.parametrize("chunk", [1, 3, 8, 20])
    def test_never_more_than_a_block_ahead(self, model, chunk):
        block, taken, read = 2 * SEGMENT_SIZE, 0, 0

        def source() -> Iterator[torch.Tensor]:
            nonlocal taken
            for piece in random_ids(200).split(chunk):
                assert taken <= read + block
                taken += len(piece)
                yield piece

        def progress(tokens: int) -> None:
            nonlocal read
            read += tokens

        model.read(source(), block_segments=2, progress=progress)
        assert taken == read == 200

    def test_ints_are_taken_block_by_block(self, model):
        block, taken, ahead = 2 * SEGMENT_SIZE, 0, []

        def source() -> Iterator[int]:
            nonlocal taken
            for token in random_ids(100).tolist():
                taken += 1
                yield token

        model.read(source(), block_segments=2, progress=lambda tokens: ahead.append(taken))
        assert ahead == [*range(block, 97, block), 100]

    @pytest.mark.parametrize("chunked", [False, True])
    def test_host_memory_does_not_grow(self, monkeypatch, chunked):
        """Of a stream whose ids would take 16 MB, with a model that only counts."""
        model, total = tiny_model(), 2_000_000
        expected, seen = forward(model, random_ids(1, 9)), 0

        def count(self, input_ids, cache, **kwargs):
            nonlocal seen
            seen += input_ids.shape[1]
            return expected

        monkeypatch.setattr(ARMTForCausalLM, "forward", count)
        stream = (3 for _ in range(total))
        if chunked:
            stream = (torch.full((1000,), 3) for _ in range(total // 1000))
        tracemalloc.start()
        model.read(stream, block_segments=512)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen == total
        assert peak < 1_000_000

    def test_a_mapped_file_is_never_loaded(self, model, tmp_path):
        """Ids beyond what any machine holds: a sparse file of 2**42 bytes, of which an early one is wrong."""
        with open(tmp_path / "ids.bin", "wb") as file:
            file.seek(1000)
            file.write(b"\xff")
            file.truncate(2**42)
        ids = np.memmap(tmp_path / "ids.bin", dtype=np.uint8, mode="r")
        with pytest.raises(ValueError, match="token 1000 is 255"):
            model.read(ids, block_segments=8)


class TestErrors:
    @pytest.mark.parametrize(
        "tokens",
        [torch.empty(0).long(), torch.empty(2, 0).long(), np.empty(0, int), [], iter(()), iter([[]])],
        ids=["tensor", "batch", "array", "list", "iterator", "chunks"],
    )
    def test_empty(self, model, tokens):
        with pytest.raises(ValueError, match="empty"):
            model.read(tokens)

    @pytest.mark.parametrize("wrong", [-1, VOCABULARY])
    @pytest.mark.parametrize("source", ["row", "array", "mapped int64", "list", "ints", "tensors"])
    def test_id_outside_the_vocabulary(self, model, ids, tmp_path, wrong, source):
        ids[42] = wrong
        with pytest.raises(ValueError, match=rf"token 42 is {wrong}, .* 0 to {VOCABULARY - 1}"):
            model.read(SOURCES[source](ids, tmp_path), block_segments=1)

    def test_names_the_row(self, model):
        ids = random_ids(3, 20)
        ids[1, 12] = -100
        with pytest.raises(ValueError, match="token 12 of row 1 is -100"):
            model.read(ids, block_segments=1)

    @pytest.mark.parametrize(
        "tokens",
        [torch.ones(9), np.ones(9, np.float32), torch.ones(9, dtype=torch.bool), iter([torch.ones(9)]), iter([[0.5]])],
        ids=["tensor", "array", "bool", "chunk", "list"],
    )
    def test_not_integers(self, model, tokens):
        with pytest.raises(ValueError, match="ids are integers"):
            model.read(tokens)

    @pytest.mark.parametrize("odd", [1.5, "a", None, [1]])
    def test_odd_one_among_ints(self, model, odd):
        with pytest.raises(ValueError, match="token 12 cannot be read"):
            model.read(iter([1] * 12 + [odd]), block_segments=1)

    @pytest.mark.parametrize("odd", ["text", None, {}, object()])
    def test_odd_one_among_chunks(self, model, odd):
        with pytest.raises(ValueError, match="chunk at token 12 holds no token ids"):
            model.read(iter([[1] * 12, odd]), block_segments=1)

    @pytest.mark.parametrize("shape", [(), (1, 2, 3)])
    def test_dimensions(self, model, shape):
        with pytest.raises(ValueError, match=r"must be \(T,\) or \(B, T\)"):
            model.read(torch.ones(shape, dtype=torch.long))

    def test_dimensions_of_a_chunk(self, model):
        with pytest.raises(ValueError, match=r"chunk at token 3 has shape \(1, 2\)"):
            model.read(iter([[1, 2, 3], [[1, 2]]]))

    @pytest.mark.parametrize("tokens", ["text", b"text", {"input_ids": [1]}, None, 5])
    def test_not_tokens(self, model, tokens):
        with pytest.raises(ValueError, match=f"are a {type(tokens).__name__}; pass token ids"):
            model.read(tokens)

    def test_list_of_lists_is_ambiguous(self, model):
        with pytest.raises(ValueError, match="batch or the chunks"):
            model.read([[1, 2], [3, 4]])

    @pytest.mark.parametrize("block_segments", [0, -1, 1.5, True])
    def test_block_size(self, model, ids, block_segments):
        with pytest.raises(ValueError, match="block_segments is"):
            model.read(ids, block_segments=block_segments)

    def test_unknown_schedule(self, model, ids):
        with pytest.raises(ValueError, match="schedule is 'sideways'"):
            model.read(ids, schedule="sideways")

    def test_cache_of_another_kind(self, model, ids):
        with pytest.raises(ValueError, match="must be an ARMTCache"):
            model.read(ids, cache=())

    def test_rows_of_the_cache(self, model, ids):
        cache = forward(model, random_ids(2, 5)).cache
        with pytest.raises(ValueError, match="the cache has 2 rows, the input 1"):
            model.read(iter(ids.tolist()), cache)
