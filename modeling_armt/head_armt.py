"""The backbone's own head as a function of hidden states, whatever it does there (softcap, scaling, projections)."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast


class _GivenStates(nn.Module):
    """Stands in for the backbone's body in front of its head, and passes given hidden states on to it."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.__dict__["body"] = body  # not as a submodule

    def __getattr__(self, name: str):  # some heads read a scale off the body
        return getattr(self.__dict__["body"], name)

    def forward(self, *args, inputs_embeds: torch.Tensor, **kwargs):
        return _AnyOutput(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> nn.Module:  # opt's head looks for the body one level down
        return self


class _AnyOutput(BaseModelOutputWithPast):
    """An output without any of the extras that a family's head may hand on (router logits, cross attentions, ...)."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def run_head(backbone: PreTrainedModel, decoder_name: str, hidden: torch.Tensor) -> torch.Tensor:
    """
    Runs what a causal language model does after its body.

    A shallow copy of the backbone runs its own forward, with the hidden states in place of the body: the backbone
    itself is not touched, so threads do not meet.

    Args:
        backbone: a causal language model.
        decoder_name: the name of its body.
        hidden: `(B, L, D)`, the body's last hidden states.

    Returns:
        Logits, `(B, L, vocabulary)`.
    """
    head = copy.copy(backbone)
    head._modules = {**backbone._modules, decoder_name: _GivenStates(getattr(backbone, decoder_name))}
    # The class's forward: an instance may carry one that is bound to the original (accelerate's device hooks).
    return type(backbone).forward(head, inputs_embeds=hidden, use_cache=False, return_dict=True).logits
