"""`import_checkpoint`: the authors' layouts become the same model, everything else is refused by name."""

import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file, save_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from modeling_armt import ARMTConfig, ARMTForCausalLM
from modeling_armt.attachment_armt import find_decoder_layers
from modeling_armt.conversion.importing import CheckpointError, import_checkpoint, map_name


SEGMENT_SIZE = 8
COMMON = {"vocab_size": 41, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
BACKBONES = {
    "llama": COMMON | {"intermediate_size": 64, "num_key_value_heads": 2},
    "gpt_neox": COMMON | {"intermediate_size": 64},
    "gpt2": COMMON | {"n_positions": 64},  # its head is tied
}
Tensors = dict[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:.*without a tokenizer")


def make_model(family: str = "llama", memory_layers: list[int] | None = None, **fields) -> ARMTForCausalLM:
    """A tiny random model whose memory matters."""
    torch.manual_seed(0)
    text_config = CONFIG_MAPPING[family](**(BACKBONES[family] | fields))
    config = ARMTConfig(
        text_config=text_config, segment_size=SEGMENT_SIZE, num_mem_tokens=3, d_mem=4, memory_layers=memory_layers
    )
    model = ARMTForCausalLM(config).eval()
    for memory in model.memory.values():
        nn.init.normal_(memory.memory_value.weight, std=0.05)
    nn.init.normal_(model.memory_tokens.weight)
    return model


class Holder(nn.Module):
    """Modules and parameters under given names."""

    def __init__(self, **members: nn.Module | nn.Parameter):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)


def authors_module(model: ARMTForCausalLM, layout: str) -> nn.Module:
    """
    The modules of `model` in the places where the authors' code has them: layout A is that of the training scripts, B,
    C and D are those of their Hugging Face models, of which only D wraps layers without memory too.
    """
    model = copy.deepcopy(model)
    layers = find_decoder_layers(model.decoder, model.config.text_config.num_hidden_layers)
    for index, layer in enumerate(layers):
        if str(index) in model.memory:
            m = model.memory[str(index)]
            projections = {"W_mq": m.memory_query, "W_mk": m.memory_key, "W_mv": m.memory_value, "W_mb": m.memory_beta}
            layers[index] = Holder(**projections, layer=layer)
        elif layout == "D":
            layers[index] = Holder(layer=layer)
    top = {"memory": model.memory_tokens.weight, "model": model.model}
    if layout in "CD":
        return Holder(**top)
    outer = Holder(memory_cell=Holder(**top, layers=layers))
    return Holder(armt=outer) if layout == "B" else outer


def save_backbone(model: ARMTForCausalLM, folder: Path, **fields) -> Path:
    """What an import needs of a backbone: its configuration, here with some fields changed."""
    config = copy.deepcopy(model.config.text_config)
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return folder


def assert_imported(out: Path, model: ARMTForCausalLM) -> None:
    """The folder holds `model`: the same weights, and over three segments and a half the same logits."""
    ids = torch.randint(41, (2, 28), generator=torch.Generator().manual_seed(1))
    imported = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert_close(imported.state_dict(), model.state_dict(), atol=0, rtol=0)
    with torch.no_grad():
        assert_close(imported(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.fixture(scope="module")
def model() -> ARMTForCausalLM:
    return make_model()


@pytest.fixture
def backbone(model, tmp_path) -> Path:
    return save_backbone(model, tmp_path / "backbone")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "imported"


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    """A file in layout A."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(authors_module(model, "A").state_dict(), path)
    return path


class TestKeyMap:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("memory_cell.memory", "memory_tokens.weight"),
            ("armt.memory_cell.memory", "memory_tokens.weight"),
            ("memory", "memory_tokens.weight"),
            ("memory_cell.model.model.layers.1.W_mq.weight", "memory.1.memory_query.weight"),
            ("memory_cell.layers.1.W_mk.weight", "memory.1.memory_key.weight"),
            ("model.model.layers.12.W_mv.weight", "memory.12.memory_value.weight"),
            ("model.model.layers.0.W_mb.bias", "memory.0.memory_beta.bias"),
            ("memory_cell.layers.0.layer.mlp.up_proj.weight", "model.model.layers.0.mlp.up_proj.weight"),
            ("model.model.layers.0.layer.mlp.up_proj.weight", "model.model.layers.0.mlp.up_proj.weight"),
            ("model.model.layers.0.mlp.up_proj.weight", "model.model.layers.0.mlp.up_proj.weight"),
            ("memory_cell.model.lm_head.weight", "model.lm_head.weight"),
        ],
    )
    def test_names(self, theirs, ours):
        assert map_name(theirs, layers="model.model.layers") == ours


class TestLayouts:
    @pytest.mark.parametrize("family", BACKBONES)
    def test_training_script_file_with_names_and_aliases(self, family, tmp_path, out):
        model = make_model(family)
        tensors = authors_module(model, "A").state_dict()
        assert any(name.startswith("memory_cell.layers.") for name in tensors)
        torch.save(tensors, tmp_path / "model_step100.bin")
        import_checkpoint(tmp_path / "model_step100.bin", save_backbone(model, tmp_path / "b"), out, SEGMENT_SIZE)
        assert_imported(out, model)

    @pytest.mark.parametrize("family", BACKBONES)
    def test_safetensors_that_kept_the_aliases_only(self, family, tmp_path, out):
        model = make_model(family)
        save_model(authors_module(model, "A"), tmp_path / "model.safetensors")
        names = load_file(tmp_path / "model.safetensors")
        assert "memory_cell.layers.0.W_mq.weight" in names and not any(".model." in n and "W_mq" in n for n in names)
        import_checkpoint(tmp_path / "model.safetensors", save_backbone(model, tmp_path / "b"), out, SEGMENT_SIZE)
        assert_imported(out, model)

    def test_first_hugging_face_model(self, model, backbone, tmp_path, out):
        torch.save(authors_module(model, "B").state_dict(), tmp_path / "pytorch_model.bin")
        import_checkpoint(tmp_path / "pytorch_model.bin", backbone, out, SEGMENT_SIZE)
        assert_imported(out, model)

    @pytest.mark.parametrize("layout", "CD")
    @pytest.mark.parametrize("family", ["llama", "gpt_neox"])
    def test_later_hugging_face_models_in_a_folder(self, family, layout, tmp_path, out):
        model = make_model(family)
        save_folder(tmp_path / "c", authors_module(model, layout).state_dict(), authors_config(model, layout))
        import_checkpoint(tmp_path / "c", save_backbone(model, tmp_path / "b"), out, SEGMENT_SIZE)
        assert_imported(out, model)

    def test_config_of_the_backbone_beside_a_file_is_no_matter(self, model, checkpoint, out):
        save_backbone(model, checkpoint.parent, sliding_window=4)
        import_checkpoint(checkpoint, checkpoint.parent, out, SEGMENT_SIZE)
        assert_imported(out, model)

    @pytest.mark.parametrize("layout", "ACD")
    def test_layers_without_memory(self, layout, tmp_path, out):
        model = make_model(memory_layers=[0, 2])
        torch.save(authors_module(model, layout).state_dict(), tmp_path / "model.pt")
        import_checkpoint(tmp_path / "model.pt", save_backbone(model, tmp_path / "b"), out, SEGMENT_SIZE)
        assert ARMTConfig.from_pretrained(out).memory_layers == [0, 2]
        assert_imported(out, model)

    @pytest.mark.parametrize("pattern", ["model{suffix}.safetensors", "pytorch_model{suffix}.bin"])
    def test_sharded(self, pattern, model, backbone, tmp_path, out):
        options = {"safe_serialization": pattern.endswith("safetensors"), "max_shard_size": 20_000}
        (tmp_path / "c").mkdir()
        tensors = authors_module(model, "A").state_dict()
        save_torch_state_dict(tensors, tmp_path / "c", filename_pattern=pattern, **options)
        assert len(list((tmp_path / "c").iterdir())) > 3
        import_checkpoint(tmp_path / "c", backbone, out, SEGMENT_SIZE)
        assert_imported(out, model)

    def test_old_buffers_are_dropped(self, tmp_path, out):
        model = make_model("gpt2")
        tensors = authors_module(model, "A").state_dict()
        tensors["memory_cell.model.transformer.h.0.layer.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors["memory_cell.layers.0.layer.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["memory_cell.layers.1.layer.attention.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(tensors, tmp_path / "model.bin")
        import_checkpoint(tmp_path / "model.bin", save_backbone(model, tmp_path / "b"), out, SEGMENT_SIZE)
        assert_imported(out, model)

    def test_old_name_of_the_head(self, tmp_path, out):
        model = make_model("gpt_neox")
        tensors = authors_module(model, "A").state_dict()
        tensors["memory_cell.model.embed_out.weight"] = tensors.pop("memory_cell.model.lm_head.weight")
        torch.save(tensors, tmp_path / "model.bin")
        import_checkpoint(tmp_path / "model.bin", save_backbone(model, tmp_path / "b"), out, SEGMENT_SIZE)
        assert_imported(out, model)


class TestResult:
    def test_settings_are_in_the_config(self, checkpoint, backbone, out):
        import_checkpoint(checkpoint, backbone, out, 5, variant="paper", correction=False, use_denom=False)
        config = ARMTConfig.from_pretrained(out)
        assert (config.segment_size, config.num_mem_tokens, config.d_mem, config.memory_layers) == (5, 3, 4, None)
        assert (config.normalize_features, config.gamma_eps) == (False, 1e-5)
        assert (config.correction, config.use_denom) == (False, False)
        assert not config.write_guard  # it was trained without

    def test_has_its_code_with_it(self, checkpoint, backbone, out):
        import_checkpoint(checkpoint, backbone, out, SEGMENT_SIZE)
        auto_map = json.loads((out / "config.json").read_text())["auto_map"]
        assert (out / f"{auto_map['AutoModelForCausalLM'].partition('.')[0]}.py").is_file()

    def test_returned_model_is_the_saved_one(self, model, checkpoint, backbone, out):
        returned = import_checkpoint(checkpoint, backbone, out, SEGMENT_SIZE)
        assert not returned.training
        assert_imported(out, returned)

    def test_bfloat16_stays_with_memory_in_float32(self, model, backbone, tmp_path, out):
        torch.save(authors_module(model, "A").bfloat16().state_dict(), tmp_path / "model.bin")
        import_checkpoint(tmp_path / "model.bin", backbone, out, SEGMENT_SIZE)
        stored = load_file(out / "model.safetensors")
        dtypes = {name.startswith("memory.") or name: tensor.dtype for name, tensor in stored.items()}
        assert dtypes.pop(True) == torch.float32
        dtypes.pop("memory_tokens.weight")
        assert set(dtypes.values()) == {torch.bfloat16}
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16

    def test_dtype_is_the_checkpoints_not_the_backbones(self, model, checkpoint, tmp_path, out):
        import_checkpoint(checkpoint, save_backbone(model, tmp_path / "b", dtype=torch.bfloat16), out, SEGMENT_SIZE)
        assert_imported(out, model)

    def test_tokenizer_chat_template_and_generation_config_come_along(self, checkpoint, backbone, out):
        words = Tokenizer(WordLevel({"hello": 0, "<unk>": 1}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_max_length=64)
        tokenizer.chat_template = "{{ messages[0].content }}"
        tokenizer.save_pretrained(backbone)
        GenerationConfig(temperature=0.6, do_sample=True).save_pretrained(backbone)
        model = import_checkpoint(checkpoint, backbone, out, SEGMENT_SIZE)
        copied = AutoTokenizer.from_pretrained(out)
        assert copied("hello").input_ids == [0]
        assert copied.chat_template == "{{ messages[0].content }}"
        assert copied.model_max_length > 10**6
        assert model.generation_config.temperature == 0.6
        assert AutoModelForCausalLM.from_pretrained(out).generation_config.temperature == 0.6

    def test_a_backbone_without_tokenizer_is_worth_a_warning(self, checkpoint, backbone, out):
        with pytest.warns(UserWarning, match="without a tokenizer"):
            import_checkpoint(checkpoint, backbone, out, SEGMENT_SIZE)


def authors_config(model: ARMTForCausalLM, layout: str) -> dict:
    """Fields of the `config.json` beside layouts C and D."""
    fields = {"model_type": "armt", "segment_size": SEGMENT_SIZE, "num_mem_tokens": 3, "d_mem": 4}
    fields |= {"segment_alignment": "left", "correction": True, "use_denom": True, "layers_attr": "model.layers"}
    if layout == "D":
        return fields | {"base_model_config": model.config.text_config.to_dict(), "base_attn_implementation": "eager"}
    switched_off = {"sliding_window": False, "use_sink": False, "n_heads": 1, "gating": False, "act_on": False}
    return fields | switched_off | {"base_model_name": "meta-llama/Llama-3.2-1B", "base_model_config": None}


def save_folder(folder: Path, tensors: Tensors, fields: dict | None = None) -> Path:
    folder.mkdir()
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def set_beta_rows(rows: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".W_mb." in name]:
            tensors[name] = tensors[name][:1].repeat(rows, *[1] * (tensors[name].dim() - 1))

    return change


def drop(*parts: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


def add_lora(tensors: Tensors) -> None:
    name = "model.model.layers.0.layer.self_attn.q_proj"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    tensors[f"{name}.lora_A.default.weight"] = torch.zeros(8, 32)
    tensors[f"{name}.lora_B.default.weight"] = torch.zeros(32, 8)


OTHER_TENSORS = {
    "RMT": (drop(".W_m"), "RMT"),
    "attention sink": (lambda tensors: tensors.update(sink=torch.zeros(1, 32)), "attention sink / sliding window"),
    "heads": (set_beta_rows(4), "several memory heads"),
    "gating": (set_beta_rows(32), "gating"),
    "LoRA": (add_lora, "LoRA"),
    "plain decoder": (drop(".W_m", "memory"), "it has no memory.*armt convert"),
    "unknown tensor": (lambda tensors: tensors.update(halting=torch.zeros(1)), "1 unknown: halting"),
    "no memory tokens": (drop("memory"), "no memory tokens"),
    "no projection": (drop("1.W_mk"), r"1 missing: memory\.1\.memory_key\.weight"),
}
OTHER_FIELDS = {
    "sliding_window": (True, "attention sink / sliding window"),
    "sliding_window_enabled": (True, "attention sink / sliding window"),
    "use_sink": (True, "attention sink / sliding window"),
    "attend_to_previous_input": (True, "attention to the previous segment"),
    "gating": (True, "gating"),
    "act_on": (True, "adaptive computation"),
    "segment_alignment": ("right", "aligned right"),
    "armt_version": (1, "checkpoint of this package"),
}


class TestRefusals:
    """Whatever is refused is refused by its name, and nothing is written."""

    @pytest.fixture(autouse=True)
    def nothing_written(self, tmp_path):
        yield
        assert not [path for path in tmp_path.iterdir() if "imported" in path.name]

    @pytest.mark.parametrize("kind", OTHER_TENSORS)
    def test_tensors_of_another_architecture(self, kind, model, backbone, tmp_path, out):
        change, message = OTHER_TENSORS[kind]
        tensors = authors_module(model, "C").state_dict()
        change(tensors)
        torch.save(tensors, tmp_path / "model.bin")
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(tmp_path / "model.bin", backbone, out, SEGMENT_SIZE)

    @pytest.mark.parametrize("field", OTHER_FIELDS)
    def test_config_of_another_architecture(self, field, model, backbone, tmp_path, out):
        value, message = OTHER_FIELDS[field]
        fields = authors_config(model, "C") | {field: value}
        save_folder(tmp_path / "c", authors_module(model, "C").state_dict(), fields)
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(tmp_path / "c", backbone, out, SEGMENT_SIZE)

    def test_config_beside_a_file_counts_too(self, model, backbone, tmp_path, out):
        fields = authors_config(model, "C") | {"sliding_window": True}
        save_folder(tmp_path / "c", authors_module(model, "C").state_dict(), fields)
        with pytest.raises(CheckpointError, match="sliding window"):
            import_checkpoint(tmp_path / "c" / "model.safetensors", backbone, out, SEGMENT_SIZE)

    @pytest.mark.parametrize("option", [{"segment_size": 16}, {"correction": False}, {"use_denom": False}])
    def test_option_that_contradicts_the_config(self, option, model, backbone, tmp_path, out):
        save_folder(tmp_path / "c", authors_module(model, "C").state_dict(), authors_config(model, "C"))
        with pytest.raises(CheckpointError, match=f"config.json has {next(iter(option))}"):
            import_checkpoint(tmp_path / "c", backbone, out, **{"segment_size": SEGMENT_SIZE} | option)

    @pytest.mark.parametrize("segment_size", [8, 64])  # 64 + 3 memory tokens fit into the wrapped table only
    def test_positions_for_memory_tokens(self, segment_size, tmp_path, out):
        model = make_model("gpt2")
        tensors = authors_module(model, "A").state_dict()
        name = "memory_cell.model.transformer.wpe.weight"
        tensors[name] = torch.cat([tensors[name], torch.zeros(3, 32)])
        torch.save(tensors, tmp_path / "model.bin")
        with pytest.raises(CheckpointError, match="wrap_pos"):
            import_checkpoint(tmp_path / "model.bin", save_backbone(model, tmp_path / "b"), out, segment_size)

    def test_positions_that_do_not_restart(self, tmp_path, out):
        model = make_model("gpt2")
        torch.save(authors_module(model, "D").state_dict(), tmp_path / "model.bin")
        with pytest.raises(CheckpointError, match="positions that count through the whole text"):
            import_checkpoint(tmp_path / "model.bin", save_backbone(model, tmp_path / "b"), out, SEGMENT_SIZE)


class TestWrongBackbone:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"hidden_size": 64}, "hidden size 32 .* hidden size 64"),
            ({"num_hidden_layers": 2}, "memory up to layer 2, .* layers 0 to 1"),
            ({"num_hidden_layers": 4}, r"missing: model\.model\.layers\.3"),
            ({"vocab_size": 50}, r"of another shape: .*embed_tokens\.weight \(41, 32\), not \(50, 32\)"),
            ({"num_key_value_heads": 4}, r"k_proj\.weight \(16, 32\), not \(32, 32\)"),
        ],
    )
    def test_other_sizes(self, fields, message, model, checkpoint, tmp_path, out):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(checkpoint, save_backbone(model, tmp_path / "b", **fields), out, SEGMENT_SIZE)

    def test_another_family(self, checkpoint, tmp_path, out):
        other = save_backbone(make_model("gpt_neox"), tmp_path / "b")
        with pytest.raises(CheckpointError, match="do not fit this gpt_neox backbone .*missing: .*unknown: "):
            import_checkpoint(checkpoint, other, out, SEGMENT_SIZE)

    def test_difference_that_no_shape_shows(self, model, tmp_path, out):
        save_folder(tmp_path / "c", authors_module(model, "D").state_dict(), authors_config(model, "D"))
        other = save_backbone(model, tmp_path / "b", num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        with pytest.raises(CheckpointError, match="num_attention_heads 4, the given one has 2"):
            import_checkpoint(tmp_path / "c", other, out, SEGMENT_SIZE)

    def test_no_model_at_all(self, checkpoint, tmp_path, out):
        with pytest.raises(CheckpointError, match="nowhere cannot be loaded"):
            import_checkpoint(checkpoint, tmp_path / "nowhere", out, SEGMENT_SIZE)

    def test_an_armt_checkpoint(self, model, checkpoint, tmp_path, out):
        model.save_pretrained(tmp_path / "armt")
        with pytest.raises(CheckpointError, match="is an ARMT checkpoint"):
            import_checkpoint(checkpoint, tmp_path / "armt", out, SEGMENT_SIZE)

    def test_tied_head_over_an_untied_checkpoint(self, model, checkpoint, tmp_path, out):
        tied = save_backbone(model, tmp_path / "b", tie_word_embeddings=True)
        with pytest.raises(CheckpointError, match="has other values"):
            import_checkpoint(checkpoint, tied, out, SEGMENT_SIZE)


class Payload:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestDamagedFiles:
    @pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
    def test_truncated(self, share, name, model, backbone, tmp_path, out):
        path, tensors = tmp_path / name, authors_module(model, "C").state_dict()
        torch.save(tensors, path) if name.endswith("bin") else save_file(tensors, path)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is incomplete, damaged"):
            import_checkpoint(path, backbone, out, SEGMENT_SIZE)

    @pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
    def test_something_else(self, name, backbone, tmp_path, out):
        (tmp_path / name).write_text("<html>404</html>")
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            import_checkpoint(tmp_path / name, backbone, out, SEGMENT_SIZE)

    def test_code_in_a_pickle_does_not_run(self, backbone, tmp_path, out):
        torch.save({"memory": Payload(tmp_path / "trace")}, tmp_path / "model.bin")
        with pytest.raises(CheckpointError, match="more than weights"):
            import_checkpoint(tmp_path / "model.bin", backbone, out, SEGMENT_SIZE)
        assert not (tmp_path / "trace").exists()

    def test_training_state_instead_of_weights(self, backbone, tmp_path, out):
        torch.save({"model_state_dict": {"memory": torch.zeros(3, 32)}, "step": 7}, tmp_path / "model.bin")
        with pytest.raises(CheckpointError, match="not a state dict"):
            import_checkpoint(tmp_path / "model.bin", backbone, out, SEGMENT_SIZE)

    def test_names_that_disagree(self, model, backbone, tmp_path, out):
        tensors = authors_module(model, "A").state_dict()
        tensors["memory_cell.layers.0.W_mq.weight"] = torch.zeros(4, 32)
        torch.save(tensors, tmp_path / "model.bin")
        with pytest.raises(CheckpointError, match=r"layers\.0\.W_mq\.weight .* has other values"):
            import_checkpoint(tmp_path / "model.bin", backbone, out, SEGMENT_SIZE)

    def test_missing_shard(self, model, backbone, tmp_path, out):
        (tmp_path / "c").mkdir()
        save_torch_state_dict(authors_module(model, "C").state_dict(), tmp_path / "c", max_shard_size=20_000)
        shard = sorted((tmp_path / "c").glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"{shard.name} cannot be read"):
            import_checkpoint(tmp_path / "c", backbone, out, SEGMENT_SIZE)

    def test_damaged_config(self, model, backbone, tmp_path, out):
        save_folder(tmp_path / "c", authors_module(model, "C").state_dict())
        (tmp_path / "c" / "config.json").write_text('{"model_type": "armt", "slid')
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            import_checkpoint(tmp_path / "c", backbone, out, SEGMENT_SIZE)

    def test_nothing_there(self, backbone, tmp_path, out):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            import_checkpoint(tmp_path / "model.bin", backbone, out, SEGMENT_SIZE)

    def test_folder_without_weights(self, backbone, tmp_path, out):
        with pytest.raises(CheckpointError, match="there is none"):
            import_checkpoint(backbone, backbone, out, SEGMENT_SIZE)

    def test_folder_with_several_files(self, checkpoint, backbone, tmp_path, out):
        folder = tmp_path / "c"
        folder.mkdir()
        for step in (100, 200):
            (folder / f"step{step}.bin").write_bytes(checkpoint.read_bytes())
        with pytest.raises(CheckpointError, match=r"there are step100\.bin, step200\.bin"):
            import_checkpoint(folder, backbone, out, SEGMENT_SIZE)


class TestOutput:
    @pytest.mark.parametrize("segment_size", [0, -8, 1.5])
    def test_impossible_segment_size(self, segment_size, checkpoint, backbone, out):
        with pytest.raises(ValueError, match="segment_size is"):
            import_checkpoint(checkpoint, backbone, out, segment_size)
        assert not out.exists()

    def test_unknown_variant(self, checkpoint, backbone, out):
        with pytest.raises(ValueError, match="variant is 'v3'; it must be one of: v2, paper"):
            import_checkpoint(checkpoint, backbone, out, SEGMENT_SIZE, variant="v3")

    def test_folder_in_use_stays_as_it_is(self, checkpoint, backbone, out):
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="not empty"):
            import_checkpoint(checkpoint, backbone, out, SEGMENT_SIZE)
        assert [path.name for path in out.iterdir()] == ["notes.txt"]

    def test_interrupted_write_leaves_nothing(self, checkpoint, backbone, tmp_path, out):
        before = sorted(tmp_path.iterdir())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.stat().st_size // 4, hard))  # as good as a full disk
        try:
            with pytest.raises(Exception, match="File too large"):
                import_checkpoint(checkpoint, backbone, out, SEGMENT_SIZE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(tmp_path.iterdir()) == before
