"""Loading checkpoints and adapters: what comes back, and what is refused."""

import json
import shutil

import pytest
import torch
from evaluation_models import symbol_model, talking_model
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.checkpoints import armt_model, backbone_only, check_checkpoint, load_checkpoint
from modeling_armt.conversion.demo import BACKBONE


# peft asks by the old name
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

IDS = torch.arange(1, 81)[None]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "full"
    talking_model(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(full):
    """A folder of an adapter on `full` that changes backbone and memory, without a tokenizer."""
    model, _ = load_checkpoint(full, device="cpu")
    adapted = get_peft_model(model, lora_config(model, r=2))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "memory_value.modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = full.with_name("adapter")
    adapted.save_pretrained(folder)
    (folder / "expected.json").write_text(json.dumps(logits(adapted.eval()).tolist()))
    return folder


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits[0, -1]


class TestLoad:
    def test_of_a_checkpoint(self, full):
        model, tokenizer = load_checkpoint(full, device="cpu")
        assert type(model) is ARMTForCausalLM and not model.training
        assert tokenizer("door")["input_ids"]
        assert armt_model(model) is model

    def test_of_an_adapter_is_what_was_saved_on_its_base(self, full, adapter):
        model, tokenizer = load_checkpoint(adapter, device="cpu")
        assert isinstance(model, PeftModel) and not model.training
        expected = torch.tensor(json.loads((adapter / "expected.json").read_text()))
        torch.testing.assert_close(logits(model), expected)
        assert (logits(load_checkpoint(full, device="cpu")[0]) - expected).abs().max() > 0.1
        assert type(armt_model(model)) is ARMTForCausalLM
        assert tokenizer("door")["input_ids"]  # the base's

    def test_of_what_has_no_tokenizer(self, tmp_path):
        symbol_model().save_pretrained(tmp_path)
        assert load_checkpoint(tmp_path, device="cpu")[1] is None

    def test_in_another_precision_keeps_the_memory_exact(self, full):
        model, _ = load_checkpoint(full, torch.bfloat16, "cpu")
        assert model.model.dtype == torch.bfloat16
        assert model.memory_tokens.weight.dtype == torch.float32


class TestBackbone:
    def test_of_a_checkpoint_has_no_memory(self, full):
        expected = logits(AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32))
        model, _ = load_checkpoint(full, device="cpu")
        with backbone_only(model) as backbone:
            assert torch.equal(logits(backbone), expected)
        assert not torch.equal(logits(model), expected)

    def test_of_an_adapter_is_the_untouched_one_for_as_long_as_it_is_asked_for(self, adapter):
        expected = logits(AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32))
        model, _ = load_checkpoint(adapter, device="cpu")
        before = logits(model)
        with backbone_only(model) as backbone:
            assert torch.equal(logits(backbone), expected)
        assert torch.equal(logits(model), before)


class TestRefuses:
    def refused(self, path, kind=ValueError):
        with pytest.raises(kind) as found:
            check_checkpoint(path)
        with pytest.raises(kind):
            load_checkpoint(path, device="cpu")
        return " ".join(str(found.value).split())

    def test_a_plain_backbone(self):
        assert "is a plain llama model, not an ARMT checkpoint. Convert it first" in self.refused(BACKBONE)

    def test_an_adapter_on_a_plain_backbone(self, adapter, tmp_path):
        folder = tmp_path / "adapter"
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(BACKBONE)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        message = self.refused(folder)
        assert f"{BACKBONE}, the base of the adapter {folder}, is a plain llama model" in message

    def test_an_adapter_whose_base_is_gone(self, adapter, tmp_path):
        folder = tmp_path / "adapter"
        shutil.copytree(adapter, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "/gone/base"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert f"there is no base of the adapter {folder}, /gone/base" in self.refused(folder, OSError)

    def test_an_adapter_beside_a_model(self, full, adapter, tmp_path):
        folder = tmp_path / "both"
        shutil.copytree(full, folder)
        shutil.copy(adapter / "adapter_config.json", folder)
        assert "has both an adapter and a model in it" in self.refused(folder)

    @pytest.mark.parametrize("name", ["nothing", "./nothing", "runs/nothing", "runs/old/nothing", "~/nothing"])
    def test_nothing_without_asking_the_hub(self, tmp_path, monkeypatch, name):
        (tmp_path / "runs").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked a host"))
        assert f"there is no checkpoint {name}." in self.refused(name, FileNotFoundError)

    def test_an_empty_folder(self, tmp_path):
        assert "is not a checkpoint that can be loaded" in self.refused(tmp_path)

    def test_damaged_weights(self, full, tmp_path):
        folder = tmp_path / "damaged"
        shutil.copytree(full, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match="cannot be loaded, its files may be damaged"):
            load_checkpoint(folder, device="cpu")

    def test_a_damaged_adapter_configuration(self, adapter, tmp_path):
        folder = tmp_path / "adapter"
        shutil.copytree(adapter, folder)
        (folder / "adapter_config.json").write_text("{")
        assert "adapter_config.json cannot be read" in self.refused(folder)

    def test_a_damaged_tokenizer(self, full, tmp_path):
        folder = tmp_path / "full"
        shutil.copytree(full, folder)
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match="the tokenizer in .* cannot be loaded"):
            load_checkpoint(folder, device="cpu")
