"""The associative memory of one layer against its equations, written out per row, token and feature."""

import itertools
import math

import pytest
import torch
from torch import nn

from modeling_armt.configuration_armt import VARIANTS
from modeling_armt.memory_armt import MAX_EIGENVALUE, AssociativeMemory, MemoryState, dpfp


HIDDEN, D_MEM, TOKENS, ROWS = 6, 3, 2, 2


class Reference:
    """One row's memory in Python floats: the equations of the module's docstring, and nothing else."""

    def __init__(self, memory: AssociativeMemory):
        self.memory = memory
        self.weights = {name: parameter.tolist() for name, parameter in memory.named_parameters()}
        self.A = [[0.0] * HIDDEN for _ in range(memory.feature_size)]
        self.z = [0.0] * memory.feature_size
        self.written = False

    def project(self, name: str, x: list[float]) -> list[float]:
        return [sum(w * value for w, value in zip(row, x, strict=True)) for row in self.weights[f"{name}.weight"]]

    def normed(self, name: str, x: list[float], number: int = 0) -> list[float]:
        if not self.memory.memory_norm:
            return x
        size = math.sqrt(sum(value**2 for value in x) / len(x) + 1e-6)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"][number]
        return [w * value / size + b for w, value, b in zip(weight, x, bias, strict=True)]

    def phi(self, u: list[float]) -> list[float]:
        y = [max(value, 0.0) for value in u] + [max(-value, 0.0) for value in u]
        features = [y[i] * y[i - shift] for shift in range(1, self.memory.nu + 1) for i in range(len(y))]
        if not self.memory.normalize_features:
            return features
        norm = math.sqrt(sum(value**2 for value in features))
        return [value / max(norm, 1e-12) for value in features]

    def recall(self, feature: list[float]) -> list[float]:
        answer = [sum(f * row[i] for f, row in zip(feature, self.A, strict=True)) for i in range(HIDDEN)]
        denominator = self.denominator(feature) if self.memory.use_denom else 1.0
        return [value / denominator for value in answer]

    def denominator(self, feature: list[float]) -> float:
        return sum(f * value for f, value in zip(feature, self.z, strict=True)) + self.memory.denom_eps

    def read(self, x: list[float]) -> list[float]:
        if not self.written:
            return x
        query = self.project("memory_query", self.normed("memory_read_norm", x))
        return [a + b for a, b in zip(x, self.recall(self.phi(query)), strict=True)]

    def write(self, tokens: list[list[float]]) -> list[float]:
        """Returns the gammas."""
        A, z, gammas = [list(row) for row in self.A], list(self.z), []
        for number, y in enumerate(tokens):
            y = self.normed("memory_write_norm", y, number)
            k, v = self.phi(self.project("memory_key", y)), self.project("memory_value", y)
            beta = 1 / (1 + math.exp(-self.project("memory_beta", y)[0] - self.weights["memory_beta.bias"][0]))
            gamma = 1.0
            known = self.recall(k) if self.written else [0.0] * HIDDEN
            if self.written and self.memory.correction and self.memory.use_denom:
                energy = sum(f**2 for f in k) + self.memory.gamma_eps
                gamma = 1 - self.denominator(k) / energy if energy else -math.inf
                gamma = min(max(gamma, 0.0), 1.0)
            for i, feature in enumerate(k):
                z[i] += gamma * feature
                for j in range(HIDDEN):
                    A[i][j] += beta * feature * (v[j] - known[j])
            gammas.append(gamma)
        self.A, self.z, self.written = A, z, True
        return gammas


def make_memory(dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> AssociativeMemory:
    torch.manual_seed(seed)
    memory = AssociativeMemory(HIDDEN, D_MEM, num_mem_tokens=TOKENS, **options)
    for parameter in memory.parameters():
        nn.init.normal_(parameter, std=0.5)
    return memory.to(dtype)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def write_often(memory: AssociativeMemory, times: int, rows: int = ROWS, dtype: torch.dtype = torch.float64):
    """The states after each of some writes, the empty one first."""
    states = [memory.zero_state(rows, "cpu")]
    for number in range(times):
        first = torch.full((rows,), number == 0)
        states.append(memory.write(tokens(rows, TOKENS, seed=number, dtype=dtype), states[-1], first)[0])
    return states


def test_dpfp_multiplies_each_half_rectified_entry_with_its_neighbours():
    # y = relu([1, -2, -1, 2]) = [1, 0, 0, 2]; rolled by one [2, 1, 0, 0], by two [0, 2, 1, 0], by three [0, 0, 2, 1]
    assert dpfp(torch.tensor([1.0, -2.0]), 3).tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("nu", [1, 2, 3])
@pytest.mark.parametrize(("correction", "use_denom"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_reads_and_writes_follow_the_equations(norm: bool, variant: str, correction: bool, use_denom: bool, nu: int):
    memory = make_memory(nu=nu, correction=correction, use_denom=use_denom, memory_norm=norm, **VARIANTS[variant])
    state, rows = memory.zero_state(ROWS, "cpu"), [Reference(memory) for _ in range(ROWS)]
    for number in range(4):
        x, y = tokens(ROWS, 3, seed=10 + number), tokens(ROWS, TOKENS, seed=number)
        expected = torch.tensor([[row.read(p) for p in x[b].tolist()] for b, row in enumerate(rows)], dtype=x.dtype)
        torch.testing.assert_close(memory.read(x, state)[0], expected, rtol=1e-9, atol=1e-9)
        state, terms = memory.write(y, state, first=torch.full((ROWS,), number == 0))
        gammas = [row.write(y[b].tolist()) for b, row in enumerate(rows)]
        torch.testing.assert_close(terms.gamma, torch.tensor(gammas, dtype=x.dtype), rtol=1e-9, atol=1e-9)
        A, z = torch.tensor([r.A for r in rows], dtype=x.dtype), torch.tensor([r.z for r in rows], dtype=x.dtype)
        torch.testing.assert_close(state.A, A, rtol=1e-9, atol=1e-9)
        if use_denom:
            torch.testing.assert_close(state.z, z, rtol=1e-9, atol=1e-9)
        else:
            assert state.z is None


@pytest.mark.parametrize("use_denom", [True, False])
@torch.no_grad()
def test_an_empty_memory_answers_exactly_nothing(use_denom: bool):
    memory, x = make_memory(use_denom=use_denom), tokens(ROWS, 5)
    assert torch.equal(memory.read(x, memory.zero_state(ROWS, "cpu"))[0], x)


@torch.no_grad()
def test_a_fresh_memory_answers_exactly_nothing_after_writes():
    memory, x = make_memory(), tokens(ROWS, 5)
    memory.memory_value.weight.zero_()  # as a new conversion has it
    for state in write_often(memory, times=3):
        assert torch.equal(memory.read(x, state)[0], x)


@torch.no_grad()
def test_only_rows_that_write_first_have_gamma_one():
    memory = make_memory()
    state = write_often(memory, times=2)[-1]
    gamma = memory.write(tokens(ROWS, TOKENS, seed=0), state, first=torch.tensor([True, False]))[1].gamma
    assert gamma[0].tolist() == [1] * TOKENS
    assert gamma[1].max() < 1e-6  # these keys are known


@torch.no_grad()
def test_rows_do_not_meet():
    memory, x = make_memory(), tokens(ROWS, 4)
    state = write_often(memory, times=3)[-1]
    together = memory.write(x, state)[0]
    for row in range(ROWS):
        mine = slice(row, row + 1)
        alone = memory.write(x[mine], state.map(lambda t, mine=mine: t[mine]))[0]
        torch.testing.assert_close(alone.A, together.A[mine], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.z, together.z[mine], rtol=0, atol=1e-12)


@torch.no_grad()
def test_where_takes_marked_rows_from_the_first_state():
    old, new = write_often(make_memory(), times=2)[1:]
    mixed = new.where(torch.tensor([True, False]), old)
    assert torch.equal(mixed.A, torch.stack([new.A[0], old.A[1]]))
    assert torch.equal(mixed.z, torch.stack([new.z[0], old.z[1]]))


KEY, OTHER_KEY = [1.0, 2.0, 0.5], [-1.0, -0.5, -2.0]  # no common feature: one has no negative entries, one only such


def memory_of_pairs(**options) -> AssociativeMemory:
    """The first half of a token is its key, the second its value, and every write is done in full (beta = 1)."""
    memory = AssociativeMemory(HIDDEN, D_MEM, **options).double()
    both = torch.eye(HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        memory.memory_query.weight.copy_(both[:D_MEM])
        memory.memory_key.weight.copy_(both[:D_MEM])
        memory.memory_value.weight.copy_(torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])))
        memory.memory_beta.weight.zero_()
        memory.memory_beta.bias.fill_(50.0)
    return memory


@torch.no_grad()
def remember(memory: AssociativeMemory, *pairs: tuple[list[float], list[float]]) -> MemoryState:
    """The state after one write for each (key, value)."""
    state = memory.zero_state(1, "cpu")
    for number, (key, value) in enumerate(pairs):
        token = torch.tensor([[[*key, *value]]], dtype=torch.float64)
        state = memory.write(token, state, first=torch.tensor([number == 0]))[0]
    return state


@torch.no_grad()
def answer(memory: AssociativeMemory, state: MemoryState, key: list[float]) -> list[float]:
    x = torch.tensor([[[*key, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    return (memory.read(x, state)[0] - x)[0, 0, D_MEM:].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stored_value_is_read_back(variant: str):
    memory = memory_of_pairs(**VARIANTS[variant])
    state = remember(memory, (KEY, [1.0, 2.0, 3.0]), (OTHER_KEY, [7.0, 8.0, 9.0]))
    assert answer(memory, state, KEY) == pytest.approx([1.0, 2.0, 3.0], rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewriting_a_key_replaces_its_value(variant: str):
    memory = memory_of_pairs(**VARIANTS[variant])
    state = remember(memory, (KEY, [1.0, 2.0, 3.0]), (KEY, [-4.0, 5.0, 0.0]))
    assert answer(memory, state, KEY) == pytest.approx([-4.0, 5.0, 0.0], abs=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewriting_a_key_leaves_others_alone(variant: str):
    memory = memory_of_pairs(**VARIANTS[variant])
    before = remember(memory, (OTHER_KEY, [7.0, 8.0, 9.0]), (KEY, [1.0, 2.0, 3.0]))
    after = remember(memory, (OTHER_KEY, [7.0, 8.0, 9.0]), (KEY, [1.0, 2.0, 3.0]), (KEY, [-4.0, 5.0, 0.0]))
    assert answer(memory, after, OTHER_KEY) == pytest.approx(answer(memory, before, OTHER_KEY), abs=1e-9)


def test_without_correction_rewriting_a_key_dilutes_it():
    memory = memory_of_pairs(correction=False)
    state = remember(memory, (KEY, [1.0, 2.0, 3.0]), (KEY, [1.0, 2.0, 3.0]))
    assert answer(memory, state, KEY) == pytest.approx([0.5, 1.0, 1.5], rel=1e-3)


@pytest.mark.parametrize("options", [*VARIANTS.values(), {"use_denom": False}, {"memory_norm": True}], ids=str)
def test_gradients_reach_all_projections(options: dict):
    memory = make_memory(**options)
    state = write_often(memory, times=2)[-1]
    memory.read(tokens(ROWS, 3, seed=5), state)[0].square().sum().backward()
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_reach_the_first_of_many_writes():
    memory = make_memory()
    y = tokens(ROWS, TOKENS).requires_grad_()
    state = memory.write(y, memory.zero_state(ROWS, "cpu"), torch.tensor([True, True]))[0]
    for number in range(1, 5):
        state = memory.write(tokens(ROWS, TOKENS, seed=number), state)[0]
    memory.read(tokens(ROWS, 3, seed=9), state)[0].square().sum().backward()
    assert y.grad.abs().amin(dim=(1, 2)).min() > 0


def test_gamma_carries_no_gradient():
    memory = make_memory()
    state = write_often(memory, times=2)[-1]
    gamma = memory.write(tokens(ROWS, TOKENS, seed=7), state)[1].gamma
    assert 0 < gamma.max() < 1  # neither end of the clip, where there would be no gradient anyway
    assert not gamma.requires_grad


@pytest.mark.parametrize(
    ("module", "state"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_state_is_float32_or_better(module: torch.dtype, state: torch.dtype):
    last = write_often(make_memory(module), times=2, dtype=module)[-1]
    assert (last.A.dtype, last.z.dtype) == (state, state)


@torch.no_grad()
def test_a_read_returns_the_dtype_of_the_layer_input():
    memory = make_memory(torch.float32)
    state = write_often(memory, times=2, dtype=torch.float32)[-1]
    assert memory.read(tokens(ROWS, 3, dtype=torch.bfloat16), state)[0].dtype == torch.bfloat16


@torch.no_grad()
def test_autocast_does_not_touch_the_memory():
    memory = make_memory(torch.float32)
    x, expected = tokens(ROWS, 3, dtype=torch.float32), write_often(memory, times=3, dtype=torch.float32)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        state = write_often(memory, times=3, dtype=torch.float32)[-1]
        read = memory.read(x, state)[0]
    assert torch.equal(state.A, expected.A)
    assert torch.equal(state.z, expected.z)
    assert torch.equal(read, memory.read(x, expected)[0])


class Packed(nn.Module):
    """A quantizer's linear: codes and scales instead of a weight, in float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def unpacked(self) -> torch.Tensor:
        return self.codes * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


class OutOfSight(nn.Module):
    """One whose weight is a method, on what is no tensor of the module."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts = [linear.weight.detach().clone(), linear.bias]

    def weight(self) -> torch.Tensor:
        return self.parts[0]

    unpacked = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, *self.parts)


class StoredInEightBits(nn.Linear):
    """One that computes in the dtype of its input, whatever it is stored in."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn))
        self.bias = linear.bias

    def unpacked(self) -> torch.Tensor:
        return self.weight.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


@pytest.mark.parametrize("kind", [Packed, OutOfSight, StoredInEightBits])
@torch.no_grad()
def test_projections_may_be_layers_whose_weight_does_not_tell_their_dtype(kind):
    plain, quantized = make_memory(torch.float32), make_memory(torch.float32)
    for name, linear in list(plain.named_children()):
        setattr(quantized, name, kind(linear))
        linear.weight.copy_(getattr(quantized, name).unpacked())
    found, expected = (write_often(memory, times=3, dtype=torch.float32)[-1] for memory in (quantized, plain))
    assert torch.equal(found.A, expected.A) and torch.equal(found.z, expected.z)
    x = tokens(ROWS, 3, dtype=torch.float32)
    assert torch.equal(quantized.read(x, found)[0], plain.read(x, expected)[0])
    assert quantized.device == (None if kind is OutOfSight else torch.device("cpu"))


@torch.no_grad()
def test_float32_is_enough_for_a_thousand_writes():
    memory = make_memory(torch.float32)
    single = write_often(memory, times=1000, rows=1, dtype=torch.float32)[-1]
    double = write_often(memory.double(), times=1000, rows=1, dtype=torch.float32)[-1]
    assert double.A.dtype == torch.float64
    assert (single.A - double.A).norm() / double.A.norm() < 1e-6
    assert (single.z - double.z).norm() / double.z.norm() < 1e-6


# The guard


def write_one_key(tokens: int, known: float, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """beta of equal memory tokens that meet k . z of `known` times |k|^2, without and with the guard."""
    betas = []
    for write_guard in (False, True):
        memory = make_memory(write_guard=write_guard, **options)
        nn.init.constant_(memory.memory_beta.weight, 0)
        nn.init.constant_(memory.memory_beta.bias, 3.0)
        y = torch.ones(1, tokens, HIDDEN, dtype=torch.float64)
        k = memory.write(y, memory.zero_state(1, "cpu"))[1].k[:, 0]
        state = MemoryState(torch.ones(1, memory.feature_size, HIDDEN, dtype=torch.float64), known * k)
        betas.append(memory.write(y, state)[1].beta[0, :, 0])
    return betas[0], betas[1]


@pytest.mark.parametrize(("tokens", "known"), [(1, 1.1), (2, 1.1), (3, 2.0)])
def test_the_guard_leaves_writes_alone_that_cannot_grow(tokens: int, known: float):
    plain, guarded = write_one_key(tokens, known)
    assert torch.equal(plain, guarded)


@pytest.mark.parametrize("tokens", [3, 8])
def test_the_guard_bounds_the_eigenvalue_of_keys_that_z_knows(tokens: int):
    plain, guarded = write_one_key(tokens, known=1.1)
    assert plain.sum() / 1.1 > 2  # M = sum_m beta k k^T / (k . z) has no other eigenvalue
    assert (guarded.sum() / 1.1).item() == pytest.approx(MAX_EIGENVALUE, rel=1e-4)


def test_the_guard_leaves_keys_alone_that_z_takes_in():
    """What was too small for them is not after this write."""
    plain, guarded = write_one_key(tokens=8, known=0.5)
    assert torch.equal(plain, guarded)


def test_the_guard_leaves_a_memory_alone_that_does_not_divide_by_what_it_knows():
    for options in ({"correction": False}, {"use_denom": False}):
        plain, guarded = write_one_key(8, known=1.1, **options)
        assert torch.equal(plain, guarded)
