"""
The fast decode step is the ordinary forward, one token at a time: same logits, same memory, for every family, batch
and kind of cache; and a conversation can be used for anything else at any time.
"""

import contextlib
import copy
import functools
import threading
import weakref

import pytest
import torch
from families import FAMILIES, PAD, SEGMENT_SIZE, VOCABULARY, add_memory, random_ids, tiny_backbone, tiny_model
from helpers import cache_contents, difference, pad_left
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._dynamo.testing import CompileCounter

from modeling_armt import ARMTCache, ARMTForCausalLM, decode_armt, decode_probe_armt, decode_step_armt, replay_armt
from modeling_armt.replay_armt import Replay
from modeling_armt.static_keys_armt import blockwise_attention, slot_masks, static_attention


STEPS = 3 * SEGMENT_SIZE + 3  # over three borders at least
CORE = [
    *("llama", "mistral", "ministral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "opt", "opt_projected", "falcon", "mpt", "olmo2", "olmo3", "granite", "cohere"),
    *("cohere2", "smollm3", "stablelm", "starcoder2", "glm", "glm4", "gpt_oss", "exaone4", "nemotron", "seed_oss"),
    *("llama4_text", "modernbert-decoder", "deepseek_v3"),
]
# float32 experts: rounding of a token changes what the next memory holds, and so on
TOLERANCES = {name: 1e-9 if FAMILIES[name].tolerance == 1e-9 else 1e-4 for name in CORE}
SLOW = {
    "bloom": "4D masks do not fit its position bias",
    "falcon_alibi": "nor this one's",
    "gpt_neo": "its attention looks masks up by the number of keys",
    "gpt_neo_short": "and has no more of them than a segment needs",
}


@pytest.fixture(autouse=True)
def plain_steps_on_the_cpu(monkeypatch):
    """Decode at fixed shapes on a CPU too, without waiting for a compiler."""
    monkeypatch.setattr(decode_armt, "DEVICES", {"cpu"})
    monkeypatch.setattr(decode_armt, "READS_AHEAD", {"cpu"})
    monkeypatch.setattr(decode_armt, "COMPILES", False)
    with torch.no_grad():
        yield


@functools.cache
def slow_model(name: str = "llama") -> ARMTForCausalLM:
    return tiny_model(name)


def fast_model(name: str = "llama") -> ARMTForCausalLM:
    """The same model, prepared for nothing yet."""
    return copy.deepcopy(slow_model(name)).compile_armt()


@pytest.fixture
def slow() -> ARMTForCausalLM:
    return slow_model()


@pytest.fixture
def fast() -> ARMTForCausalLM:
    return fast_model()


def read(model: ARMTForCausalLM, *lengths: int) -> ARMTCache:
    """A cache that has read random rows of these lengths, left-padded."""
    ids, mask = pad_left([random_ids(length, seed=length) for length in lengths])
    return model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1).cache


def decode(model: ARMTForCausalLM, cache: ARMTCache, columns: torch.Tensor, real: torch.Tensor | None = None):
    """Logits of `(B, T)` ids, one column at a time; `real` `(B, T)` says which are not padding."""
    logits = []
    for n, tokens in enumerate(columns.split(1, dim=1)):
        mask = None if real is None else real[:, n, None]
        logits.append(model(tokens, attention_mask=mask, cache=cache).logits)
    return torch.cat(logits, dim=1)


def is_fast(cache: ARMTCache, model: ARMTForCausalLM) -> bool:
    """Whether the conversation is in the buffers of the model's decode step: it was decoded there, and last."""
    return cache.lent_to is not None and cache.lent_to is model.fast.decode


def check_same_memory(a: ARMTCache, b: ARMTCache, tolerance: float = 1e-9):
    """All that two caches hold, up to rounding."""
    a, b = cache_contents(a), cache_contents(b)
    tensors, others = a.pop("tensors"), b.pop("tensors")
    assert a == b
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        if name.startswith(("keys", "values")):  # what is left of an open segment is never looked at
            length = tensor.shape[2]
            used = torch.arange(length) >= length - torch.tensor(a["opened"])[:, None]
            tensor, others[name] = (t * used[:, None, :, None] for t in (tensor, others[name]))
        assert torch.allclose(tensor, others[name], rtol=tolerance, atol=tolerance), name


# The same numbers


@pytest.mark.parametrize("name", CORE)
def test_a_step_is_the_forward_of_a_token(name: str):
    slow, fast = slow_model(name), fast_model(name)
    cache = read(slow, 5, 5)
    ids, other = random_ids(2, STEPS), copy.deepcopy(cache)
    expected = decode(slow, cache, ids)
    found = decode(fast, other, ids)
    assert is_fast(other, fast), fast.fast.decode.reason
    assert difference(found, expected) <= TOLERANCES[name]
    check_same_memory(other, cache, TOLERANCES[name])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mistral", "gpt2"])
def test_rows_at_different_places_and_with_padding(name: str):
    """Rows fill their segments at different steps, padding anywhere in between; some have never written."""
    slow, fast = slow_model(name), fast_model(name)
    cache = read(slow, 2 * SEGMENT_SIZE + 3, 1, SEGMENT_SIZE, SEGMENT_SIZE - 1)
    ids, other = random_ids(4, STEPS), copy.deepcopy(cache)
    real = torch.rand(4, STEPS, generator=torch.Generator().manual_seed(0)) > 0.2
    found, expected = decode(fast, other, ids, real), decode(slow, cache, ids, real)
    assert is_fast(other, fast)
    assert difference(found, expected) <= 1e-9
    check_same_memory(other, cache)


KINDS = [{"use_denom": False}, {"correction": False}, {"memory_layers": [1]}, {"memory_norm": True}]


@pytest.mark.parametrize("options", [*KINDS, {"spread_memory_tokens": True}], ids=str)
def test_every_kind_of_memory(options: dict):
    slow = tiny_model("llama", **options)
    fast = copy.deepcopy(slow).compile_armt()
    cache, ids = read(slow, 5, 11), random_ids(2, STEPS)
    other = copy.deepcopy(cache)
    expected = decode(slow, cache, ids)
    assert difference(decode(fast, other, ids), expected) <= 1e-9
    assert is_fast(other, fast)
    check_same_memory(other, cache)


@pytest.mark.parametrize("segment_size", [1, 2, 3])
def test_short_segments(segment_size: int):
    slow = tiny_model("llama", segment_size=segment_size)
    fast = copy.deepcopy(slow).compile_armt()
    cache, ids = read(slow, 1, 4), random_ids(2, 9)
    other = copy.deepcopy(cache)
    expected = decode(slow, cache, ids)
    assert difference(decode(fast, other, ids), expected) <= 1e-9
    assert is_fast(other, fast)
    check_same_memory(other, cache)


def test_statistics_are_those_of_the_forward(slow, fast):
    cache, ids = read(slow, 5, 11), random_ids(2, STEPS)
    other = copy.deepcopy(cache)
    decode(slow, cache, ids), decode(fast, other, ids)
    for layer, expected in cache.stats().items():
        for name, values in other.stats()[layer].items():
            assert values == pytest.approx(expected[name], rel=1e-9), name


def test_bfloat16_is_as_close_as_bfloat16_is():
    slow = add_memory(tiny_backbone(FAMILIES["llama"]).bfloat16())
    slow.memory.float()
    fast = copy.deepcopy(slow).compile_armt()
    cache, ids = read(slow, 5, 11), random_ids(2, SEGMENT_SIZE)
    other = copy.deepcopy(cache)
    expected, found = decode(slow, cache, ids), decode(fast, other, ids)
    assert is_fast(other, fast)
    assert found.dtype == torch.bfloat16
    assert difference(found, expected) <= 0.05 * expected.abs().max()
    assert {state.A.dtype for state in other.states.values()} == {torch.float32}


# generate


def generate(model: ARMTForCausalLM, ids: torch.Tensor, **options) -> torch.Tensor:
    defaults = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    return model.generate(ids, **{**defaults, **options})


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "ends": {"eos_token_id": list(range(10, 16))},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_generate_gives_the_same_tokens(name: str, mode: str):
    slow, fast = slow_model(name), fast_model(name)
    ids, mask = pad_left([random_ids(length, seed=length) for length in (1, 5, SEGMENT_SIZE, 2 * SEGMENT_SIZE + 3)])
    results = []
    for model in (slow, fast):
        torch.manual_seed(0)
        options = {"attention_mask": mask, "return_dict_in_generate": True, **MODES[mode]}
        results.append(generate(model, ids, **options))
    assert results[0].sequences.tolist() == results[1].sequences.tolist()
    assert fast.fast.decode.step.batch_size == len(ids) * MODES[mode].get("num_beams", 1)
    if mode != "beams":
        assert is_fast(results[1].cache, fast)
    check_same_memory(results[1].cache, results[0].cache)


def test_every_new_token_but_the_first_is_a_step(fast, monkeypatch):
    steps = []
    run = decode_step_armt.DecodeStep.step
    monkeypatch.setattr(decode_step_armt.DecodeStep, "step", lambda step: (steps.append(step.batch_size), run(step)))
    generate(fast, random_ids(3, 5))
    assert steps.count(3) == STEPS - 1


# Reading ahead


def begin(model: ARMTForCausalLM, cache: ARMTCache, ids: torch.Tensor) -> None:
    model.fast.decode.begin(ids, cache)
    assert model.fast.decode.begun is not None


def test_generate_drops_labels_as_it_does_without_steps(fast, slow):
    ids = random_ids(2, 5)
    assert torch.equal(generate(fast, ids, labels=ids), generate(slow, ids))


def test_generate_begins_every_token_before_it_is_asked_for(fast, monkeypatch):
    events = []
    for name in ("begin", "undo"):
        run = getattr(decode_armt.FixedShapes, name)
        monkeypatch.setattr(
            decode_armt.FixedShapes, name, lambda self, *a, name=name, run=run: (events.append(name), run(self, *a))
        )
    output = generate(fast, random_ids(1, 5), return_dict_in_generate=True)
    assert events.count("begin") == STEPS - 2  # the second is the first of one column, the last is not read
    assert fast.fast.decode.begun is None and output.cache.tokens == [5 + STEPS - 1]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_read_ahead_is_a_token_read(slow, fast, rows: int):
    """Over segment borders, with everything that the cache knows of its memories."""
    expected, cache = (read(model, *range(5, 5 + rows)) for model in (slow, fast))
    for tokens in random_ids(rows, STEPS).split(1, dim=1):
        logits = slow(tokens, cache=expected).logits
        if is_fast(cache, fast):
            begin(fast, cache, tokens)
        assert difference(fast(tokens, cache=cache).logits, logits) <= 1e-9
        assert fast.fast.decode.begun is None
    check_same_memory(cache, expected)


@pytest.mark.parametrize("change", [False, True])
def test_ids_of_inference_mode_are_looked_at_again(slow, fast, change: bool):
    """They have no version that would tell of a change."""
    cache, expected = read(fast, 5, 6), read(slow, 5, 6)
    with torch.inference_mode():
        first, ids = random_ids(2, 1).clone(), random_ids(2, 1, seed=1).clone()
        decode(slow, expected, first), decode(fast, cache, first)
        begin(fast, cache, ids)
        if change:
            ids[1] = (ids[1] + 1) % VOCABULARY
        assert difference(decode(fast, cache, ids), decode(slow, expected, ids)) <= 1e-9
    check_same_memory(cache, expected)


CHANGES_OF_MIND = {
    "other tokens": lambda ids: random_ids(2, 1, seed=9),
    "a row that is padding": lambda ids: ids,
    "the tokens changed in place": lambda ids: ids.copy_(random_ids(2, 1, seed=9)),
}


@pytest.mark.parametrize("change", CHANGES_OF_MIND)
@pytest.mark.parametrize("before", [3, SEGMENT_SIZE - 2])  # tokens in the open segment, the next one fills it
def test_what_was_read_ahead_is_undone_when_something_else_comes(slow, fast, change: str, before: int):
    cache, ids = read(slow, before, before), random_ids(2, 2)
    real = torch.tensor([[True], [change != "a row that is padding"]])
    expected = copy.deepcopy(cache)
    decode(slow, expected, ids[:, :1])
    decode(fast, cache, ids[:, :1])
    begun = ids[:, 1:].clone()
    begin(fast, cache, begun)
    tokens = CHANGES_OF_MIND[change](begun)
    found = decode(fast, cache, tokens, real)
    assert difference(found, decode(slow, expected, tokens, real)) <= 1e-9
    assert is_fast(cache, fast)
    check_same_memory(cache, expected)


def test_what_was_read_ahead_is_unknown_to_whoever_asks_the_cache(slow, fast):
    cache, ids = read(slow, SEGMENT_SIZE + 3, 2), random_ids(2, 2)
    expected = copy.deepcopy(cache)
    decode(slow, expected, ids[:, :1])
    decode(fast, cache, ids[:, :1])
    begin(fast, cache, ids[:, 1:])
    check_same_memory(cache.fork(), expected.fork())
    check_same_memory(cache, expected)


def test_another_conversation_does_not_see_what_was_begun(slow, fast):
    one, other, ids = read(slow, 5), read(slow, 7), random_ids(1, 3)
    expected = decode(slow, other.fork(), ids)
    decode(fast, one, ids[:, :1])
    begin(fast, one, ids[:, 1:2])
    assert difference(decode(fast, other, ids), expected) <= 1e-9


def test_an_answer_that_ends_leaves_no_token_too_many(slow, fast):
    """The token after the last is begun, since the end is not known yet."""
    options = {"eos_token_id": list(range(10, 40)), "return_dict_in_generate": True}
    found, expected = (generate(model, random_ids(1, 5), **options) for model in (fast, slow))
    assert found.sequences.tolist() == expected.sequences.tolist() and found.sequences.shape[1] < 5 + STEPS
    check_same_memory(found.cache, expected.cache)


def test_logits_of_earlier_steps_stay_what_they_were(slow, fast):
    cache, ids = read(slow, 5), random_ids(1, 4)
    logits = [fast(tokens, cache=cache).logits for tokens in ids.split(1, dim=1)]
    assert len({row.sum().item() for row in logits}) == 4


# A conversation in the buffers


def use_stats(model, cache):
    return cache.stats()


def use_keys(model, cache):
    return cache.keys.layers[0].keys


def use_fork(model, cache):
    return cache.fork()


def use_deepcopy(model, cache):
    return copy.deepcopy(cache)


def use_chunk(model, cache):
    return model(random_ids(2, 3, seed=5), cache=cache)


def use_close(model, cache):
    return model.close_segment(cache)


def use_select(model, cache):
    return cache.batch_select_indices(torch.tensor([1, 0]))


def use_reorder(model, cache):
    return cache.reorder_cache(torch.tensor([1, 1]))


def use_repeat(model, cache):
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))


def use_hidden_states(model, cache):
    return model(random_ids(2, 1, seed=5), cache=cache, output_hidden_states=True)


USES = (
    *(use_stats, use_keys, use_fork, use_deepcopy, use_chunk, use_close, use_select, use_reorder, use_repeat),
    use_hidden_states,
)


@pytest.mark.parametrize("use", USES)
def test_a_conversation_may_be_used_in_any_other_way_in_between(use, slow, fast):
    cache, ids = read(slow, 5, 11), random_ids(2, STEPS)
    other = copy.deepcopy(cache)
    for start in range(0, STEPS, 6):
        expected, found = (decode(m, c, ids[:, start : start + 6]) for m, c in ((slow, cache), (fast, other)))
        assert is_fast(other, fast)
        assert difference(found, expected) <= 1e-9
        use(slow, cache), use(fast, other)
        assert not is_fast(other, fast)
    check_same_memory(other, cache)


def test_counts_can_be_read_without_moving_the_conversation(fast):
    cache = read(fast, 5)
    decode(fast, cache, random_ids(1, 4))
    assert (cache.tokens, cache.opened, cache.segments, cache.batch_size, cache.columns) == ([9], [1], [1], 1, 9)
    assert "tokens=[9]" in repr(cache)
    assert cache.get_seq_length() == 9
    assert is_fast(cache, fast)


def test_forks_go_their_own_ways(slow, fast):
    cache = read(slow, 5)
    decode(fast, cache, random_ids(1, 4))
    forks = [cache.fork() for _ in range(2)]
    before = cache_contents(cache)
    for number, fork in enumerate(forks):
        ids = random_ids(1, STEPS, seed=number)
        expected = decode(slow, cache.fork(), ids)
        assert difference(decode(fast, fork, ids), expected) <= 1e-9
    for name, tensor in cache_contents(cache)["tensors"].items():
        assert torch.equal(tensor, before["tensors"][name]), name


def test_conversations_may_take_turns(slow, fast):
    caches = [read(slow, 5), read(slow, 7), read(slow, 3, 4)]
    others = copy.deepcopy(caches)
    for turn in range(STEPS):
        for cache, other in zip(caches, others, strict=True):
            ids = random_ids(cache.batch_size, 1, seed=turn)
            assert difference(decode(fast, other, ids), decode(slow, cache, ids)) <= 1e-9
    for cache, other in zip(caches, others, strict=True):
        check_same_memory(other, cache)


def test_threads_share_a_model(slow, fast):
    ids = [random_ids(1, STEPS, seed=seed) for seed in range(2)]
    caches = [read(slow, 5 + seed) for seed in range(2)]
    expected = [decode(slow, cache.fork(), row) for cache, row in zip(caches, ids, strict=True)]
    found = [None, None]

    def work(number: int):
        with torch.no_grad():
            found[number] = decode(fast, caches[number], ids[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(difference(a, b) <= 1e-9 for a, b in zip(found, expected, strict=True))


def test_a_memory_is_saved_in_the_middle_and_goes_on(slow, fast, tmp_path):
    cache, ids = read(slow, 5, 11), random_ids(2, STEPS)
    expected = decode(slow, cache.fork(), ids)
    found = decode(fast, cache, ids[:, :10])
    fast.save_memory(cache, tmp_path / "memory.safetensors")
    loaded = fast.load_memory(tmp_path / "memory.safetensors")
    found = torch.cat([found, decode(fast, loaded, ids[:, 10:])], dim=1)
    assert difference(found, expected) <= 1e-9


def test_a_text_may_be_read_whose_last_block_is_a_token(slow, fast):
    cache, ids = read(slow, 5), random_ids(1, SEGMENT_SIZE + 4)  # 3 fill the open segment, 8 the next
    other = copy.deepcopy(cache)
    for model, memory in ((slow, cache), (fast, other)):
        model.read(ids, memory, block_segments=1)
    assert cache.tokens == [17] and cache.opened == [1]
    check_same_memory(other, cache)


def test_a_forgotten_conversation_leaves_the_buffers(fast):
    cache = read(fast, 5)
    decode(fast, cache, random_ids(1, 4))
    cache.reset()
    assert (cache.states, cache.keys, cache.tokens) == ({}, None, [])
    again = fast(random_ids(1, 5), cache=cache).cache
    assert again.tokens == [5]


def test_a_conversation_outlives_its_model(slow, fast):
    cache, ids = read(slow, 5), random_ids(1, 10)
    other = copy.deepcopy(cache)
    decode(slow, cache, ids), decode(fast, other, ids)
    del fast
    check_same_memory(other, cache)


def test_nothing_keeps_the_weights_of_a_forgotten_model(slow):
    model = fast_model()
    decode(model, read(model, 5), random_ids(1, 10))
    weight, freed = model.get_input_embeddings().weight, []
    weakref.finalize(weight, freed.append, True)
    del weight, model
    assert freed


# Steps that fail


def no_room(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def break_the_head(model: ARMTForCausalLM, monkeypatch):
    monkeypatch.setattr(decode_step_armt, "run_head", no_room)


def break_a_write(model: ARMTForCausalLM, monkeypatch):
    """The last layer's, after those of the others."""
    monkeypatch.setattr(model.memory[max(model.memory)], "write", no_room)


def break_a_layer(model: ARMTForCausalLM, monkeypatch):
    monkeypatch.setattr(type(model.decoder.layers[-1].mlp), "forward", no_room)


def break_the_answer(model: ARMTForCausalLM, monkeypatch):
    """What is left to do when a segment is full."""
    monkeypatch.setattr(ARMTCache, "count", no_room)


@pytest.mark.parametrize("ahead", [False, True], ids=["when asked", "read ahead"])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 2), (1, 2)], ids=["all rows are full", "one row is full", "none is"])
@pytest.mark.parametrize("failure", [break_the_head, break_a_write, break_a_layer, break_the_answer])
def test_a_step_that_fails_changes_nothing(failure, lengths: tuple[int, int], ahead: bool, slow, fast, monkeypatch):
    expected, cache = read(slow, *lengths), read(fast, *lengths)
    first, tokens = random_ids(2, 2).split(1, dim=1)
    decode(slow, expected, first), decode(fast, cache, first)
    if failure is break_a_write and max(lengths) < SEGMENT_SIZE - 2:
        return  # nothing is written
    with monkeypatch.context() as broken, pytest.raises(torch.OutOfMemoryError):
        if ahead and failure in (break_a_write, break_the_answer):  # which come later
            begin(fast, cache, tokens)
        failure(fast, broken)
        if ahead:
            fast.fast.decode.begin(tokens, cache)
        fast(tokens, cache=cache)
    check_same_memory(cache.fork(), expected.fork())
    assert difference(fast(tokens, cache=cache).logits, slow(tokens, cache=expected).logits) <= 1e-9
    check_same_memory(cache, expected)


def test_buffers_that_were_not_made_are_made_the_next_time(slow, fast, monkeypatch):
    cache, other = read(fast, 5), read(fast, 5, 6)
    decode(fast, cache, random_ids(1, 2))
    before, ids = cache_contents(other), random_ids(2, 3)
    with monkeypatch.context() as broken, pytest.raises(torch.OutOfMemoryError):
        broken.setattr(decode_step_armt.LayerStatistics, "new", no_room)
        fast(ids[:, :1], cache=other)
    assert cache_contents(other).keys() == before.keys() and other.lent_to is None
    expected = decode(slow, other.fork(), ids)
    assert difference(decode(fast, other, ids), expected) <= 1e-9


def test_no_room_to_prepare_is_no_reason_to_be_slow_for_ever(slow, fast, monkeypatch):
    cache, ids = read(fast, 5), random_ids(1, 4)
    expected = decode(slow, cache.fork(), ids)
    with monkeypatch.context() as broken:
        broken.setattr(decode_probe_armt, "DecodeStep", no_room)
        assert difference(decode(fast, cache, ids[:, :1]), expected[:, :1]) <= 1e-9
    assert difference(decode(fast, cache, ids[:, 1:]), expected[:, 1:]) <= 1e-9
    assert not is_fast(cache, fast)  # not tried again for every token
    another = read(fast, 5)
    assert difference(decode(fast, another, ids), expected) <= 1e-9
    assert is_fast(another, fast)


# Models that change


def double(model):
    model.model.model.layers[0].self_attn.v_proj.weight.mul_(2)


def move(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    double(model)


def assign(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    double(model)


def replace(model):
    layer = model.model.model.layers[0].mlp
    layer.up_proj, old = torch.nn.Linear(32, 64, bias=False).to(torch.float64), layer.up_proj
    layer.up_proj.weight.copy_(2 * old.weight)


def inject(model):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, model.model)
    model.to(torch.float64)


@pytest.mark.parametrize("change", [double, move, assign, replace, inject])
def test_a_model_may_change_in_the_middle(change, fast):
    slow = copy.deepcopy(fast).compile_armt(False)
    cache, ids = read(slow, 5), random_ids(1, 2 * SEGMENT_SIZE)
    other = copy.deepcopy(cache)
    before = decode(slow, cache.fork(), ids)
    for part in ids.split(SEGMENT_SIZE, dim=1):
        expected, found = decode(slow, cache, part), decode(fast, other, part)
        assert is_fast(other, fast)
        assert difference(found, expected) <= 1e-9
        change(slow), change(fast)
    assert difference(expected, before[:, SEGMENT_SIZE:]) > 1e-3


def test_adapters_may_be_switched_off_and_on(fast):
    inject(fast)
    slow = copy.deepcopy(fast).compile_armt(False)
    cache, ids = read(slow, 5), random_ids(1, 4)
    other = copy.deepcopy(cache)
    results = []
    for enabled in (True, False, True):
        for model in (slow, fast):
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.enable_adapters(enabled)
        start = cache.fork(), other.fork()
        results.append(decode(slow, start[0], ids))
        assert difference(decode(fast, start[1], ids), results[-1]) <= 1e-9
        assert is_fast(start[1], fast)
    assert difference(results[0], results[1]) > 1e-3


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")  # peft asks by the old name
def test_a_peft_model_decodes_and_generates_by_steps(slow):
    torch.manual_seed(0)
    model = copy.deepcopy(slow)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted, ids = get_peft_model(model, config), random_ids(2, 5)
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    expected = adapted.generate(input_ids=ids, **options)
    model.compile_armt()
    output = adapted.generate(input_ids=ids, return_dict_in_generate=True, **options)
    assert output.sequences.tolist() == expected.tolist()
    cache = output.cache
    assert is_fast(cache, model)
    adapted(random_ids(2, 1), cache=cache)
    assert is_fast(cache, model)


def test_weights_that_moved_are_noticed_once(fast):
    cache = read(fast, 5)
    decode(fast, cache, random_ids(1, 2))
    prepared = fast.fast.decode
    assert prepared.seen.change() is None
    move(fast)
    assert prepared.seen.change() == "moved"
    assert prepared.seen.change() is None
    decode(fast, cache, random_ids(1, 2))
    assert fast.fast.decode is prepared
    fast.float()
    assert prepared.seen.change() == "changed"


def test_a_copy_of_a_model_decodes_by_itself(slow, fast):
    cache, ids = read(slow, 5), random_ids(1, 10)
    decode(fast, cache, ids)
    twin = copy.deepcopy(fast)
    assert twin.fast.enabled and twin.fast.decode is None
    expected = decode(slow, cache.fork(), ids)
    assert difference(decode(twin, cache, ids), expected) <= 1e-9  # out of one model's buffers into the other's
    assert is_fast(cache, twin)


# What goes the usual way


def test_nothing_is_prepared_without_the_switch(slow):
    model = copy.deepcopy(slow)
    cache = read(model, 5)
    decode(model, cache, random_ids(1, 4))
    assert model.fast.decode is None and cache.lent_to is None


def test_a_cpu_decodes_the_usual_way(fast, monkeypatch):
    monkeypatch.undo()
    messages = []
    monkeypatch.setattr(decode_armt.logger, "warning", messages.append)
    cache = read(fast, 5)
    decode(fast, cache, random_ids(1, 4))
    assert cache.lent_to is None and cache.tokens == [9]
    assert not messages


def test_switching_off_in_the_middle_goes_on(slow, fast):
    cache, ids = read(slow, 5), random_ids(1, 10)
    expected = decode(slow, cache.fork(), ids)
    found = [decode(fast, cache, ids[:, :4]), decode(fast.compile_armt(False), cache, ids[:, 4:])]
    assert difference(torch.cat(found, dim=1), expected) <= 1e-9
    assert cache.lent_to is None


@pytest.mark.parametrize("call", ["gradients", "training", "labels", "embeddings", "hidden states", "two columns"])
def test_other_calls_go_the_usual_way(call: str, fast):
    cache, ids, options = read(fast, 5), random_ids(1, 1), {}
    if call == "training":
        fast.train()
    if call == "labels":
        options["labels"] = ids
    if call == "embeddings":
        ids, options["inputs_embeds"] = None, fast.get_input_embeddings()(ids)
    if call == "hidden states":
        options["output_hidden_states"] = True
    if call == "two columns":
        ids = random_ids(1, 2)
    with torch.set_grad_enabled(call == "gradients"):
        fast(ids, cache=cache, **options)
    assert cache.lent_to is None


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_named(token: int, fast):
    cache = read(fast, 5)
    decode(fast, cache, random_ids(1, 1))
    with pytest.raises(ValueError, match=f"token id {token}"):
        fast(torch.tensor([[token]]), cache=cache)


def test_wrong_shapes_are_named(fast):
    cache = read(fast, 5)
    decode(fast, cache, random_ids(1, 1))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        fast(random_ids(1, 1), attention_mask=torch.ones(1, 3), cache=cache)
    with pytest.raises(ValueError, match="unexpected|takes|not take|cannot"):
        fast(random_ids(1, 1), position_ids=torch.zeros(1, 1), cache=cache)


def test_tuples_if_asked_for(slow, fast):
    cache, ids = read(slow, 5), random_ids(1, 1)
    expected = slow(ids, cache=cache.fork(), return_dict=False)
    logits, returned = fast(ids, cache=cache, return_dict=False)
    assert difference(logits, expected[0]) <= 1e-9
    assert returned is cache and is_fast(cache, fast)


@pytest.mark.parametrize("name", SLOW)
def test_families_that_do_not_fit_are_named_and_go_the_usual_way(name: str, caplog, monkeypatch):
    slow, fast = slow_model(name), fast_model(name)
    messages = []
    monkeypatch.setattr(decode_armt.logger, "warning", messages.append)
    cache, ids = read(slow, 5), random_ids(1, 10)
    other = copy.deepcopy(cache)
    assert torch.equal(decode(fast, other, ids), decode(slow, cache, ids))
    assert fast.fast.decode.step is None and other.lent_to is None
    assert len(messages) == 1
    assert FAMILIES[name].model_type in messages[0] and fast.fast.decode.reason in messages[0]


# Compiled


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("rows", [1, 5])
def test_attention_as_it_is_compiled_is_attention(rows: int, key_heads: int, monkeypatch):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(rows, heads, n, 8).double() for heads, n in ((6, 1), (key_heads, 16), (key_heads, 16))
    )
    mask = torch.zeros(rows, 1, 1, 16).double()
    mask[..., 11:] = torch.finfo(torch.float64).min
    repeated = [states.repeat_interleave(6 // key_heads, dim=1) for states in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        found, _ = static_attention(None, query, key, value, mask, scaling=0.3)
        assert difference(found, expected.transpose(1, 2)) <= 1e-12


def test_blockwise_attention_is_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, n, 16) for n in (3, 300, 300))
    place, real = torch.tensor([[37], [128], [250]]), torch.tensor([True, True, False])
    mask = slot_masks(place, real, 300, torch.float32, {"full": (None, None)})["full"]
    value[0, :, 256:] = float("nan")  # a block that row 0 does not see
    found = torch.compile(blockwise_attention)(query, key, value, mask, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value.nan_to_num(), mask, scale=0.3)
    torch.testing.assert_close(found, expected)


# llama has norms and rotary tables in float32, whatever the model is; compiled they round differently
@pytest.mark.parametrize(("name", "rows", "tolerance"), [("gpt2", 2, 1e-9), ("llama", 6, 1e-5)])
def test_the_compiled_step_is_the_forward_of_a_token(name: str, rows: int, tolerance: float, monkeypatch):
    monkeypatch.setattr(decode_armt, "COMPILES", True)
    slow, fast = slow_model(name), fast_model(name)
    cache = read(slow, 2 * SEGMENT_SIZE + 3, *range(1, rows))
    ids, other = random_ids(rows, STEPS), copy.deepcopy(cache)
    real = torch.rand(rows, STEPS, generator=torch.Generator().manual_seed(0)) > 0.2
    found, expected = decode(fast, other, ids, real), decode(slow, cache, ids, real)
    assert is_fast(other, fast)
    assert fast.fast.decode.step._pass is not None  # compilation did not fail
    assert fast.fast.decode.prepare_seconds > 0
    assert difference(found, expected) <= tolerance
    check_same_memory(other, cache, tolerance)


def test_a_batch_size_is_compiled_once_whatever_was_read_before(fast, monkeypatch):
    compiler, compile_with = CompileCounter(), torch.compile
    monkeypatch.setattr(decode_armt, "COMPILES", True)
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, options: compile_with(f, backend=compiler, dynamic=dynamic)
    )
    for rows, length in ((1, 5), (1, 7), (2, 5), (1, 2 * SEGMENT_SIZE + 3), (2, 9), (1, SEGMENT_SIZE - 1)):
        cache = fast(random_ids(rows, length)).cache
        decode(fast, cache, random_ids(rows, 3))
        assert is_fast(cache, fast)
    assert compiler.frame_count == 2


def test_a_step_that_cannot_be_compiled_runs_as_it_is(slow, fast, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    messages = []
    monkeypatch.setattr(decode_armt, "COMPILES", True)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    monkeypatch.setattr(decode_step_armt.logger, "warning", messages.append)
    cache, ids = read(slow, 5), random_ids(1, 10)
    expected = decode(slow, cache.fork(), ids)
    assert difference(decode(fast, cache, ids), expected) <= 1e-9
    assert is_fast(cache, fast)
    assert len(messages) == 1 and "no compiler" in messages[0]


def test_no_room_to_compile_is_no_reason_to_be_slow_for_ever(slow, fast, monkeypatch):
    calls, rooms = [], [False]

    def compiled(function, **kwargs):
        def run():
            calls.append(rooms[0])
            function()
            if not rooms[0]:
                no_room()

        return run

    monkeypatch.setattr(decode_armt, "COMPILES", True)
    monkeypatch.setattr(torch, "compile", compiled)
    ids = random_ids(1, 4)
    for _ in range(2):
        cache = read(fast, 5)
        expected = decode(slow, cache.fork(), ids)
        assert difference(decode(fast, cache, ids), expected) <= 1e-9
        rooms[0] = True
    assert calls == [False, True, True, True, True]  # tried again with the next conversation


class FakeGraph:
    """Captures by remembering what was called, as a GPU does not: it does not run it."""

    def __init__(self):
        self.functions = []

    def replay(self):
        for function in self.functions:
            function()


def test_a_function_is_called_then_captured_then_replayed(monkeypatch):
    calls, captured = [], []

    @contextlib.contextmanager
    def capture(graph, **kwargs):
        graph.functions.append(lambda: calls.append("replayed"))
        yield
        captured.append(calls.pop())  # what runs during a capture has no effect

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    replay = Replay(lambda: calls.append("called"), captures=True)
    for _ in range(4):
        replay()
    assert calls == ["called", "replayed", "replayed", "replayed"]
    assert captured == ["called"]


def test_a_function_that_cannot_be_captured_is_called(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    calls, messages = [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", broken)
    monkeypatch.setattr(replay_armt.logger, "warning", messages.append)
    replay = Replay(lambda: calls.append("called"), captures=True)
    for _ in range(4):
        replay()
    assert calls == ["called"] * 4
    assert len(messages) == 1 and "capturing" in messages[0]


def test_a_capture_without_room_is_tried_again(monkeypatch):
    calls, tried = [], []

    @contextlib.contextmanager
    def capture(graph, **kwargs):
        tried.append(len(calls))
        if len(tried) < 3:
            no_room()
        graph.functions.append(lambda: calls.append("replayed"))
        yield
        calls.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    replay = Replay(lambda: calls.append("called"), captures=True)
    for _ in range(9):
        replay()
    assert tried == [1, 3, 7]  # less often each time
    assert calls == ["called"] * 7 + ["replayed"] * 2
