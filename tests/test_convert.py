"""`convert`: a sound checkpoint with everything the backbone came with, or a refusal that leaves nothing behind."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import COMMON, FAMILIES, REFUSED, tiny_backbone
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import is_sacremoses_available

from modeling_armt import ARMTConfig, ARMTForCausalLM
from modeling_armt.compatibility_armt import CACHE
from modeling_armt.conversion.convert import (
    ConversionError,
    attach_checked,
    check_conversion,
    convert,
    probe_ids,
    probe_segment,
)
from modeling_armt.conversion.files import staged, staged_folder, write_whole


pytestmark = pytest.mark.filterwarnings("ignore:.*without a tokenizer")

CHAT_TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
TOO_LARGE = os.strerror(errno.EFBIG)
STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


def llama_config(**fields) -> LlamaConfig:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **fields})


def mean_cosine(x: torch.Tensor) -> float:
    """Of two vectors of `(..., D)`, on average."""
    directions = nn.functional.normalize(x.flatten(0, -2), dim=-1)
    return (directions @ directions.T).mean().item()


def tiny_llama(cls: type[LlamaForCausalLM] = LlamaForCausalLM, **fields) -> LlamaForCausalLM:
    """A random model whose attention matters, also of a subclass that is broken in some way."""
    torch.manual_seed(0)
    return cls(llama_config(**fields)).eval()


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files included; None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Whatever goes wrong inside, `folder` is as it was before."""
    before = contents(folder)
    yield
    assert contents(folder) == before


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes, so that writing fails in the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory) -> Path:
    """A real tiny Llama, with the chat template and the generation settings that a chat model brings."""
    folder = tmp_path_factory.mktemp("backbones") / "stories260k"
    shutil.copytree(shared / "data" / "stories260k", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    fields = {"temperature": 0.7, "top_k": 20, "eos_token_id": [2, 410], "cache_implementation": "static"}
    GenerationConfig(bos_token_id=1, pad_token_id=2, do_sample=True, **fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conversion(stories: Path, tmp_path_factory) -> tuple[ARMTForCausalLM, Path]:
    """The converted stories model and its folder."""
    out = tmp_path_factory.mktemp("converted") / "deep" / "armt"
    return convert(stories, out, segment_size=256, num_mem_tokens=8, d_mem=32), out


@pytest.fixture(scope="module")
def converted(conversion) -> Path:
    return conversion[1]


@pytest.fixture(scope="module")
def model(converted: Path) -> ARMTForCausalLM:
    """The converted model, loaded from its folder."""
    return AutoModelForCausalLM.from_pretrained(converted)


@pytest.fixture(scope="module")
def backbone(stories: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(stories)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny backbone without tokenizer, in a folder of its own."""
    tiny_llama().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "armt"


class TestOneSegment:
    """Within the first segment a conversion is its backbone."""

    @torch.no_grad()
    def test_logits_are_the_backbones_to_the_bit(self, conversion, backbone):
        ids = torch.randint(512, (2, 256), generator=torch.Generator().manual_seed(0))
        assert torch.equal(conversion[0](ids, use_cache=False).logits, backbone(ids, use_cache=False).logits)

    @pytest.mark.parametrize("prompt", ["Once upon a time", STORY, "Tom and his dog went to the"])
    def test_greedy_text_is_the_backbones_token_for_token(self, model, backbone, converted, prompt):
        inputs = AutoTokenizer.from_pretrained(converted)(prompt, return_tensors="pt", return_token_type_ids=False)
        length = 256 - inputs["input_ids"].shape[1]
        options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": 2, "cache_implementation": None}
        expected = backbone.generate(**inputs, **options)
        assert model.generate(**inputs, **options).tolist() == expected.tolist()

    def test_sampled_text_is_the_backbones_for_the_same_seed(self, model, backbone):
        ids, texts = torch.tensor([[1, 403, 407, 261]]), []
        for which in (backbone, model):
            torch.manual_seed(5)
            texts.append(which.generate(ids, max_new_tokens=100, do_sample=True, cache_implementation=None).tolist())
        assert texts[0] == texts[1]

    def test_text_goes_on_over_the_segment_border(self, model):
        ids = torch.tensor([[1, 403, 407, 261]])
        output = model.generate(ids, max_new_tokens=300, min_new_tokens=300, do_sample=False)
        assert output.shape == (1, 304)


class TestWhatComesAlong:
    """Tokenizer, chat template and generation settings travel with the conversion."""

    def test_tokenizer(self, stories, converted):
        theirs, ours = AutoTokenizer.from_pretrained(stories), AutoTokenizer.from_pretrained(converted)
        assert ours(STORY)["input_ids"] == theirs(STORY)["input_ids"]
        assert ours.get_vocab() == theirs.get_vocab()

    def test_chat_template(self, converted):
        messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
        text = AutoTokenizer.from_pretrained(converted).apply_chat_template(messages, tokenize=False)
        assert text == "<s>user: Hello.\n<s>assistant: Hi.\n"

    def test_tokenizer_knows_no_longest_input(self, converted):
        tokenizer = AutoTokenizer.from_pretrained(converted)
        longest = tokenizer.model_max_length
        assert longest == torch.iinfo(torch.int32).max  # tools can count up to it
        assert tokenizer(STORY, truncation=True, max_length=longest) == tokenizer(STORY)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("eos_token_id", [2, 410]), ("temperature", 0.7), ("top_k", 20), ("do_sample", True), ("pad_token_id", 2)],
    )
    def test_generation_settings(self, model, field, value):
        assert getattr(model.generation_config, field) == value

    def test_cache_of_the_backbones_choice_is_dropped(self, conversion):
        model, folder = conversion
        assert model.generation_config.cache_implementation is None
        assert "cache_implementation" not in json.loads((folder / "generation_config.json").read_text())

    def test_settings_that_live_in_an_old_backbones_config(self, out, tmp_path):
        """Models of before there was a generation_config.json."""
        tiny_llama(bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6).save_pretrained(tmp_path / "plain")
        (tmp_path / "plain" / "generation_config.json").unlink()
        convert(tmp_path / "plain", out)
        settings = AutoModelForCausalLM.from_pretrained(out).generation_config
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (3, [4, 5], 6)

    def test_no_path_of_this_machine_is_in_the_checkpoint(self, stories, converted):
        assert str(stories.parent) not in (converted / "config.json").read_text()

    def test_tokenizer_that_needs_a_package_is_a_clear_refusal(self, tmp_path, out):
        """BioGPT's tokenizer needs sacremoses, which nothing here installs."""
        if is_sacremoses_available():
            pytest.skip("sacremoses is installed")
        tiny_backbone(FAMILIES["biogpt"]).save_pretrained(tmp_path / "biogpt")
        (tmp_path / "biogpt" / "tokenizer_config.json").write_text('{"tokenizer_class": "BioGptTokenizer"}')
        (tmp_path / "biogpt" / "vocab.json").write_text('{"a": 0}')
        (tmp_path / "biogpt" / "merges.txt").write_text("a b 1")
        with unchanged(tmp_path), pytest.raises(ConversionError, match="sacremoses"):
            convert(tmp_path / "biogpt", out, segment_size=8)

    def test_backbone_without_tokenizer_converts_with_a_warning(self, plain, out):
        with pytest.warns(UserWarning, match="without a tokenizer"):
            convert(plain, out)
        assert not list(out.glob("tokenizer*"))


class TestOptions:
    def test_without_correction(self, plain, out):
        """For comparison: what is written to z is not scaled."""
        assert convert(plain, out, correction=False).config.correction is False
        assert ARMTConfig.from_pretrained(out).correction is False

    @pytest.mark.parametrize(
        ("variant", "normalize_features", "gamma_eps"), [("v2", True, 0.0), ("paper", False, 1e-5)]
    )
    def test_variant(self, plain, out, variant, normalize_features, gamma_eps):
        convert(plain, out, variant=variant)
        config = ARMTConfig.from_pretrained(out)
        assert (config.normalize_features, config.gamma_eps) == (normalize_features, gamma_eps)

    def test_variant_that_does_not_exist(self, plain, out):
        with pytest.raises(ValueError, match="v3.*v2.*paper"):
            convert(plain, out, variant="v3")

    def test_sizes(self, plain, out):
        convert(plain, out, segment_size=12, num_mem_tokens=3, d_mem=5)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert (model.config.segment_size, model.config.num_mem_tokens, model.config.d_mem) == (12, 3, 5)
        assert model.memory_tokens.weight.shape == (3, 32)
        assert model.memory["0"].memory_query.weight.shape == (5, 32)

    def test_seed(self, plain, tmp_path):
        folders = [tmp_path / name for name in ("a", "again", "b")]
        for folder, seed in zip(folders, (0, 0, 1), strict=True):
            convert(plain, folder, segment_size=16, num_mem_tokens=2, d_mem=4, seed=seed)
        first, again, other = (load_file(folder / "model.safetensors") for folder in folders)
        assert all(torch.equal(first[name], again[name]) for name in first)
        differ = {name.split(".")[0] for name in first if not torch.equal(first[name], other[name])}
        assert differ == {"memory", "memory_tokens"}

    @torch.no_grad()
    def test_memory_norm_takes_off_what_all_tokens_have_in_common(self, tmp_path, out):
        backbone = tiny_llama()
        backbone.model.embed_tokens.weight += 0.3
        backbone.save_pretrained(tmp_path / "alike")
        model, calls = convert(tmp_path / "alike", out, segment_size=16, memory_norm=True), []
        norms = [module for name, module in model.memory.named_modules() if name.endswith("norm")]
        for norm in norms:
            norm.register_forward_hook(lambda _, args, result: calls.append((*args, result)))
        model(torch.randint(61, (64, 32)), use_cache=False, schedule="sequential")
        assert len(norms) == len(calls) == 2 * 3
        for x, normed in calls:
            assert mean_cosine(normed) < 0.1 < mean_cosine(x)
            assert normed.flatten(0, 1).std(0).mean() == pytest.approx(1, abs=0.2)
        assert_close(ARMTForCausalLM.from_pretrained(out).state_dict(), model.state_dict(), rtol=0, atol=0)

    def test_memory_layers(self, plain, out):
        convert(plain, out, memory_layers=[2, 0])
        assert set(AutoModelForCausalLM.from_pretrained(out).memory) == {"0", "2"}
        assert not any(name.startswith("memory.1.") for name in load_file(out / "model.safetensors"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_is_the_backbones_and_the_memory_stays_in_float32(self, plain, out, dtype):
        convert(plain, out, dtype=str(dtype).removeprefix("torch."))
        for name, tensor in load_file(out / "model.safetensors").items():
            assert tensor.dtype == (dtype if name.startswith("model.") else torch.float32), name

    def test_dtype_is_kept_by_default(self, tmp_path, out):
        tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
        assert convert(tmp_path / "plain", out).model.dtype == torch.bfloat16
        assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("option", "value"),
        [("segment_size", 0), ("num_mem_tokens", 0), ("d_mem", 0), ("memory_layers", [3]), ("memory_layers", [])],
    )
    def test_impossible_value_is_named(self, plain, out, option, value):
        with unchanged(plain.parent), pytest.raises(ValueError, match=option):
            convert(plain, out, **{option: value})


class TestFromBackbone:
    """The same in Python, on a model that is loaded already."""

    def test_backbone_becomes_part_of_the_model(self):
        backbone = tiny_llama()
        assert ARMTForCausalLM.from_backbone(backbone).model is backbone

    def test_options_are_fields_of_the_configuration(self):
        model = ARMTForCausalLM.from_backbone(tiny_llama(), segment_size=7, use_denom=False, memory_layers=[1])
        assert (model.config.segment_size, model.config.use_denom, model.config.memory_layers) == (7, False, [1])

    @torch.no_grad()
    def test_fresh_memory_adds_nothing(self):
        """What a segment reads from a memory that was never trained is exactly zero."""
        model = ARMTForCausalLM.from_backbone(tiny_llama(), segment_size=8)
        ids = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(0))
        states = model(ids, use_cache=True).cache.states
        assert all(not state.A.any() for state in states.values())

    @torch.no_grad()
    def test_backbone_still_works_by_itself(self):
        backbone = tiny_llama()
        ids = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(0))
        alone = backbone(ids).logits
        model = ARMTForCausalLM.from_backbone(backbone, segment_size=8)
        nn.init.normal_(model.memory["0"].memory_value.weight)
        model(ids)
        assert torch.equal(model.model(ids).logits, alone)

    @pytest.mark.parametrize("training", [True, False])
    def test_training_mode_is_the_backbones(self, training):
        model = ARMTForCausalLM.from_backbone(tiny_llama().train(training))
        assert all(module.training is training for module in model.modules())

    @torch.no_grad()
    def test_spread_memory_tokens_have_positions_all_over_their_segment(self):
        backbone, length, count = tiny_llama(), 12, 4
        ids = torch.randint(61, (2, length + 1))
        options = {"segment_size": length, "num_mem_tokens": count, "d_mem": 4, "memory_layers": [1]}
        model = ARMTForCausalLM.from_backbone(backbone, spread_memory_tokens=True, **options)
        nn.init.normal_(model.memory["1"].memory_value.weight, std=0.05)
        written = model(ids).cache.states[1]
        embeds = torch.cat(
            [backbone.model.embed_tokens(ids[:, :length]), model.memory_tokens.weight.expand(2, -1, -1)], 1
        )
        causal = torch.full((length + count, length + count), -torch.inf).triu(1)[None, None].expand(2, -1, -1, -1)
        positions = torch.tensor([[*range(length), 3, 6, 9, 12]])
        hidden = backbone.model(
            inputs_embeds=embeds, attention_mask=causal, position_ids=positions, output_hidden_states=True
        ).hidden_states
        empty = model.memory["1"].zero_state(2, "cpu")
        expected, _ = model.memory["1"].write(hidden[2][:, length:], empty, first=torch.tensor([True, True]))
        assert_close(written.A, expected.A, rtol=1e-5, atol=1e-5)
        assert_close(written.z, expected.z, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_spread_memory_tokens_leave_the_backbone_by_itself_alone(self):
        backbone, ids = tiny_llama(), torch.randint(61, (1, 40))
        expected = backbone(ids).logits
        ARMTForCausalLM.from_backbone(backbone, segment_size=8, num_mem_tokens=4, spread_memory_tokens=True)(ids)
        assert torch.equal(backbone(ids).logits, expected)

    def test_memory_tokens_cannot_be_spread_without_rotary_positions(self):
        with pytest.raises(ValueError, match="spread_memory_tokens.*GPT2Model"):
            ARMTForCausalLM.from_backbone(tiny_backbone(FAMILIES["gpt2"]), segment_size=8, spread_memory_tokens=True)

    def test_nor_with_rotary_positions_that_are_not_used(self):
        with pytest.raises(ConversionError, match="cannot be spread"):
            attach_checked(tiny_backbone(FAMILIES["falcon_alibi"]), segment_size=8, spread_memory_tokens=True)

    def test_generation_settings_are_a_copy(self):
        backbone = tiny_llama()
        backbone.generation_config.eos_token_id = [2, 7]
        model = ARMTForCausalLM.from_backbone(backbone)
        backbone.generation_config.eos_token_id = 0
        assert model.generation_config.eos_token_id == [2, 7]


class TestRefusals:
    """What is not a plain decoder is refused by the name of its family, and nothing is written."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return tmp_path / "source"

    def refused(self, source: Path, match: str) -> None:
        with unchanged(source.parent), pytest.raises(ConversionError, match=match):
            convert(source, source.parent / "armt", segment_size=8, num_mem_tokens=3)

    @pytest.mark.parametrize("name", ["lfm2", "mamba", "falcon_h1"])
    def test_recurrent_layers(self, source, name):
        tiny_backbone(REFUSED[name][0]).save_pretrained(source)
        self.refused(source, name)

    @pytest.mark.parametrize("family", ["t5", "bart"])
    def test_encoder_decoder(self, source, family):
        CONFIG_MAPPING[family]().save_pretrained(source)
        self.refused(source, f"{family} model.*plain decoder")

    @pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_5_vl"])
    def test_model_of_more_than_text(self, source, family):
        CONFIG_MAPPING[family]().save_pretrained(source)
        self.refused(source, f"{family} model.*plain decoder")

    def test_encoder(self, source):
        torch.manual_seed(0)
        sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = CONFIG_MAPPING["bert"](**sizes, num_attention_heads=4, initializer_range=0.2)
        AutoModelForCausalLM.from_config(config).save_pretrained(source)
        self.refused(source, "bert")

    def test_quantized(self, source):
        quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        llama_config(quantization_config=quantization).save_pretrained(source)
        self.refused(source, "quantized.*original weights")

    def test_armt_checkpoint(self, converted, out):
        with pytest.raises(ConversionError, match="ARMT checkpoint already"):
            convert(converted, out)

    def test_unknown_architecture(self, source):
        source.mkdir()
        (source / "config.json").write_text('{"model_type": "nonesuch"}')
        self.refused(source, "nonesuch")

    @pytest.mark.parametrize("config", ["", "{", "[]", '{"no": "model_type"}'])
    def test_damaged_config(self, source, config):
        source.mkdir()
        (source / "config.json").write_text(config)
        self.refused(source, "not a model that transformers can load")

    def test_folder_without_a_model(self, source):
        source.mkdir()
        self.refused(source, "not a model that transformers can load")

    def test_name_that_is_neither_folder_nor_hub_id(self, source):
        self.refused(source, "not a model that transformers can load")


class TestExperts:
    """A mixture of experts computes them with the kernel that its loader chose, before and after."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        tiny_backbone(FAMILIES["gpt_oss"]).save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    @pytest.mark.parametrize("kernel", ["grouped_mm", "eager"])
    def test_kernel_stays(self, folder, tmp_path, kernel):
        backbone = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation=kernel)
        model = attach_checked(backbone, segment_size=16, num_mem_tokens=3)
        assert model.config._experts_implementation == model.model.config._experts_implementation == kernel
        model.save_pretrained(tmp_path / "armt")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "armt", experts_implementation=kernel)
        assert loaded.model.config._experts_implementation == kernel

    def test_conversion_passes(self, folder, out):
        assert convert(folder, out, segment_size=16).model.config._experts_implementation == "grouped_mm"


class TestPositionTable:
    """A backbone that has learned its positions has no more of them than its table."""

    @pytest.fixture(params=["gpt2", "opt", "gpt_neo", "biogpt"])
    def learned(self, request) -> PreTrainedModel:
        """A backbone with 64 positions."""
        return tiny_backbone(FAMILIES[request.param]).float()

    def test_too_large_a_segment_is_refused_with_the_largest_that_fits(self, learned):
        with pytest.raises(ValueError, match=r"learned.* 64 positions.*at most 61"):
            attach_checked(learned, segment_size=62, num_mem_tokens=3)

    def test_largest_segment_that_fits_works(self, learned):
        model = attach_checked(learned, segment_size=61, num_mem_tokens=3)
        assert model(torch.randint(61, (1, 200))).logits.isfinite().all()

    def test_refusal_leaves_nothing_behind(self, tmp_path, out):
        tiny_backbone(FAMILIES["gpt2"]).save_pretrained(tmp_path / "source")
        with unchanged(tmp_path), pytest.raises(ValueError):
            convert(tmp_path / "source", out, segment_size=62, num_mem_tokens=3)

    def test_rotary_backbone_has_no_limit(self, tmp_path, out):
        tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "source")
        assert convert(tmp_path / "source", out, segment_size=100).config.segment_size == 100


class TestDamagedWeights:
    """Whatever is wrong with the weights, the message names the model and nothing is written."""

    def refused(self, source: Path, out: Path) -> str:
        with unchanged(source.parent), pytest.raises(ConversionError, match=str(source)) as caught:
            convert(source, out)
        return str(caught.value)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999], ids="{:.1%} left".format)
    def test_truncated(self, plain, out, share):
        file = plain / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
        assert "damaged or incomplete" in self.refused(plain, out)

    def test_overwritten_header(self, plain, out):
        file = plain / "model.safetensors"
        file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
        assert "damaged or incomplete" in self.refused(plain, out)

    def test_weights_that_are_missing_are_named(self, plain, out):
        tensors = load_file(plain / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, plain / "model.safetensors", {"format": "pt"})
        assert "model.layers.1.mlp.up_proj.weight" in self.refused(plain, out)

    def test_no_weights_at_all(self, plain, out):
        (plain / "model.safetensors").unlink()
        self.refused(plain, out)

    def test_shard_that_is_missing(self, tmp_path, out):
        source = tmp_path / "sharded"
        tiny_llama().save_pretrained(source, max_shard_size="30KB")
        max(source.glob("model-*.safetensors")).unlink()
        self.refused(source, out)

    def test_weights_of_another_size(self, plain, out):
        llama_config(intermediate_size=48).save_pretrained(plain)
        self.refused(plain, out)


class TestOut:
    """The folder appears whole or not at all, and what was there before is never touched."""

    @pytest.fixture
    def occupied(self, out: Path) -> Path:
        (out / "sub").mkdir(parents=True)
        (out / "config.json").write_text("mine")
        (out / "sub" / ".hidden").write_text("mine too")
        return out

    def test_full_folder_is_refused_and_untouched(self, plain, occupied):
        with unchanged(occupied.parent), pytest.raises(FileExistsError, match="nothing was changed"):
            convert(plain, occupied)

    def test_folder_with_a_hidden_file_counts_as_full(self, plain, out):
        out.mkdir()
        (out / ".keep").touch()
        with unchanged(out.parent), pytest.raises(FileExistsError):
            convert(plain, out)

    def test_file_is_refused_and_untouched(self, plain, out):
        out.write_text("mine")
        with unchanged(out.parent), pytest.raises(FileExistsError):
            convert(plain, out)

    def test_the_backbones_own_folder_is_refused_and_untouched(self, plain):
        with unchanged(plain.parent), pytest.raises(FileExistsError):
            convert(plain, plain)

    def test_full_folder_is_refused_before_the_backbone_is_read(self, occupied):
        with pytest.raises(FileExistsError):
            convert("no/such-backbone", occupied)

    def test_empty_folder_is_used(self, plain, out):
        out.mkdir()
        convert(plain, out)
        assert (out / "model.safetensors").is_file()

    def test_missing_parents_are_made(self, plain, out):
        convert(plain, out / "a" / "b")
        assert [path.name for path in (out / "a").iterdir()] == ["b"]

    def test_backbone_is_only_read(self, plain, out):
        with unchanged(plain):
            convert(plain, out)

    def test_failure_removes_the_parents_it_made(self, out):
        with unchanged(out.parent), pytest.raises(ConversionError):
            convert("no/such-backbone", out / "a" / "b")

    # Every library's writer has its own error for it; the command line has to make one of them.
    @pytest.mark.parametrize("size", [0, 1_000, 50_000])
    def test_full_disk_leaves_nothing_behind(self, plain, out, size):
        with unchanged(plain.parent), full_disk(size), pytest.raises(Exception, match=TOO_LARGE):
            convert(plain, out)

    def test_full_disk_while_the_tokenizer_is_copied_leaves_nothing_behind(self, stories, out):
        with unchanged(out.parent), full_disk(10_000), pytest.raises(Exception, match=TOO_LARGE):
            convert(stories, out)

    def test_interrupt_in_the_middle_of_a_save_leaves_nothing_behind(self, plain, out, monkeypatch):
        save = ARMTForCausalLM.save_pretrained

        def save_and_interrupt(*args, **kwargs):
            save(*args, **kwargs)
            raise KeyboardInterrupt

        monkeypatch.setattr(ARMTForCausalLM, "save_pretrained", save_and_interrupt)
        out.mkdir()
        with unchanged(plain.parent), pytest.raises(KeyboardInterrupt):
            convert(plain, out)


class TestStagedFolder:
    def test_nothing_is_seen_until_the_end(self, out):
        with staged_folder(out) as folder:
            (folder / "file").write_text("done")
            assert not out.exists()
        assert (out / "file").read_text() == "done"
        assert [path.name for path in out.parent.iterdir()] == [out.name]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit, ValueError])
    def test_error_removes_what_was_written(self, out, error):
        with pytest.raises(error), staged_folder(out) as folder:
            (folder / "file").touch()
            raise error
        assert list(out.parent.iterdir()) == []

    def test_others_may_read_it_as_any_new_folder(self, out):
        (out.parent / "ordinary").mkdir()
        with staged_folder(out):
            pass
        assert out.stat().st_mode == (out.parent / "ordinary").stat().st_mode

    @staticmethod
    def hidden(out: Path) -> list[Path]:
        return sorted(path for path in out.parent.iterdir() if path.name.startswith("."))

    def test_what_a_killed_run_left_goes_with_the_next_of_that_name(self, out):
        """A real kill, while a folder and a file are written."""
        child = os.fork()
        if child == 0:
            with staged_folder(out) as folder, staged(out.with_name("file")):
                (folder / "weights").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(self.hidden(out)) == 2
        with staged_folder(out.with_name("other")):
            pass
        assert len(self.hidden(out)) == 2
        with staged_folder(out):
            pass
        write_whole(out.with_name("file"), "new")
        assert contents(out.parent) == {out.name: None, "other": None, "file": b"new"}

    def test_what_a_run_is_filling_stays(self, out):
        with pytest.raises(OSError), staged_folder(out) as folder:
            with staged_folder(out) as first:
                (first / "first").touch()
                assert self.hidden(out) == sorted([folder, first])
            (folder / "second").touch()
        assert contents(out.parent) == {out.name: None, f"{out.name}/first": b""}

    def test_folder_that_fills_up_meanwhile_stays(self, out):
        with pytest.raises(OSError), staged_folder(out) as folder:
            (folder / "file").touch()
            out.mkdir()
            (out / "theirs").write_text("theirs")
        assert contents(out.parent) == {out.name: None, f"{out.name}/theirs": b"theirs"}


# Backbones that are broken in one way each, and would make an ARMT model that silently computes something else.


class WithOtherModel(LlamaForCausalLM):
    """A Llama with another body."""

    body = LlamaModel

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = self.body(config)
        self.post_init()


def broken_body(forward) -> type[LlamaForCausalLM]:
    """A Llama whose body's forward is `forward(self, original, **kwargs)`."""

    class Body(LlamaModel):
        def forward(self, **kwargs):
            return forward(self, super().forward, **kwargs)

    return type("Broken", (WithOtherModel,), {"body": Body})


def runs_layers(order: list[int]) -> type[LlamaForCausalLM]:
    """A Llama that runs its layers in this order."""

    def forward(self, original, **kwargs):
        layers = self.layers
        # Not a ModuleList: the parameters keep their names.
        self._modules["layers"] = nn.Sequential(*[layers[i] for i in order])
        self.config.num_hidden_layers = len(order)
        try:
            return original(**kwargs)
        finally:
            self._modules["layers"], self.config.num_hidden_layers = layers, len(layers)

    return broken_body(forward)


class CallsForward(LlamaDecoderLayer):
    """Hooks belong to a module's call, which this layer goes around."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)


def goes_around_the_hooks(self, original, **kwargs):
    for layer in self.layers:
        layer.__class__ = CallsForward
    return original(**kwargs)


def visible(kwargs: dict, sees) -> torch.Tensor:
    """The mask with which column q sees column k where `sees(q, k)` is true, whatever is cached."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    rows, length = (ids if embeddings is None else embeddings).shape[:2]
    cache = kwargs.get(CACHE)
    before = 0 if cache is None else cache.get_seq_length()
    q, k = torch.arange(before, before + length)[:, None], torch.arange(before + length)
    mask = torch.where(sees(q, k, before), 0.0, torch.finfo(torch.float32).min)
    return mask.expand(rows, 1, -1, -1)


def sees_the_future(self, original, **kwargs):
    return original(**{**kwargs, "attention_mask": visible(kwargs, lambda q, k, before: q + k >= 0)})


def ignores_the_mask(self, original, attention_mask=None, **kwargs):
    return original(**kwargs)


def ignores_its_cache(self, original, **kwargs):
    mask = visible(kwargs, lambda q, k, before: (k <= q) & (k >= before))
    return original(**{**kwargs, "attention_mask": mask})


def forgets_its_cache(self, original, **kwargs):
    return original(**{**kwargs, CACHE: None, "use_cache": False})


def starts_positions_anew(self, original, **kwargs):
    length = (kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]).shape[1]
    return original(**{**kwargs, "position_ids": torch.arange(length)[None]})


def mixes_neighbours(self, original, **kwargs):
    """As a convolution does, whose state no cache of keys and values holds."""
    output = original(**kwargs)
    hidden = output.last_hidden_state
    output.last_hidden_state = hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
    return output


def keeps_a_state(self, original, **kwargs):
    """From one call to the next, as nothing in a model may."""
    output = original(**kwargs)
    state = getattr(self, "state", 0)
    self.state = output.last_hidden_state[:, -1:].detach()
    output.last_hidden_state = output.last_hidden_state + state
    return output


def drops_what_layers_return(self, original, **kwargs):
    """The memory works, and nothing of it arrives."""
    output = original(**kwargs)
    ids = kwargs.get("input_ids")
    output.last_hidden_state = self.embed_tokens(ids) if ids is not None else kwargs["inputs_embeds"]
    return output


class HeadLooksAtTheIds(LlamaForCausalLM):
    """What the logits need besides the last hidden states is not there when they are computed from those."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + self.model.embed_tokens(input_ids).sum(-1, keepdim=True)
        return output


BROKEN = {
    "skips a layer": (runs_layers([0, 2]), "hooks"),
    "runs a layer twice": (runs_layers([0, 1, 1]), "hooks"),
    "goes around the hooks": (broken_body(goes_around_the_hooks), "hooks"),
    "sees the future": (broken_body(sees_the_future), "cache"),
    "ignores the mask": (broken_body(ignores_the_mask), "left-padded"),
    "ignores its cache": (broken_body(ignores_its_cache), "cache"),
    "does not fill its cache": (broken_body(forgets_its_cache), "probe"),
    "starts positions anew": (broken_body(starts_positions_anew), "cache"),
    "mixes neighbours": (broken_body(mixes_neighbours), "cache"),
    "keeps a state": (broken_body(keeps_a_state), "own logits"),
    "drops what its layers return": (broken_body(drops_what_layers_return), "does not reach"),
    "its head looks at the ids": (HeadLooksAtTheIds, "own logits"),
}


class TestProbe:
    """The checks that every conversion has to pass."""

    options = {"segment_size": 8, "num_mem_tokens": 3, "d_mem": 16}

    def test_sound_backbone_passes(self):
        attach_checked(tiny_llama(broken_body(lambda self, original, **kwargs: original(**kwargs))), **self.options)

    @pytest.mark.parametrize(("cls", "reason"), BROKEN.values(), ids=BROKEN)
    def test_broken_backbone_is_refused(self, cls, reason):
        with pytest.raises(ConversionError, match=f"llama models cannot carry a memory.*{reason}"):
            attach_checked(tiny_llama(cls), **self.options)

    @pytest.mark.parametrize(
        ("name", "seed", "window", "sizes"), [("exaone4", 0, 16, (32, 4, 8)), ("olmo3", 3, 4096, (16, 4, 16))]
    )
    def test_rounding_that_random_weights_magnify_is_no_fault(self, name, seed, window, sizes):
        """By its float32 alone it would be: off by 2e-2."""
        layers = {"num_hidden_layers": 4, "layer_types": [*3 * ["sliding_attention"], "full_attention"]}
        family = {**COMMON, **FAMILIES[name].options, **layers, "sliding_window": window}
        torch.manual_seed(seed)
        backbone = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**family)).eval()
        torch.manual_seed(0)
        model = attach_checked(backbone, **dict(zip(self.options, sizes, strict=True)))
        assert model.dtype == torch.float32

    @torch.no_grad()
    def test_logits_other_than_the_backbones_are_refused(self):
        model = ARMTForCausalLM.from_backbone(tiny_llama(), **self.options)
        ids = probe_ids(model.config)
        native = model.model(ids[:, : probe_segment(model.config)]).logits
        check_conversion(model, ids, native)
        with pytest.raises(ConversionError, match="own logits"):
            check_conversion(model, ids, native.nextafter(torch.tensor(torch.inf)))

    @pytest.mark.parametrize("sound", [True, False])
    def test_probe_leaves_the_model_as_it_was(self, sound):
        model = ARMTForCausalLM.from_backbone(tiny_llama(), **{**self.options, "segment_size": 1000})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ids = probe_ids(model.config)
        native = model.model(ids[:, : probe_segment(model.config)]).logits
        if sound:
            check_conversion(model, ids, native)
        else:
            with pytest.raises(ConversionError):
                check_conversion(model, ids, native + 1)
        assert model.config.segment_size == 1000
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    @pytest.mark.parametrize(("window", "longest"), [(5, 5), (None, 8), (2000, 8)])
    def test_probe_is_longer_than_the_window(self, window, longest):
        config = ARMTConfig(text_config=CONFIG_MAPPING["mistral"](sliding_window=window), segment_size=1000)
        assert longest < probe_segment(config) < 1000
        assert probe_ids(config).shape[1] > 2 * probe_segment(config)
