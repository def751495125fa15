"""The attention of a diagonal: transformers' sdpa, on kernels that it names itself and nobody else notices."""

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, SEGMENT_SIZE, Family, add_memory, random_ids, tiny_backbone
from helpers import difference
from torch._subclasses import FakeTensorMode
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling_armt import cells_armt, diagonal_attention_armt
from modeling_armt.diagonal_attention_armt import attend, diagonal_attention


CAUSAL = torch.ones(32, 32).tril().bool()[None, None]
ADDED = torch.zeros(1, 4, 32, 32).masked_fill(~CAUSAL, -1e9) - 0.1 * torch.arange(32)


def tensors(key_heads: int = 2, length: int = 32, width: int = 16, **options) -> list[torch.Tensor]:
    """Query, key and value of three layers."""
    shapes = [(3, 2, heads, length, width) for heads in (4, key_heads, key_heads)]
    return [torch.randn(shape, **options) for shape in shapes]


class TestEqualsTheStockOne:
    @pytest.mark.parametrize("mask", [None, CAUSAL, ADDED], ids=["causal", "bool", "added"])
    @pytest.mark.parametrize("key_heads", [1, 2, 4])
    def test_results_and_gradients(self, mask: torch.Tensor | None, key_heads: int):
        torch.manual_seed(0)
        layer = SimpleNamespace(num_key_value_groups=4 // key_heads)
        inputs = [tensor.requires_grad_() for tensor in tensors(key_heads)]
        weight = torch.randn(3, 2, 32, 4, 16)

        def call(attention):
            return lambda *args: attention(layer, *args, mask, scaling=0.3)[0]

        fast = vmap(call(diagonal_attention))(*inputs)
        plain = torch.stack([call(sdpa_attention_forward)(*[tensor[i] for tensor in inputs]) for i in range(3)])
        assert difference(fast, plain) <= 1e-6
        expected, received = ([*torch.autograd.grad((y * weight).sum(), inputs)] for y in (plain, fast))
        assert all(difference(a, b) <= 1e-5 for a, b in zip(received, expected, strict=True))

    def test_autocast_casts_as_torch_does(self):
        query, key, value = (tensor[0] for tensor in tensors(4))
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = diagonal_attention(SimpleNamespace(), query, key.bfloat16(), value.bfloat16(), None)
        assert found.dtype == torch.bfloat16

    def test_what_it_does_not_know_is_refused(self):
        with pytest.raises(NotImplementedError, match="position_bias"):
            diagonal_attention(SimpleNamespace(), *tensors(), None, position_bias=torch.zeros(1))


class Operators(TorchDispatchMode):
    """Notes which attention is asked for."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(operator):
            self.name = str(operator).split("scaled_dot_product_")[1].split("_attention")[0]
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("gradients", "options", "mask", "kernel"),
    [
        (False, {}, None, "cudnn"),
        (True, {}, None, "flash"),
        (False, {"width": 256}, None, "flash"),
        (True, {"width": 256}, None, "efficient"),
        (False, {}, "added", "efficient"),
        (True, {}, "added", "efficient"),
        (True, {"length": 40}, None, "flash"),
        (True, {"length": 40}, "added", None),
        (False, {"length": 40}, "added", "efficient"),
        (False, {"width": 12}, None, None),
        (False, {"dtype": torch.float32}, None, "efficient"),
        (False, {"dtype": torch.float64}, None, None),
    ],
    ids=str,
)
def test_kernels_of_a_gpu(gradients: bool, options: dict, mask: str | None, kernel: str | None):
    """Which one takes a call, with the shapes that come back: torch knows them without a GPU."""
    options = {"dtype": torch.bfloat16, **options}
    with FakeTensorMode(), torch.no_grad(), Operators() as operators:
        inputs, operators.name = tensors(device="cuda", **options), None
        length = inputs[0].shape[-2]
        added = None if mask is None else torch.empty(1, 1, length, length, dtype=options["dtype"], device="cuda")
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(torch, "is_grad_enabled", lambda: gradients)  # a build for CPUs has no gradients of these
        with monkeypatch.context():
            output = vmap(lambda *args: attend(*args, added, 0.0, mask is None, None))(*inputs)
        monkeypatch.undo()
        assert output.shape == inputs[0].shape
        assert output.dtype == options["dtype"]
    assert operators.name == kernel  # the last resort is no operator, but products


class TestNobodyElseNotices:
    @torch.no_grad()
    def test_the_choice_of_kernels_of_the_process(self, monkeypatch):
        model = add_memory(tiny_backbone(FAMILIES["llama"]))
        forward, seen = cells_armt.LayerGroup.__call__, []

        def look(*args):
            backends = torch.backends.cuda
            names = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled")
            seen.append(tuple(getattr(backends, name)() for name in names))
            return forward(*args)

        monkeypatch.setattr(cells_armt.LayerGroup, "__call__", look)
        model(random_ids(1, 3 * SEGMENT_SIZE), schedule="diagonal")
        assert set(seen) == {(True, True, True)}

    @torch.no_grad()
    def test_the_attention_that_the_backbone_goes_on_to_call(self, monkeypatch):
        calls = []
        stock = diagonal_attention_armt.ALL_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setitem(
            diagonal_attention_armt.ALL_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            lambda *args, **kwargs: calls.append(1) or stock(*args, **kwargs),
        )
        model = add_memory(tiny_backbone(FAMILIES["llama"]))
        ids = random_ids(1, 3 * SEGMENT_SIZE)
        model(ids, schedule="diagonal")  # prepares, with the backbone's own layers
        calls.clear()
        model(ids, schedule="diagonal")
        assert not calls
        model(ids, schedule="sequential")
        assert calls
        assert model.config.text_config._attn_implementation == "sdpa"

    @torch.no_grad()
    def test_a_backbone_that_calls_torch_by_itself(self):
        family = Family("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2})
        model, ids = add_memory(tiny_backbone(family)), random_ids(1, 3 * SEGMENT_SIZE)
        assert difference(model(ids, schedule="diagonal").logits, model(ids, schedule="sequential").logits) <= 1e-9
