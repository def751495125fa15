"""LoRA + memory with PEFT: trained by the stock Trainer, saved, reloaded and merged without a difference."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SEGMENT_SIZE, add_memory, tiny_backbone, tiny_model
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.adapters import MEMORY_MODULES, lora_config, merge, parameter_groups
from modeling_armt.conversion.convert import convert


LENGTH = 3 * SEGMENT_SIZE + 3
IDS = torch.randint(3, 61, (8, LENGTH), generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
    ),  # 5.17 has no new name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # PEFT notices and sets it
]
FAMILY_NAMES = ["llama", "gpt2"]  # gpt2's linears are Conv1D modules, and its head is tied

# Runs where this package cannot be imported.
STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_armt":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file

adapter, work = sys.argv[1:]
ids = load_file(f"{work}/ids.safetensors")["ids"]
model = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(ids, use_cache=False).logits}, f"{work}/found.safetensors")
assert not any(name.partition(".")[0] == "modeling_armt" for name in sys.modules)
"""


class Texts(torch.utils.data.Dataset):
    """A few fixed texts, to be learned by heart."""

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[index], "labels": IDS[index]}


def train(model: nn.Module, folder: Path, steps: int = 25, **options) -> list[float]:
    """Trains under the stock Trainer and returns the losses."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=len(IDS),
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2, memory_lr=1e-2))
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(), optimizers=(optimizer, None))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    was_training = model.training
    found = model.eval()(IDS, use_cache=False).logits
    model.train(was_training)
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@dataclass
class Run:
    """A training run: the folder of the base, its logits and weights before, the adapted model, and the losses."""

    base: Path
    base_logits: torch.Tensor
    base_weights: dict[str, torch.Tensor]
    model: PeftModel
    losses: list[float]
    logits: torch.Tensor
    adapter: Path

    def fresh_base(self) -> ARMTForCausalLM:
        return AutoModelForCausalLM.from_pretrained(self.base)


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def run(request, tmp_path_factory) -> Run:
    """A fresh conversion, LoRA and memory trained for a few steps in float64, the adapter saved."""
    folder = tmp_path_factory.mktemp(request.param)
    ARMTForCausalLM.from_backbone(
        tiny_backbone(FAMILIES[request.param]), segment_size=SEGMENT_SIZE, num_mem_tokens=3, d_mem=16
    ).to(torch.float64).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    before, weights = logits(base), state(base)
    torch.manual_seed(0)
    adapted = get_peft_model(base, lora_config(base, r=4, lora_alpha=8))
    losses = train(adapted, folder / "trainer")
    adapted.eval().save_pretrained(folder / "adapter")
    return Run(folder / "base", before, weights, adapted, losses, logits(adapted), folder / "adapter")


class TestTraining:
    def test_loss_falls(self, run):
        assert run.losses[-1] < 0.85 * run.losses[0]

    def test_every_linear_of_the_layers_has_lora(self, run):
        decoder = run.fresh_base().decoder
        linears = [name for name, module in decoder.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
        adapted = [name for name, _ in run.model.named_modules() if name.endswith("lora_A.default")]
        assert len(linears) == {"llama": 14, "gpt2": 8}[run.model.config.text_config.model_type]
        for name in linears:
            assert sum(f".{name}." in where for where in adapted) == 1, name
        assert len(adapted) == len(linears)

    def test_lora_is_nowhere_on_the_memory(self, run):
        assert not [name for name, _ in run.model.named_parameters() if "lora" in name and "memory" in name]

    def test_all_of_the_memory_is_trained(self, run):
        trainable = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
        memory = [name for name in run.base_weights if name.startswith("memory")]
        assert len(memory) == 2 * 5 + 1
        merged = merge(copy.deepcopy(run.model)).state_dict()
        for name in memory:
            module, _, leaf = name.rpartition(".")
            assert f"base_model.model.{module}.modules_to_save.default.{leaf}" in trainable, name
            assert not torch.equal(merged[name], run.base_weights[name]), name

    def test_norms_of_the_memory_are_trained_at_its_rate(self):
        model = tiny_model(memory_norm=True)
        adapted = get_peft_model(model, lora_config(model))
        groups = parameter_groups(adapted, lr=1, memory_lr=2, weight_decay=0.5)
        norms = [parameter for name, parameter in adapted.named_parameters() if "norm.modules_to_save" in name]
        assert len(norms) == 2 * 2 * len(model.memory)
        (group,) = [group for group in groups if (group["lr"], group["weight_decay"]) == (2, 0)]
        assert all(any(parameter is other for other in group["params"]) for parameter in norms)

    def test_nothing_else_is_trained(self, run):
        names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
        assert all("lora_" in name or "modules_to_save.default" in name for name in names)

    def test_weights_of_the_base_stay_as_they_were(self, run):
        with run.model.disable_adapter():
            found = copy.deepcopy(run.model).unload().state_dict()
        for name, tensor in run.base_weights.items():
            if name.startswith("model."):
                assert torch.equal(found[name], tensor), name

    @pytest.mark.parametrize("name", FAMILY_NAMES)
    def test_gradient_checkpointing_changes_nothing(self, name, tmp_path):
        found = []
        for checkpointing in (False, True):
            model = tiny_model(name)
            torch.manual_seed(0)
            adapted = get_peft_model(model, lora_config(model, r=4))
            train(adapted, tmp_path, steps=3, gradient_checkpointing=checkpointing)
            assert model.gradient_checkpointing is checkpointing
            found.append(state(adapted))
        assert_close(found[1], found[0], atol=1e-12, rtol=0)


class TestDisabled:
    def test_disable_adapter_gives_the_base_with_its_own_memory(self, run):
        with run.model.disable_adapter():
            found = logits(run.model)
        assert_close(found, run.base_logits, atol=1e-9, rtol=0)

    def test_adapter_is_back_afterwards(self, run):
        with run.model.disable_adapter():
            pass
        assert torch.equal(logits(run.model), run.logits)

    def test_a_trained_memory_of_the_base_is_what_disable_adapter_uses(self):
        """Not only the zeros of a fresh conversion."""
        model = tiny_model()
        before = logits(model)
        adapted = get_peft_model(model, lora_config(model, r=4))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        assert (logits(adapted) - before).abs().max() > 1e-3
        with adapted.disable_adapter():
            assert_close(logits(adapted), before, atol=1e-9, rtol=0)


@pytest.fixture(scope="module")
def whole_adapters(tmp_path_factory) -> None:
    """Skips where transformers loads no more than the LoRA of an adapter, for plain models too (5.17 does)."""
    folder = tmp_path_factory.mktemp("plain")
    backbone = tiny_backbone(FAMILIES["llama"])
    backbone.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save.default.weight.mul_(2)
    adapted.save_pretrained(folder / "adapter")
    found = AutoModelForCausalLM.from_pretrained(folder / "adapter")
    if not torch.equal(logits(found), logits(adapted)):
        pytest.skip("this transformers drops modules_to_save of every model; AutoPeftModelForCausalLM loads them")


class TestSaved:
    """The adapter's folder, whose base is an ARMT checkpoint."""

    def test_holds_lora_and_memory_only(self, run):
        for name in load_file(run.adapter / "adapter_model.safetensors"):
            assert "lora_" in name or any(f".{module}." in name for module in MEMORY_MODULES), name

    @pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
    @pytest.mark.parametrize("vocabulary", [61, 70])
    def test_holds_the_embeddings_if_they_were_resized(self, vocabulary, tmp_path):
        tiny_model("llama").save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(vocabulary)
        adapted = get_peft_model(model, lora_config(model))
        adapted.save_pretrained(tmp_path / "adapter")
        names = {name.split(".")[-2] for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
        assert names & {"embed_tokens", "lm_head"} == ({"embed_tokens", "lm_head"} if vocabulary > 61 else set())

    def test_names_its_base(self, run):
        config = json.loads((run.adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(run.base)

    def test_peft_model(self, run):
        found = PeftModel.from_pretrained(run.fresh_base(), run.adapter)
        assert_close(logits(found), run.logits, atol=1e-9, rtol=0)

    def test_auto_peft_model(self, run):
        found = AutoPeftModelForCausalLM.from_pretrained(run.adapter, trust_remote_code=True)
        assert_close(logits(found), run.logits, atol=1e-9, rtol=0)

    def test_auto_model_on_the_adapters_folder(self, run, whole_adapters):
        found = AutoModelForCausalLM.from_pretrained(run.adapter, trust_remote_code=True)
        assert isinstance(found, ARMTForCausalLM)
        assert_close(logits(found), run.logits, atol=1e-9, rtol=0)

    def test_training_can_go_on(self, run, tmp_path):
        found = PeftModel.from_pretrained(run.fresh_base(), run.adapter, is_trainable=True)
        before = state(found)
        losses = train(found, tmp_path, steps=2)
        assert losses[0] < 0.85 * run.losses[0]
        changed = {name for name, tensor in found.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name, parameter in found.named_parameters() if parameter.requires_grad}

    @pytest.mark.parametrize("run", ["llama"], indirect=True)
    def test_loads_where_the_package_is_absent(self, run, tmp_path):
        save_file({"ids": IDS}, tmp_path / "ids.safetensors")
        result = subprocess.run(
            [sys.executable, "-I", "-c", STRANGER, str(run.adapter), str(tmp_path)],
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        found = load_file(tmp_path / "found.safetensors")["logits"]
        assert_close(found, run.logits, atol=1e-9, rtol=0)


@pytest.fixture(scope="module")
def merged(run: Run) -> ARMTForCausalLM:
    return merge(copy.deepcopy(run.model))


@pytest.fixture(scope="module")
def merged_folder(merged: ARMTForCausalLM, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    merged.save_pretrained(folder)
    return folder


class TestMerged:
    def test_is_an_ordinary_model(self, merged, run):
        assert type(merged) is ARMTForCausalLM
        assert set(merged.state_dict()) == set(run.base_weights)

    def test_logits_are_the_adapted_models(self, merged, run):
        assert_close(logits(merged), run.logits, atol=1e-9, rtol=0)

    def test_logits_are_the_same_after_a_round_trip(self, merged_folder, run):
        assert_close(logits(AutoModelForCausalLM.from_pretrained(merged_folder)), run.logits, atol=1e-9, rtol=0)

    def test_folder_is_an_ordinary_checkpoint(self, merged_folder, run):
        """An adapter in it would make transformers load the adapter's base instead."""
        assert {path.name for path in merged_folder.iterdir()} == {path.name for path in run.base.iterdir()}

    def test_float32_differs_by_rounding_only(self, run):
        adapted = copy.deepcopy(run.model).float()
        expected = logits(adapted)
        assert_close(logits(merge(adapted)), expected, atol=1e-3, rtol=0)

    def test_adapter_of_a_converted_model_knows_its_base(self, tmp_path):
        tiny_backbone(FAMILIES["llama"]).save_pretrained(tmp_path / "backbone")
        with pytest.warns(UserWarning, match="tokenizer"):
            model = convert(tmp_path / "backbone", tmp_path / "armt", segment_size=SEGMENT_SIZE, num_mem_tokens=3)
        get_peft_model(model, lora_config(model)).save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "armt")


TIED = {
    "some tokens": {"trainable_token_indices": [5, 6, 7]},
    "embedding and head as one": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "the embedding alone": {"modules_to_save": ["EMBEDDING"]},
    "the head alone": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # PEFT says what becomes of it
class TestEmbeddings:
    """PEFT wraps the embedding, and the head that is tied to it by what the backbone says."""

    @pytest.fixture
    def model(self, request) -> ARMTForCausalLM:
        backbone = tiny_backbone(FAMILIES[getattr(request, "param", "gpt2")])
        backbone.config.tie_word_embeddings = True
        backbone.tie_weights()
        return add_memory(backbone)

    def adapt(self, model: ARMTForCausalLM, **options) -> PeftModel:
        embedding = "wte" if model.config.text_config.model_type == "gpt2" else "embed_tokens"
        named = {k: [embedding] if v == ["EMBEDDING"] else v for k, v in options.items()}
        adapted = get_peft_model(model, lora_config(model, r=4, **named))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return adapted

    @pytest.mark.parametrize("model", FAMILY_NAMES, indirect=True)
    @pytest.mark.parametrize("options", TIED.values(), ids=TIED)
    def test_merging_changes_no_logits_of_a_tied_head(self, options, model, tmp_path):
        before, adapted = logits(model), self.adapt(model, **options)
        expected = logits(adapted)
        assert (expected - before).abs().max() > 0.1
        merged = merge(adapted)
        assert_close(logits(merged), expected, atol=1e-9, rtol=0)
        tied = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
        assert merged.config.tie_word_embeddings is merged.config.text_config.tie_word_embeddings is tied
        assert tied is ("ensure_weight_tying" in options or "trainable_token_indices" in options)
        merged.save_pretrained(tmp_path)
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-9, rtol=0)

    @torch.no_grad()
    @pytest.mark.parametrize("options", [*TIED.values(), {"target_modules": ["wte"]}], ids=[*TIED, "LoRA"])
    def test_the_vocabulary_is_known_all_the_same(self, options, model):
        adapted = self.adapt(model, **options).eval()
        assert adapted.num_embeddings == 61
        assert_close(adapted.read(IDS).logits[:, 0], logits(adapted)[:, -1], atol=1e-9, rtol=0)
        with pytest.raises(ValueError, match="token id 61, but the vocabulary has ids 0 to 60"):
            adapted(IDS.masked_fill(IDS == 5, 61))


class TestGradients:
    """Hooks must find the memory that is trained: PEFT's copies, and those of a copied model."""

    @pytest.fixture
    def adapted(self) -> PeftModel:
        model = tiny_model()
        return get_peft_model(model, lora_config(model, r=4)).train()

    def trained_memory(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if "memory" in name and p.requires_grad}

    def test_reach_every_trained_copy_of_the_memory(self, adapted):
        adapted(IDS, labels=IDS).loss.backward()
        memory = self.trained_memory(adapted)
        assert len(memory) == 2 * 5 + 1
        for name, parameter in memory.items():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    def test_are_those_of_the_model_without_adapter(self, adapted):
        """LoRA starts as zero, so that the memory's gradients are what they were."""
        model = tiny_model().train()
        for which in (model, adapted):
            which(IDS, labels=IDS).loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if name.startswith("memory")}
        for name, gradient in expected.items():
            module, _, leaf = name.rpartition(".")
            found = adapted.get_parameter(f"base_model.model.{module}.modules_to_save.default.{leaf}").grad
            assert_close(found, gradient, atol=1e-12, rtol=0, msg=name)

    def test_originals_get_none(self, adapted):
        adapted(IDS, labels=IDS).loss.backward()
        originals = {name: p for name, p in adapted.named_parameters() if "original_module" in name}
        assert originals
        assert all(parameter.grad is None for parameter in originals.values())

    def test_of_a_deep_copy_are_its_own(self, adapted):
        twin = copy.deepcopy(adapted)
        twin(IDS, labels=IDS).loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in self.trained_memory(twin).values())
        assert all(parameter.grad is None for parameter in adapted.parameters())

    @torch.no_grad()
    def test_changing_a_deep_copy_leaves_the_original_alone(self, adapted):
        before, twin = logits(adapted), copy.deepcopy(adapted)
        assert torch.equal(logits(twin), before)
        for parameter in self.trained_memory(twin).values():
            parameter.zero_()
        assert torch.equal(logits(adapted), before)
        assert not torch.equal(logits(twin), before)


class TestParameterGroups:
    @pytest.fixture(params=["plain", "adapted"])
    def model(self, request) -> nn.Module:
        model = tiny_model()
        return get_peft_model(model, lora_config(model, r=4)) if request.param == "adapted" else model

    @pytest.fixture
    def settings(self, model) -> dict[str, tuple[float, float]]:
        """`(learning rate, weight decay)` by name of the parameter."""
        groups = parameter_groups(model, lr=1e-4, memory_lr=1e-3, weight_decay=0.1)
        by_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert sum(len(group["params"]) for group in groups) == len(by_id)
        return {name: by_id.pop(id(p)) for name, p in model.named_parameters() if p.requires_grad}

    def test_every_trained_parameter_is_in_one_group(self, model, settings):
        assert set(settings) == {name for name, p in model.named_parameters() if p.requires_grad}

    def test_memory_has_its_own_rate(self, settings):
        for name, (lr, _) in settings.items():
            assert lr == (1e-3 if "memory" in name else 1e-4), name

    def test_memory_tokens_and_biases_do_not_decay(self, model, settings):
        for name, (_, decay) in settings.items():
            exempt = "memory_tokens" in name or model.get_parameter(name).dim() < 2
            assert decay == (0.0 if exempt else 0.1), name

    def test_optimizer_takes_them(self, model):
        torch.optim.AdamW(parameter_groups(model, lr=1e-4, memory_lr=1e-3))


class TestLoraConfig:
    def test_rank_scale_and_other_options_are_pefts(self):
        config = lora_config(tiny_model(), r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj"])
        assert (config.r, config.lora_alpha, config.lora_dropout) == (2, 6, 0.1)
        assert config.target_modules == {"q_proj"}

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon", "mixtral", "gemma2", "phi3", "bloom"])
    def test_finds_the_linears_of_every_family(self, name):
        model = tiny_model(name)
        adapted = get_peft_model(model, lora_config(model, r=4))
        assert_close(logits(adapted), logits(tiny_model(name)), atol=1e-5, rtol=0)
        names = [parameter for parameter, _ in adapted.named_parameters() if "lora_" in parameter]
        assert names
        assert not [parameter for parameter in names if "memory" in parameter]

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_names_the_same_linears_for_a_second_adapter(self, name):
        model = tiny_model(name)
        first = lora_config(model, r=4)
        adapted = get_peft_model(model, first)
        second = lora_config(adapted, r=2)
        assert second.target_modules == lora_config(model).target_modules == first.target_modules
        adapted.add_adapter("second", second)
        ranks = {parameter.shape[0] for where, parameter in adapted.named_parameters() if "lora_A.second" in where}
        assert ranks == {2}
