"""The model without its head: every way to it reads with memory, and is the model itself under another class."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from families import SEGMENT_SIZE, random_ids, tiny_model
from helpers import CHECKPOINTING, enable_checkpointing
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from modeling_armt import ARMTForCausalLM, ARMTModel


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

IDS = random_ids(2, 3 * SEGMENT_SIZE + 2)
ROUTES = {
    "base_model": lambda model: model.base_model,
    "base_model_prefix": lambda model: getattr(model, model.base_model_prefix),
    "get_decoder": lambda model: model.get_decoder(),
    "through PEFT": lambda model: getattr(adapted(model), model.base_model_prefix),
    "beneath PEFT": lambda model: adapted(model).get_base_model().base_model,
    "without head already": lambda model: model.base_model.base_model.get_decoder(),
    "get_encoder": lambda model: model.base_model.get_encoder(),
}


def adapted(model: ARMTForCausalLM) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.fixture
def model() -> ARMTForCausalLM:
    return tiny_model("llama")


@pytest.mark.parametrize("route", ROUTES)
@torch.no_grad()
def test_every_way_reads_with_memory(model, route):
    expected = model(IDS).logits
    headless = ROUTES[route](model)
    assert isinstance(headless, ARMTModel)
    assert_close(model.get_output_embeddings()(headless(IDS).last_hidden_state), expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_embeddings_alone_are_no_other_way(model):
    """What takes its decoder by name, to put another there, would take the memory's hooks away."""
    with pytest.raises(NotImplementedError, match="belong to the memory"):
        model.set_decoder(model.decoder)


class TestOneModel:
    def test_is_the_same_every_time(self, model):
        assert model.base_model is model.base_model is model.get_decoder()
        assert copy.copy(model).base_model is not model.base_model

    @pytest.mark.parametrize("change", [
        lambda model: model.train(), lambda model: enable_checkpointing(model), lambda model: model.compile_armt(),
        lambda model: model.requires_grad_(False), lambda model: model.to(torch.float32),
        lambda model: model.resize_token_embeddings(70), lambda model: model.set_attn_implementation("eager"),
        lambda model: setattr(model, "memory_tokens", nn.Embedding(3, 32)),
    ])  # fmt: skip
    def test_what_is_done_to_it_is_done_to_the_model(self, change: Callable[[nn.Module], object]):
        """The same as if it had been done to the model."""

        def facts(model: ARMTForCausalLM) -> list:
            state = [model.training, getattr(model, f"is_{CHECKPOINTING}"), model.fast.enabled, model.dtype]
            state += [model.config._attn_implementation, model.model.config._attn_implementation]
            sizes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
            return [*state, sizes, [module.training for module in model.modules()]]

        by_model, by_headless = tiny_model("llama"), tiny_model("llama")
        before = facts(by_model)
        change(by_model)
        change(by_headless.base_model)
        assert facts(by_headless) == facts(by_model) == facts(by_headless.base_model) != before

    def test_gradient_checkpointing_has_an_effect(self, model, monkeypatch):
        enable_checkpointing(model.base_model.train())
        calls, checkpoint = [], model._gradient_checkpointing_func
        monkeypatch.setattr(
            model, "_gradient_checkpointing_func", lambda *args: calls.append(1) or checkpoint(*args), raising=False
        )
        model.base_model(IDS, use_cache=False).last_hidden_state.sum().backward()
        assert len(calls) >= 4

    def test_a_forward_in_place_of_the_models_is_not_its(self, model):
        expected = model.base_model(IDS).last_hidden_state
        model.forward = lambda *args, **kwargs: model.base_model(*args, **kwargs).last_hidden_state
        assert torch.equal(model(IDS), expected)
        with pytest.raises(AttributeError):
            model.base_model.forward = model.forward

    def test_a_compiled_call_of_the_models_is_not_its(self, model):
        model._compiled_call_impl = lambda *args, **kwargs: "compiled"
        assert model(IDS) == "compiled"
        assert model.base_model(IDS).last_hidden_state.shape[:2] == IDS.shape
        with pytest.raises(AttributeError, match="compile that"):
            model.base_model.compile()

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @torch.no_grad()
    def test_a_copy_stands_alone(self, model, again):
        expected = model.base_model(IDS).last_hidden_state
        model.forward = None
        other = again(model.base_model)
        assert type(other) is ARMTModel
        model.memory_tokens.weight.zero_()
        assert torch.equal(other(IDS).last_hidden_state, expected)

    def test_it_saves_the_same_checkpoint(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        model.base_model.save_pretrained(tmp_path / "headless")
        ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "headless"))
        assert_close(theirs, ours, atol=0, rtol=0)
        for cls in (ARMTModel, ARMTForCausalLM):
            again = cls.from_pretrained(tmp_path / "headless")
            assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
            assert again.config.auto_map["AutoModel"] == "modeling_armt.ARMTModel"
            assert again.config.architectures == ["ARMTModel"]
