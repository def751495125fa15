"""Distillation on short text: training to remember shall not cost what the backbone could do before."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from ..checkpoints import armt_model, backbone_only


class Teacher:
    """
    The untouched backbone. Beside adapters it is the model's own without them, otherwise a copy.

    Args:
        model: before it is trained.
    """

    def __init__(self, model: nn.Module):
        self.model, self.copy = model, None
        if not isinstance(model, PeftModel):
            self.copy = copy.deepcopy(armt_model(model).model).requires_grad_(False).eval()

    @contextmanager
    def backbone(self) -> Iterator[nn.Module]:
        if self.copy is not None:
            yield self.copy.to(self.model.device)
            return
        with backbone_only(self.model) as backbone:
            training = backbone.training
            yield backbone.eval()
            backbone.train(training)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`(B, T, vocabulary)` for `(B, T)` ids."""
        with self.backbone() as backbone:
            return backbone(ids, use_cache=False).logits


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence of `(B, T, vocabulary)` logits from those of the teacher, mean over tokens."""
    student, teacher = (logits.float().flatten(0, 1).log_softmax(-1) for logits in (student, teacher))
    return nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
