"""ARMTConfig: what it accepts, what it refuses and why, and its way to disk and back."""

import json
from pathlib import Path

import pytest
from families import FAMILIES, SEGMENT_SIZE, Family, tiny_backbone, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from modeling_armt import ARMTConfig, ARMTForCausalLM
from modeling_armt.configuration_armt import ARMT_VERSION


OTHER_THAN_DEFAULT = {
    "segment_size": 48,
    "num_mem_tokens": 3,
    "d_mem": 5,
    "dpfp_nu": 2,
    "normalize_features": False,
    "gamma_eps": 1e-5,
    "denom_eps": 1e-4,
    "correction": False,
    "use_denom": False,
    "write_guard": False,
    "memory_norm": True,
    "spread_memory_tokens": True,
    "memory_layers": [0, 2],
}


@pytest.fixture
def backbone() -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=61)


BAD_VALUES = {
    "segment_size": [0, -1, 1.5, True, "8", None],
    "num_mem_tokens": [0, -1, 1.5, True, "8", None],
    "d_mem": [0, -1, 1.5, True, "8", None],
    "dpfp_nu": [0, -1, 1.5, True, "8", None, 128],
    "gamma_eps": [-1e-5, 1, True, "0", None, float("nan")],
    "denom_eps": [-1e-5, 1, True, "0", None, float("nan"), 0],
    "normalize_features": [1, "yes", None],
    "correction": [1, "yes", None],
    "use_denom": [1, "yes", None],
    "memory_norm": [1, "yes", None],
    "spread_memory_tokens": [1, "yes", None],
    "memory_layers": [[], [3], [-1], [0, 0], [0.0], [True], "01", 1],
    "armt_version": [0, "1", None, ARMT_VERSION + 1],
    "text_config": [None, {}, {"model_type": "abacus"}, "llama", 3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_refused_by_name(name: str, value, backbone):
    with pytest.raises(ValueError, match=name):
        ARMTConfig(**{"text_config": backbone, name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_refused_later_too_and_change_nothing(name: str, value, backbone):
    config = ARMTConfig(text_config=backbone)
    before = config.to_dict()
    with pytest.raises(ValueError, match=name):
        setattr(config, name, value)
    assert config.to_dict() == before


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint whose memory has three layers."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("smollm3", d_mem=16, dpfp_nu=3).float().save_pretrained(folder)
    return folder


BAD_AT_LOAD = {"segment_size": 0, "denom_eps": -1e-5, "gamma_eps": float("nan"), "memory_layers": [], "dpfp_nu": 32}


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("name", BAD_AT_LOAD)
def test_bad_values_are_refused_when_given_at_load(name: str, load, saved):
    with pytest.raises(ValueError, match=name):
        load(saved, **{name: BAD_AT_LOAD[name]})


def test_options_given_at_load_are_checked_together(saved):
    config = AutoConfig.from_pretrained(saved, d_mem=1, dpfp_nu=1, memory_layers=(2, 0))
    assert (config.d_mem, config.dpfp_nu, config.memory_layers) == (1, 1, [0, 2])


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path):
    model = tiny_model("llama", memory_layers=[0, 1])
    model.config.memory_layers.append(7)
    for save in (model.save_pretrained, model.config.save_pretrained):
        with pytest.raises(ValueError, match="memory_layers"):
            save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["memory", "segment_sizes", "vocab_size", "tie_word_embeddings"])
def test_unknown_fields_are_refused_by_name(name: str, backbone):
    with pytest.raises(ValueError, match=f"^{name}: ARMTConfig has no such field"):
        ARMTConfig(text_config=backbone, **{name: 8})


def test_fields_that_others_wrote_into_a_file_do_no_harm(saved, backbone, tmp_path):
    """Other tools, other versions of transformers, and later ones of this package."""
    file = tmp_path / "config.json"
    written = {"use_cache": False, "tuned_with": "a tool", "vocab_size": 5, "write_threshold": 0.5, "pruned_heads": {}}
    file.write_text(json.dumps(json.loads((saved / "config.json").read_text()) | written))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.tuned_with, config.write_threshold, config.vocab_size) == ("a tool", 0.5, 61)
    assert ARMTConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_without_a_backbone_the_command_that_converts_one_is_named():
    with pytest.raises(ValueError, match="armt convert BACKBONE --out DIR"):
        ARMTConfig()


def test_a_newer_checkpoint_asks_for_an_upgrade(backbone, tmp_path):
    ARMTConfig(text_config=backbone).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"armt_version": ARMT_VERSION + 1}))
    with pytest.raises(ValueError, match="Upgrade modeling-armt"):
        ARMTConfig.from_pretrained(tmp_path)


def test_a_plain_backbone_is_not_a_configuration_and_the_command_is_named(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' model.*armt convert BACKBONE --out DIR"):
        ARMTConfig.from_pretrained(tmp_path)


def test_a_plain_backbone_is_not_a_checkpoint_and_the_command_is_named(tmp_path):
    tiny_backbone(FAMILIES["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="armt convert BACKBONE --out DIR"):
        ARMTForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", [ARMTConfig, AutoConfig])
def test_every_value_survives_saving(loader, backbone, tmp_path):
    config = ARMTConfig(text_config=backbone, **OTHER_THAN_DEFAULT)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert isinstance(loaded, ARMTConfig)
    assert {name: getattr(loaded, name) for name in OTHER_THAN_DEFAULT} == OTHER_THAN_DEFAULT
    assert isinstance(loaded.text_config, LlamaConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_what_older_code_would_read_wrongly_has_a_newer_version(backbone):
    assert ARMTConfig(text_config=backbone).armt_version == 1
    assert ARMTConfig(text_config=backbone, memory_norm=True).armt_version == 2


def test_the_list_of_other_values_is_complete(backbone):
    fields = ARMTConfig(text_config=backbone, **OTHER_THAN_DEFAULT).memory_fields
    assert fields.keys() - OTHER_THAN_DEFAULT.keys() == {"armt_version"}
    defaults = ARMTConfig(text_config=backbone).memory_fields
    assert [name for name in OTHER_THAN_DEFAULT if fields[name] == defaults[name]] == []


def test_the_backbone_may_be_a_dictionary(backbone):
    assert ARMTConfig(text_config=backbone.to_dict()).text_config.to_dict() == backbone.to_dict()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_the_backbones_business(tied: bool, backbone):
    backbone.tie_word_embeddings = tied
    assert ARMTConfig(text_config=backbone).tie_word_embeddings == tied


# The backbone's sizes

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]


@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config, BloomConfig])
def test_the_backbones_sizes_can_be_read_at_the_top_as_far_as_it_has_them(kind):
    backbone = kind()
    sizes = {size: getattr(backbone, size) for size in SIZES if hasattr(backbone, size)}
    config = ARMTConfig(text_config=backbone)
    assert {size: getattr(config, size) for size in SIZES if hasattr(config, size)} == sizes
    assert len(sizes) == (4 if kind is BloomConfig else 5)


def test_they_follow_the_embedding_and_stay_out_of_the_file(tmp_path):
    model = tiny_model("llama")
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).keys().isdisjoint(SIZES)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 70


@pytest.mark.parametrize("size", SIZES)
def test_they_are_set_in_the_backbones_configuration_only(size: str, backbone):
    config = ARMTConfig(text_config=backbone)
    with pytest.raises(AttributeError, match=f"{size} is the backbone's"):
        setattr(config, size, 8)


# Layers with a memory


def test_all_layers_have_a_memory_by_default(backbone):
    assert ARMTConfig(text_config=backbone).memory_layer_indices == [0, 1, 2]


def test_memory_layers_are_sorted(backbone):
    assert ARMTConfig(text_config=backbone, memory_layers=[2, 0]).memory_layer_indices == [0, 2]


@pytest.mark.parametrize("layers", [[0], [2], [0, 2]])
def test_only_the_layers_named_have_a_memory(layers: list[int]):
    model = tiny_model("smollm3", memory_layers=layers)
    assert [int(layer) for layer in model.memory] == layers
    hooked = [bool(layer._forward_hooks) for layer in model.decoder.layers]
    assert [number for number, has_hook in enumerate(hooked) if has_hook] == layers


# Learned positions


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "gpt_bigcode", "biogpt"])
def test_segments_must_fit_into_learned_positions(name: str):
    room = tiny_backbone(FAMILIES[name]).config.max_position_embeddings - 4
    ARMTForCausalLM.from_backbone(tiny_backbone(FAMILIES[name]), segment_size=room, num_mem_tokens=4)
    with pytest.raises(ValueError, match=f"segment_size of at most {room}"):
        ARMTForCausalLM.from_backbone(tiny_backbone(FAMILIES[name]), segment_size=room + 1, num_mem_tokens=4)


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj"])
def test_other_positions_have_no_end(name: str):
    backbone = tiny_backbone(FAMILIES[name])
    ARMTForCausalLM.from_backbone(backbone, segment_size=1000, num_mem_tokens=4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_segments_must_fit_into_positions_beyond_which_rotary_embeddings_change(kind: str):
    """Else a token would get another rotation as soon as the segment has grown."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 64, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    options = {**FAMILIES["llama"].options, "rope_parameters": rope, "max_position_embeddings": 64}
    family = Family("llama", options)
    ARMTForCausalLM.from_backbone(tiny_backbone(family), segment_size=60, num_mem_tokens=4)
    with pytest.raises(ValueError, match="segment_size of at most 60"):
        ARMTForCausalLM.from_backbone(tiny_backbone(family), segment_size=61, num_mem_tokens=4)


def test_a_checkpoint_with_too_long_segments_does_not_load(tmp_path: Path):
    config = ARMTConfig(text_config=GPT2Config(n_positions=16, n_embd=32, n_head=4, n_layer=1), segment_size=16)
    with pytest.raises(ValueError, match="segment_size"):
        ARMTForCausalLM(config)


def test_attention_is_chosen_for_the_backbone():
    model = tiny_model("llama", segment_size=SEGMENT_SIZE)
    model.set_attn_implementation("eager")
    assert model.model.config._attn_implementation == "eager"
