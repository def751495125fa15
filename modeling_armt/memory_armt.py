"""
The associative memory of one layer, in plain tensors (arXiv 2407.04841, section 2; delta rule and DPFP of
arXiv 2102.11174).

Shapes: B batch, P positions, m memory tokens, D hidden size, d `d_mem`, K = 2 * nu * d feature size; B may stand for
several dimensions, such as those of several layers. A memory is a matrix A (B, K, D) of associations and a vector
z (B, K) that normalises what is read from it:

    read   x <- x + (phi(Wq x) A) / (phi(Wq x) . z + eps)
    write  k = phi(Wk y),  v = Wv y,  beta = sigmoid(Wb y)               for the m memory tokens y of a segment
           v0 = (k A) / (k . z + eps)                                    what the memory answers to k now
           gamma = clip(1 - (k . z + eps) / (|k|^2 + gamma_eps), 0, 1)   how new the key is (the correction)
           A <- A + sum_m beta k (v - v0)^T,   z <- z + sum_m gamma k

With `memory_norm`, which is not in the papers either, x and y are normalised before they are projected: their entries
in a large model are of any size, and have so much in common that all keys and queries would lie together.

All m tokens of a write see the old A and z, and beta does not touch z. So a write takes A to (I - M) A and what it
stores, with M = sum_m beta k k^T / (k . z + eps), and A grows where M has eigenvalues above 2. The guard, which is not
in the papers, lowers beta where that would go on for ever (`_guarded`).

Features, products and the state are float32 (float64 for a float64 model), whatever the dtype of the backbone: over
thousands of writes bfloat16 loses the memory. One product, phi(q) A of a read, is bfloat16 in a bfloat16 backbone: its
result is added to a bfloat16 x, and no error of it stays in the memory.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


# That the guard lets M have: a little less than those with which A neither grows nor forgets.
MAX_EIGENVALUE = 1.9


class MemoryState(NamedTuple):
    """What one layer remembers. `z` is None for a memory without denominator."""

    A: torch.Tensor  # (B, K, D)
    z: torch.Tensor | None  # (B, K)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MemoryState":
        """The state with `function` applied to both tensors."""
        return MemoryState(function(self.A), None if self.z is None else function(self.z))

    def where(self, rows: torch.Tensor, other: "MemoryState") -> "MemoryState":
        """This state in the rows that the `(B,)` bool tensor marks, `other` in the rest."""
        A = torch.where(rows[..., None, None], self.A, other.A)
        return MemoryState(A, None if self.z is None else torch.where(rows[..., None], self.z, other.z))


class ReadTerms(NamedTuple):
    """What tells how a read went; for statistics and inspection."""

    q: torch.Tensor  # (B, P, K)
    answer: torch.Tensor  # (B, P, D), what was added to x
    denominator: torch.Tensor | None  # (B, P), q . z + eps; None without denominator


class WriteTerms(NamedTuple):
    """What tells how a write went; for statistics and inspection."""

    k: torch.Tensor  # (B, m, K)
    v: torch.Tensor  # (B, m, D)
    beta: torch.Tensor  # (B, m, 1)
    gamma: torch.Tensor  # (B, m), share of each key that was new to z
    denominator: torch.Tensor | None  # (B, m), k . z + eps before the write; None without denominator
    overlap: torch.Tensor | None  # (B, m), (k . z + eps) / (|k|^2 + gamma_eps), of which gamma is 1 less


def dpfp(u: torch.Tensor, nu: int) -> torch.Tensor:
    """
    Deterministic parameter-free projection (arXiv 2102.11174, equation 37): y = [relu(u), relu(-u)], then the products
    of y with itself rolled by 1 ... nu places.

    Args:
        u: `(..., d)`.
        nu: number of rolled copies.

    Returns:
        `(..., 2 * nu * d)`, all entries >= 0.
    """
    y = torch.cat([u.relu(), (-u).relu()], dim=-1)
    return torch.cat([y * y.roll(shift, dims=-1) for shift in range(1, nu + 1)], dim=-1)


def expansion_bound(k: torch.Tensor, beta: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """
    An upper bound of the largest eigenvalue of M = sum_m beta k k^T / (k . z + eps), usually 0 to 5% above it.

    The m x m matrix H with entries beta_j k_i . k_j / (k_j . z + eps) has the same eigenvalues, but for zeros, and no
    negative entry. So max_i (H x)_i / x_i is a bound for every positive x (Collatz-Wielandt); Gershgorin's, the
    largest sum of a row, is that for x = 1, and the one taken here, for x = H H 1, is at least as tight.

    Args:
        k: `(B, m, K)` features, all >= 0.
        beta: `(B, m, 1)`.
        denominator: `(B, m)`.

    Returns:
        `(B,)`.
    """
    rows, scaled = k.shape[:-2], beta / denominator[..., None] * k
    H = torch.bmm(k.flatten(0, -3), scaled.flatten(0, -3).mT)
    x = torch.bmm(H, H.sum(-1, keepdim=True))
    return (torch.bmm(H, x) / x.clamp(min=1e-30)).amax((-2, -1)).unflatten(0, rows)


def plain_dtype(linear: nn.Module) -> torch.dtype | None:
    """
    The dtype that a linear layer computes in, None for one whose weight does not tell: quantizers pack weights, or
    store them in 8 bits. Such a layer takes its input as the backbone's do.
    """
    weight = getattr(linear, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
    return weight.dtype if plain else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x / rms(x) * weight + bias over the last dimension, computed in float32 or more, in the dtype of `x`."""
    exact = x.to(torch.promote_types(weight.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)
    return (exact * weight + bias).to(x.dtype)


class MemoryNorm(nn.Module):
    """
    What is projected, on its own scale: [`rms_norm`] with a weight `(D,)`, and a bias `(1, D)` for all positions or
    `(m, D)` for each memory token.
    """

    def __init__(self, positions: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(positions, hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.bias)


class MemoryEquations:
    """
    Read and write. A subclass says how its norms and projections are applied, to one layer or to several, and has the
    constants `nu`, `normalize_features`, `gamma_eps`, `denom_eps`, `correction`, `use_denom`, `write_guard` and
    `state_dtype`.
    """

    def _features(self, u: torch.Tensor) -> torch.Tensor:
        features = dpfp(u, self.nu)
        return nn.functional.normalize(features, dim=-1, eps=1e-12) if self.normalize_features else features

    def read(self, x: torch.Tensor, state: MemoryState) -> tuple[torch.Tensor, ReadTerms]:
        """
        Adds to every position what the memory answers to it.

        Args:
            x: `(B, P, D)`, the input of the layer.
            state: the memory after the previous segment.

        Returns:
            The new layer input `(B, P, D)` in the dtype of `x`, and the terms of the read.
        """
        with torch.autocast(x.device.type, enabled=False):  # float32 also under mixed precision
            q = self._features(self._project(self.memory_query, self._normed(self.memory_read_norm, x)))  # (B, P, K)
            if x.dtype == torch.bfloat16:
                denominator = self._denominator(q, state)
                divided = q if denominator is None else q / denominator[..., None]
                answer = divided.to(x.dtype) @ state.A.to(x.dtype)
            else:
                answer, denominator = self._recall(q, state)
            answer = answer.to(x.device, x.dtype)
            return x + answer, ReadTerms(q, answer, denominator)

    def write(
        self, y: torch.Tensor, state: MemoryState, first: torch.Tensor | None = None
    ) -> tuple[MemoryState, WriteTerms]:
        """
        Stores the memory tokens of a segment.

        Args:
            y: `(B, m, D)`, the output of the layer at the memory tokens.
            state: the memory before the write.
            first: `(B,)` bool, rows that write for the first time, for which gamma is 1; None means no row does.

        Returns:
            The new state and the terms of the write.
        """
        with torch.autocast(y.device.type, enabled=False):
            y = self._normed(self.memory_write_norm, y)
            k = self._features(self._project(self.memory_key, y))  # (B, m, K)
            v = self._project(self.memory_value, y)  # (B, m, D)
            beta = self._project(self.memory_beta, y).sigmoid()  # (B, m, 1)

            known, denominator = self._recall(k, state)  # an empty memory knows 0
            gamma, overlap = k.new_ones(k.shape[:-1]), None
            if self.use_denom:
                overlap = (denominator / (k.square().sum(-1) + self.gamma_eps)).detach()
            if self.use_denom and self.correction:
                gamma = (1 - overlap).clamp(0, 1)
                if first is not None:
                    gamma = gamma.masked_fill(first[..., None], 1.0)
                if self.write_guard:
                    beta = self._guarded(beta, k, denominator, gamma)
            A = state.A + self._update(beta * k, v - known)
            z = state.z + (gamma[..., None] * k).sum(-2) if self.use_denom else None
            return MemoryState(A, z), WriteTerms(k, v, beta, gamma, denominator, overlap)

    def _guarded(
        self, beta: torch.Tensor, k: torch.Tensor, denominator: torch.Tensor, gamma: torch.Tensor
    ) -> torch.Tensor:
        """
        beta `(B, m, 1)`, smaller for tokens whose gamma is 0 where these alone would let A grow: several similar keys
        that meet a k . z which is too small for all of them together. z takes nothing of them, so that it would stay
        like that, and A would grow without end. Everywhere else beta is what it was, to the bit.
        """
        with torch.no_grad():
            frozen = (gamma == 0)[..., None]
            bound = expansion_bound(k * frozen, beta, denominator)
            scale = (MAX_EIGENVALUE / bound).clamp(max=1)[..., None, None]
        return torch.where(frozen, beta * scale, beta)

    def _answer(self, query: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """query A `(B, P, D)` for `(B, P, K)` queries."""
        return query @ A

    def _update(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """sum_m k v^T `(B, K, D)` of `(B, m, K)` keys and `(B, m, D)` values."""
        return k.mT @ v

    def _denominator(self, query: torch.Tensor, state: MemoryState) -> torch.Tensor | None:
        """query . z + eps `(B, P)` for `(B, P, K)` queries."""
        if not self.use_denom:
            return None
        return self._answer(query, state.z[..., None]).squeeze(-1) + self.denom_eps

    def _recall(self, query: torch.Tensor, state: MemoryState) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(query A) / (query . z + eps) for `(B, P, K)` queries, and the `(B, P)` denominators."""
        answer, denominator = self._answer(query, state.A), self._denominator(query, state)
        return answer if denominator is None else answer / denominator[..., None], denominator


class AssociativeMemory(MemoryEquations, nn.Module):
    """
    The projections of one layer's memory and its two operations. It holds no state: `read` and `write` take a
    [`MemoryState`] and return what follows from it, so one module serves any number of texts at once.

    Args:
        hidden_size: D.
        d_mem: d, width of queries and keys before the feature map.
        nu, normalize_features: the feature map phi, DPFP, L2-normalised or not.
        gamma_eps, denom_eps: the two epsilons of the equations above.
        correction: with False gamma is 1, and z grows with every write.
        use_denom: with False reads and v0 are not divided, and there is no z.
        write_guard: keep the eigenvalues of M, of tokens whose gamma is 0, below `MAX_EIGENVALUE`.
        memory_norm: normalise what is projected.
        num_mem_tokens: m; only norms look at it.
    """

    def __init__(
        self,
        hidden_size: int,
        d_mem: int,
        nu: int = 3,
        normalize_features: bool = True,
        gamma_eps: float = 0.0,
        denom_eps: float = 1e-5,
        correction: bool = True,
        use_denom: bool = True,
        write_guard: bool = True,
        memory_norm: bool = False,
        num_mem_tokens: int = 1,
    ):
        super().__init__()
        self.feature_size = 2 * nu * d_mem
        self.nu = nu
        self.normalize_features = normalize_features
        self.gamma_eps = gamma_eps
        self.denom_eps = denom_eps
        self.correction = correction
        self.use_denom = use_denom
        self.write_guard = write_guard
        self.memory_norm = memory_norm
        # Names that no backbone uses, so that adapters aimed at the backbone's q_proj, k_proj, ... leave them alone.
        self.memory_query = nn.Linear(hidden_size, d_mem, bias=False)
        self.memory_key = nn.Linear(hidden_size, d_mem, bias=False)
        self.memory_value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.memory_beta = nn.Linear(hidden_size, 1)
        self.memory_read_norm = MemoryNorm(1, hidden_size) if memory_norm else None
        self.memory_write_norm = MemoryNorm(num_mem_tokens, hidden_size) if memory_norm else None

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(plain_dtype(self.memory_query) or torch.float32, torch.float32)

    @property
    def device(self) -> torch.device | None:
        """Where states live; None if that is where the layer runs, since the weights are offloaded or out of sight."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return None if tensor is None or tensor.is_meta else tensor.device

    def zero_state(self, batch_size: int, device: torch.device | str) -> MemoryState:
        """An empty memory: every read from it is exactly 0."""
        A = torch.zeros(
            batch_size, self.feature_size, self.memory_value.out_features, dtype=self.state_dtype, device=device
        )
        return MemoryState(A, A.new_zeros(batch_size, self.feature_size) if self.use_denom else None)

    def _normed(self, norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
        return x if norm is None else norm(x)

    def _project(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(x.to(plain_dtype(linear) or x.dtype)).to(self.state_dtype)
