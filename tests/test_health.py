"""
The health of memories: every number of `cache.stats()` against its definition, the same on all ways to read a text,
and telling of the failures that it is there for.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, NUM_MEM_TOKENS, SEGMENT_SIZE, add_memory, random_ids, tiny_backbone, tiny_model
from helpers import pad_left, pad_right
from torch import nn

from modeling_armt import ARMTCache, ARMTForCausalLM, decode_armt
from modeling_armt.memory_armt import AssociativeMemory, MemoryState, expansion_bound
from modeling_armt.statistics_armt import LayerStatistics, summary


SEGMENTS = 6
LENGTH = SEGMENTS * SEGMENT_SIZE + 3
NEED_Z = ("min_denominator", "min_qz", "min_kz_ratio", "lambda_max", "lambda_last")
NOT_OF_STATE = ("mean_gamma", "zero_gamma_share", "max_read_ratio", "A_growth", *NEED_Z)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> ARMTForCausalLM:
    return tiny_model("llama")


# Every number is what its name says


class Definitions:
    """One row's numbers for one layer, from what its memory was given, by the equations and eigenvalues."""

    def __init__(self, memory: AssociativeMemory):
        self.memory, self.qz, self.ratios, self.kz, self.overlaps = memory, [], [], [], []
        self.gammas, self.eigenvalues, self.norms = [], [], []

    def phi(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return self.memory._features(linear(x))

    def read(self, x: torch.Tensor, state: MemoryState):
        q = self.phi(self.memory.memory_query, x[0])
        divisor = (q @ state.z[0] + 1e-5)[:, None]
        self.qz += divisor.flatten().tolist()
        self.ratios += ((q @ state.A[0] / divisor).norm(dim=-1) / x[0].norm(dim=-1)).tolist()

    def write(self, y: torch.Tensor, state: MemoryState, new: MemoryState, gamma: torch.Tensor):
        k, first = self.phi(self.memory.memory_key, y[0]), not self.norms
        beta = self.memory.memory_beta(y[0]).sigmoid()
        kz, energy = k @ state.z[0] + 1e-5, k.square().sum(-1)
        M = sum(b * torch.outer(key, key) / d for b, key, d in zip(beta, k, kz, strict=True))
        if not first:
            self.kz += kz.tolist()
            self.overlaps += (kz / energy).tolist()
            self.eigenvalues.append(torch.linalg.eigvals(M).real.max().item())
        self.gammas += gamma[0].tolist()
        self.norms.append(new.A[0].square().sum().sqrt().item())


@contextmanager
def defined(model: ARMTForCausalLM, layer: int) -> Iterator[Definitions]:
    """The definitions' numbers for what one layer's memory does."""
    memory = model.memory[str(layer)]
    found, (read, write) = Definitions(memory), (memory.read, memory.write)

    def reading(x, state):
        found.read(x, state)
        return read(x, state)

    def writing(y, state, first=None):
        new, terms = write(y, state, first)
        found.write(y, state, new, terms.gamma)
        return new, terms

    memory.read, memory.write = reading, writing
    try:
        yield found
    finally:
        del memory.read, memory.write


@pytest.mark.parametrize("layer", [0, 1])
def test_every_number_is_what_its_definition_says(layer: int, model):
    with defined(model, layer) as by_definition:
        cache = model(random_ids(1, LENGTH), use_cache=True, schedule="sequential").cache
    found = {name: values[0] for name, values in cache.stats()[layer].items()}
    d = by_definition
    assert len(d.norms) == SEGMENTS and len(d.gammas) == SEGMENTS * NUM_MEM_TOKENS
    assert len(d.qz) == (SEGMENTS - 1) * (SEGMENT_SIZE + NUM_MEM_TOKENS) + 3
    expected = {
        "A_norm": d.norms[-1],
        "min_qz": min(d.qz),
        "min_denominator": min(d.qz + d.kz),
        "min_kz_ratio": min(d.overlaps),
        "max_read_ratio": max(d.ratios),
        "mean_gamma": sum(d.gammas) / len(d.gammas),
        "zero_gamma_share": d.gammas.count(0) / len(d.gammas),
        "A_growth": 1000 * math.log2(d.norms[-1] / d.norms[1]) / (SEGMENTS - 2),  # marks: writes 1, 2 and 4
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name
    assert max(d.eigenvalues) <= found["lambda_max"] <= 1.05 * max(d.eigenvalues)
    assert d.eigenvalues[-1] <= found["lambda_last"] <= 1.05 * d.eigenvalues[-1]


@pytest.mark.parametrize(("tokens", "spread"), [(1, 1.0), (3, 0.0), (3, 0.3), (16, 0.3), (16, 1.0), (40, 1.0)])
def test_the_bound_of_lambda_holds_and_is_close(tokens: int, spread: float):
    generator = torch.Generator().manual_seed(0)
    k = torch.rand(50, 1, 24, generator=generator, dtype=torch.float64)
    k = (k + spread * torch.randn(50, tokens, 24, generator=generator, dtype=torch.float64)).relu()
    beta = torch.rand(50, tokens, 1, generator=generator, dtype=torch.float64)
    denominator = 0.05 + torch.rand(50, tokens, generator=generator, dtype=torch.float64)
    M = (beta / denominator[..., None] * k).mT @ k
    exact = torch.linalg.eigvals(M).real.amax(-1)
    bound = expansion_bound(k, beta, denominator)
    assert (bound >= exact * (1 - 1e-12)).all()
    assert (bound <= exact * (1 + 1e-9 if tokens == 1 or spread == 0 else 1.1)).all()


def test_a_key_without_features_does_not_spoil_the_bound():
    k = torch.zeros(1, 2, 4)
    assert expansion_bound(k, torch.ones(1, 2, 1), torch.full((1, 2), 1e-5)).tolist() == [0]
    k[0, 1, 0] = 1
    assert expansion_bound(k, torch.ones(1, 2, 1), torch.full((1, 2), 0.5)).tolist() == [2]


@pytest.mark.parametrize("growth", [0.98, 1.0, 1.02])
def test_growth_is_in_doublings_per_thousand_segments(growth: float, model):
    memory = model.memory["0"]
    state = memory.zero_state(1, "cpu")
    y = random_ids(1, NUM_MEM_TOKENS, seed=1)[..., None] * torch.ones(32, dtype=torch.float64)
    terms = memory.write(y, state)[1]
    statistics = LayerStatistics.new(1, state.A)
    for number in range(700):
        A = torch.full_like(state.A, 3 * growth**number)
        statistics = statistics.after_write(A, terms, None, None)
    expected = 1000 * math.log2(growth)
    assert summary(MemoryState(A, state.z), statistics)["A_growth"] == pytest.approx([expected], abs=1e-9)


# Every way to read a text


def token_by_token(model: ARMTForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> ARMTCache:
    cache = ARMTCache()
    for n in range(ids.shape[1]):
        model(ids[:, n : n + 1], attention_mask=mask[:, : n + 1], cache=cache)
    return cache


def sequential(model: ARMTForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> ARMTCache:
    return model(ids, attention_mask=mask, use_cache=True, schedule="sequential").cache


def diagonal(model: ARMTForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> ARMTCache:
    return model(ids, attention_mask=mask, use_cache=True, schedule="diagonal").cache


def diagonal_with_gradients(model: ARMTForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> ARMTCache:
    with torch.enable_grad():
        return diagonal(model, ids, mask)


def in_two_calls(model: ARMTForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> ARMTCache:
    half = ids.shape[1] // 2
    cache = diagonal(model, ids[:, :half], mask[:, :half])
    return model(ids[:, half:], attention_mask=mask, cache=cache, schedule="sequential").cache


def decode_step(model: ARMTForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> ARMTCache:
    cache = sequential(model, ids[:, :6], mask[:, :6])
    model.compile_armt()
    for n in range(6, ids.shape[1]):
        model(ids[:, n : n + 1], attention_mask=mask[:, n : n + 1], cache=cache)
    assert cache.lent_to is not None, "it did not go through the decode step"
    return cache


WAYS = [diagonal, diagonal_with_gradients, in_two_calls, token_by_token, decode_step]
MEMORIES = {
    "default": {},
    "paper": {"normalize_features": False, "gamma_eps": 1e-5},
    "no correction": {"correction": False},
    "no denominator": {"use_denom": False},
    "memory in one layer": {"memory_layers": [1]},
}


def same_numbers(found: dict, expected: dict, tolerance: float = 1e-8):
    assert found.keys() == expected.keys()
    for layer, values in expected.items():
        for name, value in values.items():
            assert found[layer][name] == (None if value is None else pytest.approx(value, rel=tolerance)), (
                layer,
                name,
            )


@pytest.fixture
def steps_on_the_cpu(monkeypatch):
    monkeypatch.setattr(decode_armt, "DEVICES", {"cpu"})
    monkeypatch.setattr(decode_armt, "COMPILES", False)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_way_to_read_finds_the_same(way, kind: str, steps_on_the_cpu):
    model = tiny_model("llama", **MEMORIES[kind])
    rows = [random_ids(length, seed=length) for length in (LENGTH, 3 * SEGMENT_SIZE, LENGTH - 5)]
    ids, mask = pad_right(rows)
    expected = sequential(model, ids, mask).stats()
    same_numbers(way(model, ids, mask).stats(), expected)


def test_collecting_breaks_no_graph(monkeypatch):
    compile_ = torch.compile
    whole = {"fullgraph": True, "backend": "aot_eager"}  # which raises at a break
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **{**options, **whole}))
    model, ids = tiny_model("llama"), random_ids(1, LENGTH)
    expected = sequential(model, ids, torch.ones_like(ids)).stats()
    same_numbers(diagonal(model.compile_armt(), ids, torch.ones_like(ids)).stats(), expected, 1e-6)


@pytest.mark.slow
def test_compiled_code_finds_the_same(steps_on_the_cpu, monkeypatch):
    monkeypatch.setattr(decode_armt, "COMPILES", True)
    model = tiny_model("llama")
    ids, mask = pad_right([random_ids(length, seed=length) for length in (LENGTH, 2 * SEGMENT_SIZE)])
    expected = sequential(model, ids, mask).stats()
    model.compile_armt()
    for way in (diagonal, decode_step):
        same_numbers(way(copy.deepcopy(model), ids, mask).stats(), expected, 1e-4)  # compiled code rounds more


# Rows, forks and files


def test_padding_never_counts(model):
    rows = [random_ids(length, seed=length) for length in (LENGTH, 3, SEGMENT_SIZE + 1, 4 * SEGMENT_SIZE)]
    ids, mask = pad_left(rows)
    together = sequential(model, ids, mask).stats()
    for number, row in enumerate(rows):
        alone = model(row[None], use_cache=True, schedule="sequential").cache.stats()
        for layer, values in together.items():
            mine = {name: value[number] for name, value in values.items()}
            if layer in alone:
                expected = {name: value[0] for name, value in alone[layer].items()}
                assert mine == {n: v if v is None else pytest.approx(v, rel=1e-8) for n, v in expected.items()}
            else:
                assert {mine[name] for name in NEED_Z} == {None}


def test_a_saved_memory_keeps_its_numbers(model, tmp_path):
    cache = model(random_ids(2, LENGTH), use_cache=True).cache
    model.save_memory(cache, tmp_path / "memory")
    assert model.load_memory(tmp_path / "memory").stats() == cache.stats()


# What there is nothing to say about


def test_without_denominator_what_needs_it_is_none():
    found = tiny_model("llama", use_denom=False)(random_ids(1, LENGTH), use_cache=True).cache.stats()[0]
    assert [found[name] for name in NEED_Z] == [None] * len(NEED_Z)
    assert found["max_read_ratio"][0] > 0 and found["zero_gamma_share"] == [0]


def test_after_the_first_write_nothing_was_divided_yet(model):
    found = model(random_ids(1, SEGMENT_SIZE), use_cache=True).cache.stats()[0]
    assert [found[name] for name in NEED_Z] == [[None]] * len(NEED_Z)
    assert found["max_read_ratio"] == found["A_growth"] == [None]
    assert found["mean_gamma"] == [1] and found["zero_gamma_share"] == [0]


def test_nothing_is_collected_in_training():
    model = tiny_model("llama").train()
    cache = model(random_ids(1, LENGTH), use_cache=True).cache
    assert cache.statistics == {}
    assert [cache.stats()[0][name] for name in NOT_OF_STATE] == [None] * len(NOT_OF_STATE)


def test_a_fresh_conversion_reads_nothing():
    backbone = tiny_backbone(FAMILIES["llama"])
    model = add_memory(backbone)
    for memory in model.memory.values():
        nn.init.zeros_(memory.memory_value.weight)
    found = model(random_ids(1, LENGTH), use_cache=True).cache.stats()[0]
    assert found["max_read_ratio"] == [0] and found["A_growth"] == [None]


# The failure that they are there for


def simulated(turned: bool, write_guard: bool, segments: int = 300, rows: int = 24) -> tuple[dict, dict]:
    """
    Health before and after the second half of a text whose memory tokens stand near one key each segment. With
    `turned` that key is another one, at right angles to the first, in the second half.
    """
    torch.manual_seed(0)
    hidden, tokens = 48, 10
    memory = AssociativeMemory(hidden, 16, write_guard=write_guard).double()
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = torch.linalg.qr(random(hidden, 2))[0].T * hidden**0.5  # at right angles
    nn.init.orthogonal_(memory.memory_key.weight, generator=torch.Generator().manual_seed(2))
    nn.init.normal_(memory.memory_value.weight, std=0.2, generator=torch.Generator().manual_seed(3))
    state = memory.zero_state(rows, "cpu")
    statistics, before = LayerStatistics.new(rows, state.A), None
    for number in range(2 * segments):
        y = means[int(turned and number >= segments)] + 0.5 * random(rows, tokens, hidden)
        first = torch.full((rows,), number == 0)
        state, terms = memory.write(y, state, first)
        statistics = statistics.after_write(state.A, terms, first, None)
        if number == segments - 1:
            before = summary(state, statistics)
    return before, summary(state, statistics)


def test_a_change_of_text_that_makes_a_memory_grow_shows():
    before, after = simulated(turned=True, write_guard=False)
    assert max(before["lambda_max"]) < 2
    blown_up = [norm > 1e3 * before["A_norm"][row] for row, norm in enumerate(after["A_norm"])]
    assert sum(blown_up) > len(blown_up) / 2
    for row in [row for row, blown in enumerate(blown_up) if blown]:
        assert before["A_growth"][row] < 5 < 20 < after["A_growth"][row]
        assert after["lambda_max"][row] > 2


def test_a_memory_without_a_change_of_text_stays_healthy():
    _, after = simulated(turned=False, write_guard=False)
    assert max(after["lambda_max"]) < 2
    assert max(map(abs, after["A_growth"])) < 5


def test_the_guard_keeps_a_memory_from_growing():
    before, after = simulated(turned=True, write_guard=True)
    assert max(after["A_growth"]) < 5
    assert all(norm < 10 * before["A_norm"][row] for row, norm in enumerate(after["A_norm"]))


def test_the_guard_changes_nothing_where_nothing_grows():
    assert simulated(turned=False, write_guard=True) == simulated(turned=False, write_guard=False)
