"""
Which segment a read leans on, exactly.

A memory's keys and denominators do not depend on A, and A is linear in the values that were written. So the writes of
a text can be replayed with other values: with the value of every memory token replaced by a one-hot of its segment's
number, the same read returns one weight for each segment instead of a vector.
"""

import torch

from ...memory_armt import ReadTerms, WriteTerms


class ReplayedWrites:
    """
    What A would be if other values had been written with the same keys.

    Args:
        like: features of the memory, for dtype, device and feature size K.
        width: C, the width of the values.
    """

    def __init__(self, like: torch.Tensor, width: int):
        self.A = like.new_zeros(like.shape[-1], width)

    def write(self, terms: WriteTerms, values: torch.Tensor) -> None:
        """
        Replays a write.

        Args:
            terms: of the real write of one row.
            values: `(m, C)`, what is written instead.
        """
        k, beta = terms.k[0], terms.beta[0]
        self.A = self.A + (beta * k).mT @ (values - self._recall(k, terms.denominator))

    def read(self, terms: ReadTerms) -> torch.Tensor:
        """`(P, C)`, what a real read of one row would have returned."""
        return self._recall(terms.q[0], terms.denominator)

    def _recall(self, query: torch.Tensor, denominator: torch.Tensor | None) -> torch.Tensor:
        answer = query @ self.A
        return answer if denominator is None else answer / denominator[0, :, None]


def one_hot_of_segment(number: int, like: WriteTerms, width: int) -> torch.Tensor:
    """`(m, C)` values that say which segment wrote them."""
    values = like.k.new_zeros(like.k.shape[1], width)
    values[:, number] = 1
    return values
