"""`armt merge`: an adapter and its base become one checkpoint with the same logits, or nothing is written."""

import json
import shutil
from pathlib import Path

import evaluated
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.evaluation.subject import hash_weights
from modeling_armt.conversion.merging import MergeError, merge_adapter


IDS = torch.randint(3, 2048, (2, 75), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits.float()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "base"
    evaluated.checkpoint(folder, trained=False)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory) -> Path:
    """LoRA and memory with values that matter, saved as `armt train` does."""
    folder = tmp_path_factory.mktemp("merge") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(model, r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.03)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    evaluated.write(folder / "training.json", evaluated.training())
    (folder / "recipe.yaml").write_text("task: babilong\n")
    return folder


@pytest.fixture(scope="module")
def merged(adapter: Path, base: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "merged"
    before = evaluated.contents(adapter), evaluated.contents(base)
    assert main(["merge", str(adapter), "--out", str(folder)]) == 0
    assert (evaluated.contents(adapter), evaluated.contents(base)) == before
    return folder


class TestMerged:
    def test_has_the_adapters_logits(self, merged, adapter, base):
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
        expected = logits(adapted)
        assert (logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)) - expected).abs().mean() > 0.1
        found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
        assert (found - expected).abs().mean() < 0.02 * expected.std()  # the weights were rounded to bfloat16

    def test_is_an_ordinary_checkpoint(self, merged, base):
        model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
        assert type(model) is ARMTForCausalLM
        assert not info["missing_keys"] and not info["unexpected_keys"]
        names = {path.name for path in merged.iterdir()}
        assert names == {path.name for path in base.iterdir()} | {"training.json", "recipe.yaml"}

    def test_keeps_the_dtypes(self, merged, base):
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (base, merged))
        assert {name: tensor.dtype for name, tensor in theirs.items()} == {n: t.dtype for n, t in ours.items()}
        assert theirs["model.model.embed_tokens.weight"].dtype == torch.bfloat16
        assert theirs["memory.0.memory_value.weight"].dtype == torch.float32

    def test_memory_is_the_adapters_to_the_bit(self, merged, adapter):
        trained = load_file(adapter / "adapter_model.safetensors")
        name = "memory.0.memory_value.weight"
        assert torch.equal(load_file(merged / "model.safetensors")[name], trained[f"base_model.model.{name}"])

    def test_knows_its_backbone(self, merged):
        assert json.loads((merged / "config.json").read_text())["converted_from"]["license"] == "apache-2.0"

    def test_knows_its_training_and_its_adapter(self, merged, adapter):
        training = json.loads((merged / "training.json").read_text())
        assert training == evaluated.training() | {"merged_from": hash_weights(adapter)}
        assert (merged / "recipe.yaml").read_text() == (adapter / "recipe.yaml").read_text()

    def test_float32_base_loses_nothing(self, adapter, base, tmp_path):
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
        other = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        config = json.loads((other / "adapter_config.json").read_text())
        evaluated.write(other / "adapter_config.json", config | {"base_model_name_or_path": str(tmp_path / "base")})
        merge_adapter(other, tmp_path / "merged")
        expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), other))
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        assert (found - expected).abs().mean() < 1e-4 * expected.std()


class TestErrors:
    @pytest.fixture
    def refused(self, tmp_path, capsys):
        """Merges what has to fail; nothing may be left. Returns the one line that is said."""

        def refused(adapter: Path) -> str:
            before = evaluated.contents(adapter)
            assert main(["merge", str(adapter), "--out", str(tmp_path / "out" / "merged")]) == 1
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("armt: ")]
            assert len(lines) == 1
            assert evaluated.contents(adapter) == before
            assert not (tmp_path / "out").exists()
            return lines[0]

        return refused

    @pytest.fixture
    def changeable(self, adapter, tmp_path) -> Path:
        return Path(shutil.copytree(adapter, tmp_path / "adapter"))

    def test_full_checkpoint(self, refused, base):
        assert "is a full checkpoint already" in refused(base)

    def test_adapter_on_a_bare_backbone(self, refused, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(BACKBONE)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
        assert "a plain llama model" in refused(tmp_path / "lora")

    def test_base_that_is_gone(self, refused, changeable):
        config = json.loads((changeable / "adapter_config.json").read_text())
        evaluated.write(changeable / "adapter_config.json", config | {"base_model_name_or_path": "/gone/base"})
        assert "/gone/base" in refused(changeable)

    def test_damaged_adapter(self, refused, changeable):
        weights = changeable / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "does not load" in refused(changeable)

    def test_adapter_with_nan(self, refused, changeable):
        tensors = load_file(changeable / "adapter_model.safetensors")
        next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] = float("nan")
        save_file(tensors, changeable / "adapter_model.safetensors", metadata={"format": "pt"})
        assert "changes its logits (off by nan); nothing was written" in refused(changeable)

    def test_folder_that_is_in_use(self, adapter, tmp_path):
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(FileExistsError, match="not empty"):
            merge_adapter(adapter, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def test_quantized_base(self, adapter, tmp_path):
        quantization = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
        other = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        config = json.loads((other / "adapter_config.json").read_text())
        base = Path(shutil.copytree(config["base_model_name_or_path"], tmp_path / "base"))
        evaluated.write(other / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
        fields = json.loads((base / "config.json").read_text())
        evaluated.write(base / "config.json", fields | {"quantization_config": quantization})
        with pytest.raises(MergeError, match="quantized, where a merge would round twice"):
            merge_adapter(other, tmp_path / "merged")
