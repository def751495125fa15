"""What a model is made of where nobody gave it weights."""

from pathlib import Path

import pytest
import torch
from families import SEGMENT_SIZE, random_ids, tiny_model
from helpers import difference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_armt import ARMTForCausalLM, ARMTModel
from modeling_armt.conversion.checkpoints import load_checkpoint
from modeling_armt.memory_armt import AssociativeMemory


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A llama with memories that matter in both of its layers."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama").float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lacking(saved: Path, tmp_path_factory) -> Path:
    """The same without the weights of the second layer's memory."""
    folder = tmp_path_factory.mktemp("lacking")
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(folder)
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("memory.1.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def garbage(monkeypatch):
    """What nobody has written to yet holds nan, as it may."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(float("nan")))


def is_fresh(memory: AssociativeMemory) -> bool:
    """Whether a memory is as conversion makes it: values 0, beta's bias 1, all else drawn."""
    drawn = [linear.weight for linear in (memory.memory_query, memory.memory_key, memory.memory_beta)]
    return (
        not memory.memory_value.weight.any()
        and memory.memory_beta.bias.item() == 1
        and all(is_drawn(weight) for weight in drawn)
    )


def is_drawn(weight: torch.Tensor) -> bool:
    bound = weight.shape[-1] ** -0.5
    return 0.5 * bound < weight.abs().max() <= bound and bool(weight.any(-1).all())


class TestMemoriesWithoutWeights:
    @pytest.mark.parametrize("make", [AutoModelForCausalLM.from_config, ARMTForCausalLM, ARMTModel])
    def test_of_a_model_made_from_a_configuration_are_fresh(self, make):
        model = make(tiny_model("llama").config)
        assert len(model.memory) == 2 and all(is_fresh(memory) for memory in model.memory.values())

    def test_add_nothing(self):
        model = AutoModelForCausalLM.from_config(tiny_model("llama").config).double().eval()
        ids = random_ids(1, 3 * SEGMENT_SIZE)
        alone = torch.cat([model.model(segment).logits for segment in ids.split(SEGMENT_SIZE, dim=1)], dim=1)
        assert difference(model(ids, use_cache=False).logits, alone) < 1e-12

    def test_in_a_checkpoint_are_fresh_and_the_others_loaded(self, saved, lacking, garbage):
        model, whole = (AutoModelForCausalLM.from_pretrained(folder) for folder in (lacking, saved))
        assert is_fresh(model.memory["1"])
        assert torch.equal(model.memory["0"].memory_value.weight, whole.memory["0"].memory_value.weight)
        assert torch.equal(model.memory_tokens.weight, whole.memory_tokens.weight)

    def test_in_layers_named_only_at_load_are_fresh(self, tmp_path, garbage):
        tiny_model("llama", memory_layers=[0]).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, memory_layers=[0, 1])
        assert is_fresh(model.memory["1"]) and model.memory["0"].memory_value.weight.any()

    def test_of_another_size_are_drawn_anew(self, saved, garbage):
        model, whole = (
            AutoModelForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True, **options)
            for options in ({"d_mem": 8, "num_mem_tokens": 5}, {})
        )
        for layer, memory in model.memory.items():
            assert is_drawn(memory.memory_query.weight) and is_drawn(memory.memory_key.weight)
            assert torch.equal(memory.memory_value.weight, whole.memory[layer].memory_value.weight)
        assert model.memory_tokens.weight.shape[0] == 5 and model.memory_tokens.weight.isfinite().all()

    def test_are_refused_by_commands(self, lacking):
        with pytest.raises(ValueError, match="lacks 5 of its weights: memory.1.memory_beta.bias"):
            load_checkpoint(lacking, device="cpu")
