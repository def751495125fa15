"""The stock `generate`: what it returns is what a plain forward says, whatever the mode, the batch and the cache."""

import functools
import logging
import threading

import pytest
import torch
from families import EOS, FAMILIES, PAD, SEGMENT_SIZE, VOCABULARY, random_ids, tiny_backbone, tiny_model
from helpers import difference, examples, pad_left, pad_right
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt.conversion.demo import BACKBONE


NEW = 2 * SEGMENT_SIZE + 3  # new tokens: over at least two segment borders
LENGTHS = (1, 5, SEGMENT_SIZE, 3 * SEGMENT_SIZE + 3)
MODELS = {
    "llama": functools.cache(lambda: tiny_model("llama")),
    "sliding windows": functools.cache(lambda: tiny_model("gemma3_text")),
    "learned positions": functools.cache(lambda: tiny_model("gpt2")),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def model() -> ARMTForCausalLM:
    return MODELS["llama"]()


def generate(model: ARMTForCausalLM, ids: torch.Tensor, **kwargs):
    """`generate` to the full length, greedy unless told otherwise."""
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    if kwargs.pop("seed", None) is not None:
        torch.manual_seed(0)
    return model.generate(ids, **{**defaults, **kwargs})


@torch.no_grad()
def greedy(model: ARMTForCausalLM, row: torch.Tensor, new_tokens: int = NEW) -> list[int]:
    """The definition of greedy search: the best token after each prefix, by an uncached forward over all of it."""
    ids = row[None]
    for _ in range(new_tokens):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    return ids[0, len(row) :].tolist()


# Modes


@every_model
@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_search_is_the_argmax_of_a_plain_forward(name: str, length: int):
    model, row = MODELS[name](), random_ids(length, seed=length)
    assert generate(model, row[None])[0, length:].tolist() == greedy(model, row)


@torch.no_grad()
def test_the_logits_of_generate_are_those_of_a_plain_forward(model):
    ids = random_ids(2, 5)
    output = generate(model, ids, return_dict_in_generate=True, output_logits=True)
    expected = model(output.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    assert difference(torch.stack(output.logits, dim=1), expected.float()) <= 1e-6  # generate keeps float32


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 0},
    "top-k sampling": {"do_sample": True, "top_k": 5, "temperature": 1.5, "seed": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "seed": 0},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "beams that end": {"num_beams": 4, "eos_token_id": list(range(10, 20)), "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True, "seed": 0},
    "repetition penalty": {"repetition_penalty": 1.7},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_generates_the_same_with_and_without_a_cache(mode: str, seed: int, model):
    ids = random_ids(2, 5 + seed, seed=seed)
    with_cache = generate(model, ids, **MODES[mode])
    assert with_cache.tolist() == generate(model, ids, use_cache=False, **MODES[mode]).tolist()
    assert len(with_cache) == 2 * MODES[mode].get("num_return_sequences", 1)


@every_model
def test_beams_survive_segment_borders(name: str):
    model, ids = MODELS[name](), random_ids(2, SEGMENT_SIZE - 2)
    assert generate(model, ids, num_beams=4).tolist() == generate(model, ids, num_beams=4, use_cache=False).tolist()


def test_samples_of_one_prompt_differ(model):
    samples = generate(model, random_ids(1, 5), do_sample=True, num_return_sequences=3, seed=0)
    assert len({tuple(row) for row in samples.tolist()}) == 3


def test_generation_from_embeddings_is_generation_from_ids(model):
    ids = random_ids(2, SEGMENT_SIZE + 3)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
    assert generate(model, None, inputs_embeds=embeddings).tolist() == generate(model, ids)[:, ids.shape[1] :].tolist()


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value: torch.Tensor):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_gets_every_token_once(model):
    streamer = Collector()
    output = generate(model, random_ids(1, 5), streamer=streamer)
    assert streamer.tokens == output[0].tolist()
    assert streamer.ended


def test_a_stop_string_ends_a_text(model):
    tokenizer = AutoTokenizer.from_pretrained(BACKBONE)  # its first ids are single characters
    prompt = random_ids(1, SEGMENT_SIZE + 3)
    reply = generate(model, prompt)[0, prompt.shape[1] :].tolist()
    output = generate(model, prompt, stop_strings=tokenizer.decode(reply[5]), tokenizer=tokenizer)
    assert output[0, prompt.shape[1] :].tolist() == reply[: reply.index(reply[5]) + 1]


@every_model
def test_a_prompt_may_be_longer_than_the_backbones_context(name: str):
    model = MODELS[name]()
    row = random_ids(3 * model.config.max_position_embeddings + 1)
    assert generate(model, row[None])[0, len(row) :].tolist() == greedy(model, row)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_nor_does_it_shorten_or_comment_on_what_is_generated(model, caplog, monkeypatch):
    logger = logging.getLogger("transformers.generation.stopping_criteria")
    monkeypatch.setattr(logger, "warning_once", logger.warning, raising=False)
    logger.addHandler(caplog.handler)
    row = random_ids(3 * model.config.max_position_embeddings + 1)[None]
    output = model.generate(row, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    logger.removeHandler(caplog.handler)
    assert output.tolist() == generate(model, row, max_new_tokens=20).tolist()  # the default
    assert caplog.records == []


# Batches


@every_model
@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_of_a_padded_batch_generate_as_if_alone(name: str, pad, use_cache: bool):
    model = MODELS[name]()
    rows = [random_ids(length, seed=length) for length in LENGTHS]
    ids, mask = pad(rows)
    output = generate(model, ids, attention_mask=mask, use_cache=use_cache)[:, ids.shape[1] :]
    for number, row in enumerate(rows):
        assert output[number].tolist() == generate(model, row[None])[0, len(row) :].tolist(), f"row {number}"


@pytest.mark.parametrize("mode", ["beams", "all beams"])
def test_beams_of_a_padded_batch_are_those_of_the_rows_alone(mode: str, model):
    rows = [random_ids(length, seed=length) for length in LENGTHS]
    ids, mask = pad_left(rows)
    output = generate(model, ids, attention_mask=mask, **MODES[mode])[:, ids.shape[1] :]
    for alone, found in zip(rows, output.split(len(output) // len(rows)), strict=True):
        assert found.tolist() == generate(model, alone[None], **MODES[mode])[:, len(alone) :].tolist()


def test_two_threads_generate_with_one_model(model):
    rows = [random_ids(2, 5, seed=seed) for seed in range(2)]
    expected, results = [generate(model, ids).tolist() for ids in rows], [None, None]

    def work(number: int):
        results[number] = generate(model, rows[number]).tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


# Finished rows


class StopAt(StoppingCriteria):
    """Ends a row after a given token, as stop strings do."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return input_ids[:, -1] == self.token


@pytest.fixture
def early_and_late(model) -> tuple[list[torch.Tensor], int]:
    """Two prompts and a token that the first soon generates, the second much later or never."""
    for seed in range(100):
        rows = [random_ids(SEGMENT_SIZE - 2, seed=seed), random_ids(SEGMENT_SIZE + 3, seed=seed)]
        first, second = (greedy(model, row) for row in rows)
        for place, token in enumerate(first[:5]):
            if place >= 2 and token not in first[:place] and token not in second[: 2 * SEGMENT_SIZE]:
                return rows, token
    raise AssertionError("no such prompts")


STOPS = {
    "end of text": lambda token: {"eos_token_id": token},
    "one of several ends": lambda token: {"eos_token_id": [EOS, token]},
    "padding is the end of text": lambda token: {"eos_token_id": token, "pad_token_id": token},
    "stopping criteria": lambda token: {"stopping_criteria": [StopAt(token)], "eos_token_id": EOS},
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("pad", [pad_left, pad_right])
@torch.no_grad()
def test_a_finished_row_remembers_its_end_and_nothing_after_it(stop: str, pad, model, early_and_late):
    rows, token = early_and_late
    options = {**STOPS[stop](token), "return_dict_in_generate": True}
    ids, mask = pad(rows)
    together = generate(model, ids, attention_mask=mask, **options)
    for number, row in enumerate(rows):
        alone = generate(model, row[None], **options)
        new, found = alone.sequences[0, len(row) :], together.sequences[number, ids.shape[1] :]
        assert found[: len(new)].tolist() == new.tolist()
        mine, theirs = together.cache, alone.cache
        if len(new) < len(found):  # alone, generate ends before it reads the last token; in a batch others go on
            model(new[None, -1:], cache=theirs)
        assert (mine.tokens[number], mine.opened[number]) == (theirs.tokens[0], theirs.opened[0])
        for layer, state in theirs.states.items():
            expected = torch.zeros_like(mine.states[layer].A[0]) if state is None else state.A[0]
            assert difference(mine.states[layer].A[number], expected) <= 1e-9
        assert difference(mine.last_hidden[number], theirs.last_hidden[0]) <= 1e-9


def test_a_conversation_goes_on_after_rows_that_ended_early(model, early_and_late):
    rows, token = early_and_late
    ids, mask = pad_left(rows)
    first = generate(model, ids, attention_mask=mask, eos_token_id=token, return_dict_in_generate=True)
    question, new = random_ids(2, 4, seed=9), first.sequences[:, ids.shape[1] :]
    real = new != PAD
    full, mask = torch.cat([first.sequences, question], dim=1), torch.cat([mask, real, mask.new_ones(2, 4)], dim=1)
    answers = generate(model, full, attention_mask=mask, cache=first.cache)[:, full.shape[1] :]
    for number, row in enumerate(rows):
        text = torch.cat([row, new[number][real[number]], question[number]])
        assert answers[number].tolist() == greedy(model, text)


@examples(15)
@given(
    lengths=st.lists(st.integers(1, 2 * SEGMENT_SIZE), min_size=1, max_size=4),
    ends=st.sets(st.integers(EOS + 1, VOCABULARY - 1), min_size=6, max_size=6),
    pad=st.sampled_from([pad_left, pad_right]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_rows_that_end_at_different_times_are_those_of_the_rows_alone(lengths, ends, pad, seed: int):
    model = MODELS["sliding windows"]()
    rows = [random_ids(length, seed=seed + length) for length in lengths]
    ids, mask = pad(rows)
    options = {"eos_token_id": sorted(ends), "return_dict_in_generate": True}
    together = generate(model, ids, attention_mask=mask, **options)
    for number, row in enumerate(rows):
        alone = generate(model, row[None], **options)
        new, found = alone.sequences[0, len(row) :].tolist(), together.sequences[number, ids.shape[1] :].tolist()
        assert found == new + [PAD] * (len(found) - len(new))
        read = len(row) + len(new) - (len(new) == len(found))  # the newest token of all waits for the next call
        assert together.cache.tokens[number] == read


def test_a_finished_row_is_filled_with_padding(model, early_and_late):
    rows, token = early_and_late
    ids, mask = pad_left(rows)
    output = generate(model, ids, attention_mask=mask, eos_token_id=token)[0, ids.shape[1] :].tolist()
    end = output.index(token)
    assert output == greedy(model, rows[0])[: end + 1] + [PAD] * (len(output) - end - 1)


def test_the_rows_finished_in_one_call_are_not_finished_in_the_next(model, early_and_late):
    rows, token = early_and_late
    ids, mask = pad_left(rows)
    generate(model, ids, attention_mask=mask, eos_token_id=token)
    assert generate(model, ids, attention_mask=mask)[0, ids.shape[1] :].tolist() == greedy(model, rows[0])


# Going on from a cache


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_a_conversation_goes_on_with_the_full_ids(pad, model):
    rows = [random_ids(length, seed=length) for length in (5, SEGMENT_SIZE + 3)]
    ids, mask = pad(rows)
    first = generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    full = torch.cat([first.sequences, random_ids(2, 4, seed=9)], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, full.shape[1] - mask.shape[1])], dim=1)
    continued = generate(model, full, attention_mask=mask, cache=first.cache)
    assert continued.tolist() == generate(model, full, attention_mask=mask).tolist()


def test_a_fork_takes_new_ids_only(model):
    text, question = random_ids(1, 2 * SEGMENT_SIZE + 3), random_ids(1, 4, seed=1)
    memory = model(text).cache.fork()
    answer = generate(model, question, cache=memory)[:, question.shape[1] :]
    full = torch.cat([text, question], dim=1)
    assert answer.tolist() == generate(model, full)[:, full.shape[1] :].tolist()


@pytest.mark.parametrize("columns", [4, LENGTHS[-1]], ids=["new ids only", "nothing new"])
def test_a_cache_that_is_no_fork_needs_the_full_ids(columns: int, model):
    text = random_ids(1, LENGTHS[-1])
    cache = model(text).cache
    with pytest.raises(ValueError, match=r"Pass all ids.*cache.fork\(\)"):
        generate(model, text[:, :columns], cache=cache)


def test_a_memory_answers_several_questions(model):
    text, questions = random_ids(1, 2 * SEGMENT_SIZE + 3), [random_ids(1, n, seed=n) for n in (3, 6)]
    memory = model(text).cache
    for question in questions:
        answer = generate(model, question, cache=memory.fork())[0, question.shape[1] :]
        assert answer.tolist() == greedy(model, torch.cat([text, question], dim=1)[0])


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_one_memory_serves_a_batch_of_questions(pad, model):
    text = random_ids(2 * SEGMENT_SIZE + 3)
    questions = [random_ids(n, seed=n) for n in (3, 1, 7)]
    ids, mask = pad(questions)
    memory = model(text[None]).cache.fork()
    answers = generate(model, ids, attention_mask=mask, cache=memory)[:, ids.shape[1] :]
    for answer, question in zip(answers, questions, strict=True):
        assert answer.tolist() == greedy(model, torch.cat([text, question]))


@pytest.mark.parametrize("mode", ["beams", "several samples"])
def test_one_memory_serves_beams_and_samples(mode: str, model):
    text, question = random_ids(1, 2 * SEGMENT_SIZE + 3), random_ids(1, 4, seed=1)
    memory = model(text).cache.fork()
    answers = generate(model, question, cache=memory, **MODES[mode])[:, question.shape[1] :]
    full = torch.cat([text, question], dim=1)
    assert answers.tolist() == generate(model, full, **MODES[mode])[:, full.shape[1] :].tolist()


def test_several_memories_serve_beams_when_repeated(model):
    texts, questions = random_ids(2, 2 * SEGMENT_SIZE + 3), random_ids(2, 4, seed=1)
    memory = model(texts).cache.fork()
    memory.batch_repeat_interleave(3)
    answers = generate(model, questions, cache=memory, num_beams=3)[:, questions.shape[1] :]
    full = torch.cat([texts, questions], dim=1)
    assert answers.tolist() == generate(model, full, num_beams=3)[:, full.shape[1] :].tolist()


# Settings that are meant for other caches


@pytest.mark.parametrize("given", [ARMTCache, lambda: None], ids=["cache", "no cache"])
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_a_prompt_is_read_in_segments_whatever_the_chunks_asked_for(how: str, given, model):
    ids, mask = pad_left([random_ids(2 * SEGMENT_SIZE + 3), random_ids(5)])
    asked = {"prefill_chunk_size": 3} if how == "argument" else {}
    config = GenerationConfig(prefill_chunk_size=3) if how == "configuration" else None
    output = generate(model, ids, attention_mask=mask, cache=given(), generation_config=config, **asked)
    assert output.tolist() == generate(model, ids, attention_mask=mask).tolist()


def test_a_conversation_goes_on_in_chunks(model):
    ids = random_ids(1, 2 * SEGMENT_SIZE + 3)
    cache = model(ids[:, : SEGMENT_SIZE + 2], use_cache=True).cache
    assert generate(model, ids, cache=cache, prefill_chunk_size=3).tolist() == generate(model, ids).tolist()


def test_a_row_of_padding_is_refused_in_chunks_too(model):
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="row 1 is all padding"):
        generate(model, random_ids(2, 3), attention_mask=mask, prefill_chunk_size=2)


@pytest.mark.parametrize("implementation", ["hybrid", "static", "sliding_window"])
def test_the_cache_of_the_backbones_own_settings_is_not_asked_for(implementation: str):
    backbone = tiny_backbone(FAMILIES["llama"])
    backbone.generation_config.cache_implementation = implementation
    backbone.generation_config.temperature = 0.5
    model = ARMTForCausalLM.from_backbone(backbone, segment_size=SEGMENT_SIZE, num_mem_tokens=3)
    assert generate(model, random_ids(1, 5)).shape == (1, 5 + NEW)
    assert model.generation_config.temperature == 0.5
    assert backbone.generation_config.cache_implementation == implementation


# What a recurrent memory cannot do is refused, with the reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"assistant_model": MODELS["llama"]}, "memory"),
        ({"prompt_lookup_num_tokens": 2}, "memory"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code"),  # not part of transformers any more
        ({"dola_layers": "low"}, "trust_remote_code"),
        ({"cache_implementation": "static"}, "constant size"),
        ({"cache_implementation": "offloaded"}, "constant size"),
        ({"cache_implementation": "quantized"}, "constant size"),
        ({"generation_config": GenerationConfig(cache_implementation="static")}, "constant size"),
        ({"cache": DynamicCache}, "ARMTCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_modes_are_refused(options: dict, reason: str, model):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=reason):
        generate(model, random_ids(1, 5), **options)


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(name: str, model):
    with pytest.raises(NotImplementedError, match="padded batch"):
        getattr(model, name)([[5, 6]])


def test_a_cache_of_another_number_of_rows_is_refused(model):
    cache = model(random_ids(3, 5)).cache
    with pytest.raises(ValueError, match="3 rows, the input 2"):
        model(random_ids(2, 5), cache=cache)
