"""
Invariants of reading, in float64 on random batches: how a text is split over calls, which rows it shares a batch with
and where padding stands makes no difference; the model keeps nothing; a failed call changes nothing.
"""

import functools
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from families import SEGMENT_SIZE, VOCABULARY, random_ids, tiny_model
from helpers import cache_contents, difference, examples, pad_left, read_in_chunks, same
from hypothesis import given
from hypothesis import strategies as st

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt.attachment_armt import _current_pass
from modeling_armt.generation_armt import _finished_rows


TOLERANCE = 1e-9

MODELS = {
    "rotary": functools.cache(lambda: tiny_model("llama")),
    "learned positions": functools.cache(lambda: tiny_model("gpt2")),
    "sliding windows": functools.cache(lambda: tiny_model("gemma3_text")),
    "segments of one token": functools.cache(lambda: tiny_model("llama", segment_size=1, num_mem_tokens=1)),
    "more memory than text": functools.cache(lambda: tiny_model("llama", segment_size=3, num_mem_tokens=5)),
    "memory in one layer": functools.cache(lambda: tiny_model("qwen2", memory_layers=[1])),
    "spread memory tokens": functools.cache(
        lambda: tiny_model("gemma3_text", memory_norm=True, spread_memory_tokens=True)
    ),
    "no denominator": functools.cache(lambda: tiny_model("llama", use_denom=False)),
}
every_model = pytest.mark.parametrize("name", MODELS)


@st.composite
def batches(draw, max_rows: int = 4, max_length: int = 30):
    """`(rows, ids, mask)`: texts, and the batch that holds them with padding anywhere and anything in it."""
    lengths = draw(st.lists(st.integers(1, max_length), min_size=1, max_size=max_rows))
    columns = max(lengths) + draw(st.integers(0, 6))
    seed = draw(st.integers(0, 999))
    rows = [random_ids(length, seed=seed + number) for number, length in enumerate(lengths)]
    ids = torch.randint(0, VOCABULARY, (len(rows), columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(rows), columns, dtype=torch.long)
    for number, row in enumerate(rows):
        side = draw(st.sampled_from(["left", "right", "middle", "scattered"]))
        spare = columns - len(row)
        if side == "scattered":
            places = sorted(draw(st.permutations(range(columns)))[: len(row)])
        else:
            split = {"left": 0, "right": len(row), "middle": draw(st.integers(0, len(row)))}[side]
            places = [*range(split), *range(split + spare, columns)]
        ids[number, places] = row
        mask[number, places] = 1
    return rows, ids, mask


def splits_of(columns: int):
    """Sizes of the calls that read so many columns."""
    cuts = st.sets(st.integers(1, columns - 1), max_size=6) if columns > 1 else st.just(set())
    edges = cuts.map(lambda inner: [0, *sorted(inner), columns])
    return edges.map(lambda found: [b - a for a, b in zip(found, found[1:], strict=False)])


@torch.no_grad()
def read_alone(model: ARMTForCausalLM, row: torch.Tensor) -> torch.Tensor:
    """The definition: `(T, vocabulary)` logits of one text, uncached and in one call."""
    return model(row[None], use_cache=False).logits[0]


def check_rows(logits: torch.Tensor, mask: torch.Tensor, expected: list[torch.Tensor]):
    """Every column from a row's first real token on holds the logits of its last real token."""
    for number, alone in enumerate(expected):
        rank = mask[number].cumsum(0) - 1
        seen = rank >= 0
        assert difference(logits[number][seen], alone[rank[seen]]) <= TOLERANCE, f"row {number}"


# Invariant 2 and 3: chunks, neighbours, padding


@every_model
@examples(12)
@given(batch=batches())
@torch.no_grad()
def test_rows_of_a_padded_batch_are_read_as_if_alone(name: str, batch):
    model, (rows, ids, mask) = MODELS[name](), batch
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    check_rows(logits, mask, [read_alone(model, row) for row in rows])


@every_model
@examples(20)
@given(batch=batches(), data=st.data())
@torch.no_grad()
def test_rows_of_a_padded_batch_are_read_as_if_alone_in_any_chunks(name: str, batch, data):
    model, (rows, ids, mask) = MODELS[name](), batch
    logits, cache = read_in_chunks(model, ids, data.draw(splits_of(ids.shape[1])), mask, ARMTCache())
    check_rows(logits, mask, [read_alone(model, row) for row in rows])
    assert cache.tokens == [len(row) for row in rows]


@every_model
@torch.no_grad()
def test_token_by_token_is_reading_at_once(name: str):
    model, row = MODELS[name](), random_ids(3 * SEGMENT_SIZE + 3)
    logits, _ = read_in_chunks(model, row[None], [1] * len(row))
    assert difference(logits[0], read_alone(model, row)) <= TOLERANCE


@every_model
@examples(12)
@given(batch=batches(), data=st.data())
@torch.no_grad()
def test_the_memory_of_a_row_is_that_of_the_row_alone(name: str, batch, data):
    model, (rows, ids, mask) = MODELS[name](), batch
    cache = read_in_chunks(model, ids, data.draw(splits_of(ids.shape[1])), mask, ARMTCache())[1]
    for number, row in enumerate(rows):
        alone = model(row[None], use_cache=True).cache
        assert cache.segments[number] == alone.segments[0]
        for layer, state in alone.states.items():
            if state is None:  # in the batch there may be a state, but nothing in it
                assert cache.states[layer] is None or not cache.states[layer].A[number].any()
            else:
                assert difference(cache.states[layer].A[number], state.A[0]) <= TOLERANCE


@examples(20)
@given(batch=batches(max_rows=3), data=st.data())
@torch.no_grad()
def test_cache_rows_can_be_selected_repeated_and_reordered(batch, data):
    model, (rows, ids, mask) = MODELS["sliding windows"](), batch
    cache = model(ids, attention_mask=mask).cache
    way = data.draw(st.sampled_from(["select", "reorder", "repeat"]))
    if way == "repeat":
        repeats = data.draw(st.integers(1, 3))
        cache.batch_repeat_interleave(repeats)
        chosen = [number for number in range(len(rows)) for _ in range(repeats)]
    else:
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=5))
        (cache.reorder_cache if way == "reorder" else cache.batch_select_indices)(torch.tensor(chosen))
    more = random_ids(len(chosen), SEGMENT_SIZE + 3, seed=77)
    logits, _ = read_in_chunks(model, more, [1] * 4 + [SEGMENT_SIZE - 1], cache=cache)
    for number, row in enumerate(chosen):
        expected = read_alone(model, torch.cat([rows[row], more[number]]))[len(rows[row]) :]
        assert difference(logits[number], expected) <= TOLERANCE


@torch.no_grad()
def test_a_row_without_memory_selected_from_a_batch_with_one_writes_for_the_first_time():
    model, rows = MODELS["rotary"](), [random_ids(SEGMENT_SIZE), random_ids(1)]
    ids, mask = pad_left(rows)
    cache = model(ids, attention_mask=mask).cache
    cache.batch_select_indices(torch.tensor([1]))
    more = random_ids(1, 2 * SEGMENT_SIZE, seed=1)
    logits = model(more, cache=cache).logits[0]
    assert difference(logits, read_alone(model, torch.cat([rows[1], more[0]]))[1:]) <= TOLERANCE


@examples(10)
@given(batch=batches(max_rows=3), data=st.data())
@torch.no_grad()
def test_rows_with_nothing_in_a_call_keep_their_memory_exactly(batch, data):
    model, (rows, ids, mask) = MODELS["rotary"](), batch
    cache = model(ids, attention_mask=mask).cache
    before = cache.fork()
    idle = data.draw(st.integers(0, len(rows) - 1))
    columns = SEGMENT_SIZE + 2
    call = torch.ones(len(rows), columns, dtype=torch.long)
    call[idle] = 0
    model(random_ids(len(rows), columns, seed=5), attention_mask=call, cache=cache)
    for name in ("opened", "segments", "tokens"):
        assert getattr(cache, name)[idle] == getattr(before, name)[idle]
    for layer, old in before.states.items():
        new = cache.states[layer]
        if new is not None:
            assert torch.equal(new.A[idle], torch.zeros_like(new.A[idle]) if old is None else old.A[idle])
    opened = cache.opened[idle]
    if opened:
        for new, old in zip(cache.keys.layers, before.keys.layers, strict=True):
            assert torch.equal(new.keys[idle, :, -opened:], old.keys[idle, :, -opened:])
    assert torch.equal(cache.last_hidden[idle], before.last_hidden[idle])


@torch.no_grad()
def test_a_padding_column_returns_its_rows_last_logits_of_earlier_calls():
    model, row = MODELS["rotary"](), random_ids(SEGMENT_SIZE + 3)
    cache = model(row.expand(2, -1)).cache
    mask = torch.tensor([[1, 1], [0, 0]])
    logits = model(random_ids(2, 2, seed=3), attention_mask=mask, cache=cache).logits
    assert difference(logits[1], read_alone(model, row)[-1].expand(2, -1)) <= TOLERANCE


@torch.no_grad()
def test_a_row_whose_first_call_is_all_padding_starts_later():
    model, row = MODELS["rotary"](), random_ids(SEGMENT_SIZE + 3)
    ids, mask = pad_left([row, row[:2]])
    logits, _ = read_in_chunks(model, ids, [3] * 3 + [len(row) - 9], mask, ARMTCache())
    check_rows(logits, mask, [read_alone(model, row), read_alone(model, row[:2])])


@pytest.mark.parametrize("length", [5, SEGMENT_SIZE, SEGMENT_SIZE + 1, 3 * SEGMENT_SIZE])
@torch.no_grad()
def test_closing_a_segment_starts_a_new_one_on_what_it_wrote(length: int):
    """A closed tail is a segment of its own: what comes next reads it from the memory only."""
    model, row = MODELS["rotary"](), random_ids(length)
    cache = model(row[None]).cache
    before = cache.fork()
    model.close_segment(cache)
    assert cache.opened == [0]
    assert cache.segments[0] == -(-length // SEGMENT_SIZE)
    assert (cache.states[0].A - (0 if before.states[0] is None else before.states[0].A)).any() == bool(length % 8)


@torch.no_grad()
def test_closing_segments_of_a_batch_is_closing_each_alone():
    model = MODELS["sliding windows"]()
    rows = [random_ids(length, seed=length) for length in (3, SEGMENT_SIZE, SEGMENT_SIZE + 5)]
    ids, mask = pad_left(rows)
    cache = model(ids, attention_mask=mask).cache
    model.close_segment(cache)
    more = random_ids(len(rows), 5, seed=1)
    logits = model(more, cache=cache).logits
    for number, row in enumerate(rows):
        alone = model(row[None]).cache
        model.close_segment(alone)
        assert difference(logits[number], model(more[number : number + 1], cache=alone).logits[0]) <= 1e-9


# Outputs other than all logits


@examples(15)
@given(batch=batches(), keep=st.integers(1, 36))
@torch.no_grad()
def test_logits_to_keep_returns_the_last_columns(batch, keep: int):
    model, (_, ids, mask) = MODELS["rotary"](), batch
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -keep:]
    kept = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
    assert difference(kept, expected) <= TOLERANCE


@pytest.mark.parametrize("keep", [3, torch.tensor([4, 9]), torch.arange(30) == 7], ids=["number", "columns", "mask"])
@torch.no_grad()
def test_hidden_states_have_all_columns_whichever_logits_are_kept(keep: int | torch.Tensor):
    model, ids = tiny_model("llama"), random_ids(2, 30)
    expected = model(ids, use_cache=False, output_hidden_states=True)
    found = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=keep)
    assert same(found.hidden_states, expected.hidden_states)
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    assert difference(found.logits, expected.logits[:, kept]) < 1e-9


@examples(15)
@given(batch=batches(), data=st.data())
@torch.no_grad()
def test_logits_to_keep_takes_column_numbers(batch, data):
    model, (_, ids, mask) = MODELS["rotary"](), batch
    columns = ids.shape[1]
    wanted = torch.tensor(data.draw(st.lists(st.integers(-columns, columns - 1), min_size=1, max_size=5)))
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, wanted]
    kept = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=wanted).logits
    assert difference(kept, expected) <= TOLERANCE


@examples(10)
@given(batch=batches())
@torch.no_grad()
def test_hidden_states_of_all_layers_are_those_of_the_rows_alone(batch):
    model, (rows, ids, mask) = MODELS["rotary"](), batch
    found = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
    assert len(found) == model.config.text_config.num_hidden_layers + 1
    for number, row in enumerate(rows):
        expected = model(row[None], use_cache=False, output_hidden_states=True).hidden_states
        for mine, theirs in zip(found, expected, strict=True):
            assert difference(mine[number][mask[number].bool()], theirs[0]) <= TOLERANCE


@every_model
@torch.no_grad()
def test_embeddings_can_take_the_place_of_ids(name: str):
    model, ids = MODELS[name](), random_ids(2, SEGMENT_SIZE + 3)
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings, use_cache=False).logits, model(ids, use_cache=False).logits)


# Invariant 4: nothing is on the model


def model_contents(model: ARMTForCausalLM) -> dict:
    """Everything that a call could leave behind."""
    return {
        "attributes": {
            name: {key: id(value) for key, value in vars(module).items()} for name, module in model.named_modules()
        },
        "tensors": {name: (id(t), t.clone(), t.grad) for name, t in model.named_parameters()}
        | {name: (id(t), t.clone(), None) for name, t in model.named_buffers()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "config": model.config.to_dict(),
        "generation config": model.generation_config.to_dict(),
        "context": (_current_pass.get(), _finished_rows.get()),
    }


CALLS = {
    "uncached": lambda model, ids, mask: model(ids, attention_mask=mask, use_cache=False),
    "cached": lambda model, ids, mask: model(ids, attention_mask=mask, use_cache=True),
    "loss": lambda model, ids, mask: model(ids, attention_mask=mask, labels=ids, return_logits=False).loss.item(),
    "greedy": lambda model, ids, mask: model.generate(ids, attention_mask=mask, max_new_tokens=12),
    "beams": lambda model, ids, mask: model.generate(ids, attention_mask=mask, max_new_tokens=12, num_beams=2),
    "failure": lambda model, ids, mask: fail_in_the_second_segment(model, ids, mask, ARMTCache()),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_nothing_on_the_model(call: str):
    model = tiny_model("llama")
    ids, mask = pad_left([random_ids(2 * SEGMENT_SIZE + 1), random_ids(4)])
    before = model_contents(model)
    CALLS[call](model, ids, mask)
    assert same(model_contents(model), before)


@torch.no_grad()
def test_two_threads_with_a_cache_each_share_a_model():
    model = MODELS["rotary"]()
    texts = [random_ids(3 * SEGMENT_SIZE, seed=seed) for seed in range(2)]
    start, results = threading.Barrier(2), [None, None]

    @torch.no_grad()
    def read(number: int):
        start.wait()
        results[number] = read_in_chunks(model, texts[number][None], [1] * len(texts[number]))[0][0]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for text, logits in zip(texts, results, strict=True):
        assert difference(logits, read_alone(model, text)) <= TOLERANCE


# A call that fails


def fail_in_the_second_segment(model: ARMTForCausalLM, ids: torch.Tensor, mask, cache: ARMTCache):
    """Reads with a last layer that breaks when it is run for the second time."""
    calls = []

    def break_down(*_):
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError("no room")

    handle = model.decoder.layers[-1].register_forward_hook(break_down)
    try:
        with pytest.raises(MemoryError, match="no room"):
            model(ids, attention_mask=mask, cache=cache)
    finally:
        handle.remove()


def fail_in_the_logits(model: ARMTForCausalLM, ids: torch.Tensor, mask, cache: ARMTCache):
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: no_room())
    try:
        with pytest.raises(MemoryError, match="no room"):
            model(ids, attention_mask=mask, cache=cache)
    finally:
        handle.remove()


def fail_in_the_loss(model: ARMTForCausalLM, ids: torch.Tensor, mask, cache: ARMTCache, **options):
    model.loss_function = lambda *args, **kwargs: no_room()
    with pytest.raises(MemoryError, match="no room"):
        model(ids, attention_mask=mask, cache=cache, labels=ids, **options)
    del model._loss_function  # where transformers keeps it


def fail_in_the_last_segments_loss(model: ARMTForCausalLM, ids: torch.Tensor, mask, cache: ARMTCache):
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    fail_in_the_loss(model, ids, mask, cache, return_logits=False)


def no_room():
    raise MemoryError("no room")


def wrong_ids(model: ARMTForCausalLM, ids: torch.Tensor, mask, cache: ARMTCache):
    ids = ids.clone()
    ids[-1, -2] = VOCABULARY
    with pytest.raises(ValueError, match=f"token id {VOCABULARY}"):
        model(ids, attention_mask=mask, cache=cache)


def wrong_mask(model: ARMTForCausalLM, ids: torch.Tensor, mask, cache: ARMTCache):
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=ids.new_ones(len(ids), 1), cache=cache)


FAILURES = (
    *(fail_in_the_second_segment, fail_in_the_logits, fail_in_the_loss, fail_in_the_last_segments_loss),
    *(wrong_ids, wrong_mask),
)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("rows", [2, 1], ids=["same rows", "one memory for all rows"])
@torch.no_grad()
def test_a_failing_call_leaves_the_cache_as_it_was(failure, rows: int):
    model = MODELS["rotary"]()
    cache = model(random_ids(rows, SEGMENT_SIZE + 3)).cache
    before = cache_contents(cache)
    failure(model, random_ids(2, 2 * SEGMENT_SIZE, seed=1), None, cache)
    assert same(cache_contents(cache), before)


@torch.no_grad()
def test_after_a_failing_call_reading_goes_on():
    model, row = MODELS["rotary"](), random_ids(3 * SEGMENT_SIZE)
    cache = model(row[None, :5]).cache
    fail_in_the_second_segment(model, row[None, 5:], None, cache)
    assert difference(model(row[None, 5:], cache=cache).logits[0], read_alone(model, row)[5:]) <= TOLERANCE


# Invariant 5: constant memory


@torch.no_grad()
def test_a_cache_does_not_grow():
    model = MODELS["rotary"]()

    def size(length: int) -> int:
        contents = cache_contents(model(random_ids(2, length), logits_to_keep=1).cache)
        return sum(tensor.numel() for tensor in contents["tensors"].values())

    assert size(3 * SEGMENT_SIZE + 5) == size(30 * SEGMENT_SIZE + 5)


PEAK_MEMORY = """
import re
from pathlib import Path
import torch
from families import random_ids, tiny_backbone, add_memory, FAMILIES
torch.set_num_threads(1)
model = add_memory(tiny_backbone(FAMILIES["llama"]).float(), segment_size=256, num_mem_tokens=8)
with torch.no_grad():
    for length in (10_000, 100_000):
        model(random_ids(1, length), logits_to_keep=1)
        print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


# ru_maxrss is no help: a child process starts with its parent's
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_peak_memory_does_not_depend_on_the_length_of_the_text():
    output = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout
    short, long = (int(line) for line in output.split())
    assert long < 1.02 * short
