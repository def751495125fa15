"""
Truncated backpropagation through time, in memory that does not grow with the text.

Autograd would keep every window of a text alive until somebody calls `backward` on the sum of their losses. Since no
gradient crosses a window's border, a window can be differentiated as soon as it is read, and forgotten.
"""

from collections.abc import Iterator

import torch


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradients are known already: zero where there is none."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, gradients: list[torch.Tensor | None], *parameters: torch.Tensor):
        ctx.gradients, ctx.parameters = gradients, parameters
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        pairs = zip(ctx.gradients, ctx.parameters, strict=True)
        return None, None, *(torch.zeros_like(p) if g is None else g * grad_output.to(g) for g, p in pairs)


def zero_loss(parameters: list[torch.Tensor]) -> torch.Tensor:
    """A loss of exactly 0, whose gradients at all parameters are exactly 0, whatever is in them."""
    return _LossWithGradients.apply(torch.zeros(()), [None] * len(parameters), *parameters)


def truncated_loss(windows: Iterator[torch.Tensor], parameters: list[torch.Tensor]) -> torch.Tensor:
    """
    Sums the losses of windows that share no graph.

    Args:
        windows: computes one window's loss after the other.
        parameters: what receives gradients.

    Returns:
        The sum; its `backward` hands out the gradients, which are there already.

    Raises:
        RuntimeError: if a loss depends on none of the parameters (as when a wrapper keeps them elsewhere).
    """
    total: torch.Tensor | float = 0.0
    gradients: list[torch.Tensor | None] = [None] * len(parameters)
    for loss in windows:
        if loss.requires_grad:
            new = torch.autograd.grad(loss, parameters, allow_unused=True)
            if all(gradient is None for gradient in new):
                raise RuntimeError("bptt_segments found no parameter to train; leave it out with this wrapper.")
            pairs = zip(gradients, new, strict=True)
            gradients = [b if a is None else a if b is None else a + b for a, b in pairs]
        total = total + loss.detach()
    return _LossWithGradients.apply(total, gradients, *parameters)
