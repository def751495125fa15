"""What only a GPU can show: devices, bfloat16, peak memory. Run with `pytest -m gpu`."""

import time

import pytest
import torch
from helpers import enable_checkpointing
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from modeling_armt import ARMTCache, ARMTForCausalLM, decode_armt, groups_armt
from modeling_armt.conversion.adapters import lora_config


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def backbone_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=None,
    )


def make_model(config: LlamaConfig | GPT2Config, dtype: torch.dtype) -> ARMTForCausalLM:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config).to("cuda", dtype).eval()
    model = ARMTForCausalLM.from_backbone(backbone, segment_size=64, num_mem_tokens=8, d_mem=16)
    for memory in model.memory.values():
        torch.nn.init.normal_(memory.memory_value.weight, std=0.01)
    return model


def random_ids(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(1000, (rows, columns), generator=torch.Generator().manual_seed(1)).cuda()


@torch.no_grad()
def test_ragged_batch_in_chunks_gives_the_logits_of_each_row_alone():
    # gpt2 computes its norms in the model's dtype; llama's are float32, whose rounding on a GPU depends on shapes.
    config = GPT2Config(vocab_size=1000, n_embd=256, n_layer=4, n_head=8, n_positions=128, eos_token_id=None)
    model = make_model(config, torch.float64)
    ids, mask = random_ids(3, 300), torch.ones(3, 300, dtype=torch.long, device="cuda")
    mask[0, :100], mask[1, 250:] = 0, 0
    first = model(ids[:, :130], attention_mask=mask[:, :130])
    rest = model(ids[:, 130:], attention_mask=mask, cache=first.cache)
    logits = torch.cat([first.logits, rest.logits], dim=1)
    for row in range(3):
        real = mask[row] == 1
        alone = model(ids[row, real][None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, real], alone, atol=1e-9, rtol=0)


@torch.no_grad()
def test_bfloat16_keeps_projections_and_state_in_float32(backbone_config):
    model = make_model(backbone_config, torch.bfloat16)
    output = model(random_ids(2, 300))
    assert output.logits.dtype == torch.bfloat16
    assert {state.A.dtype for state in output.cache.states.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.memory.parameters()} == {torch.float32}


@torch.no_grad()
def test_peak_memory_does_not_grow_with_the_text(backbone_config):
    model = make_model(backbone_config, torch.bfloat16)
    model(random_ids(1, 20_000).cpu(), logits_to_keep=1)  # leaves the buffers that all later calls use again
    peaks = []
    for length in (20_000, 100_000):
        ids = random_ids(1, length).cpu()  # the text itself may stay off the GPU
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(ids, logits_to_keep=1)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.01 * peaks[0]


def test_mixed_precision_training_with_checkpointing_has_finite_equal_gradients(backbone_config):
    model = make_model(backbone_config, torch.float32).train()
    ids, gradients = random_ids(2, 300), []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(ids, labels=ids, return_logits=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-3)


def test_a_memory_saved_on_the_gpu_answers_on_the_cpu(backbone_config, tmp_path):
    model = make_model(backbone_config, torch.float32)
    ids = random_ids(1, 300)
    with torch.no_grad():
        memory = model(ids, logits_to_keep=1).cache
        model.save_memory(memory, tmp_path / "memory.safetensors")
        here = model(ids[:, :40], cache=memory.fork()).logits.cpu()
        model.to("cpu")
        there = model(ids[:, :40].cpu(), cache=model.load_memory(tmp_path / "memory.safetensors")).logits
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_generate_streams_a_left_padded_batch(backbone_config):
    model = make_model(backbone_config, torch.bfloat16)
    ids, mask = random_ids(2, 150), torch.ones(2, 150, dtype=torch.long, device="cuda")
    mask[0, :30] = 0
    output = model.generate(ids, attention_mask=mask, max_new_tokens=100, do_sample=False)
    assert output.shape == (2, 250)


# Decode at fixed shapes, compiled and captured


def decode(model: ARMTForCausalLM, cache: ARMTCache, ids: torch.Tensor, real: torch.Tensor | None = None):
    """Logits of `(B, T)` ids, one column at a time; `real` `(B, T)` says which are not padding."""
    logits = []
    for n, tokens in enumerate(ids.split(1, dim=1)):
        mask = None if real is None else real[:, n, None]
        logits.append(model(tokens, attention_mask=mask, cache=cache).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_the_forward_of_a_token(backbone_config, rows: int, dtype: torch.dtype):
    model = make_model(backbone_config, dtype)
    ids, mask = random_ids(rows, 90), torch.ones(rows, 90, dtype=torch.long, device="cuda")
    mask[: rows // 2, :40] = 0  # rows fill their segments at different steps
    cache = model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1).cache
    more, other = random_ids(rows, 220), cache.fork()
    real = torch.rand(rows, 220, generator=torch.Generator().manual_seed(0)) > (0.1 if rows > 1 else -1)
    expected = decode(model, cache, more, real.cuda())
    found = decode(model.compile_armt(), other, more, real.cuda())
    assert other.lent_to is model.fast.decode, model.fast.decode.reason
    assert model.fast.decode.step.is_captured
    error = ((found - expected).float().norm() / expected.float().norm()).item()
    print(f"{dtype} {rows} rows: error {error:.1e}, prepared in {model.fast.decode.prepare_seconds:.0f} s")
    assert error <= (1e-3 if dtype == torch.float32 else 5e-2)
    assert (other.opened, other.segments, other.tokens) == (cache.opened, cache.segments, cache.tokens)
    for layer, state in other.states.items():
        expected = cache.states[layer].A
        assert ((state.A - expected).norm() / expected.norm()).item() <= (1e-3 if dtype == torch.float32 else 5e-2)


@torch.no_grad()
def test_weights_that_move_or_change_are_captured_again(backbone_config):
    model = make_model(backbone_config, torch.float32)
    cache, ids = model(random_ids(1, 90)).cache, random_ids(1, 20)
    other = cache.fork()
    model.compile_armt()
    decode(model, other, ids)
    prepared = model.fast.decode
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data
    found = decode(model, cache.fork(), ids)
    assert model.fast.decode is prepared and prepared.step.is_captured
    expected = decode(model.compile_armt(False), cache.fork(), ids)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_generate_streams_without_end_in_constant_memory_when_captured(backbone_config):
    model = make_model(backbone_config, torch.bfloat16).compile_armt()
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    peaks = []
    for new_tokens in (200, 200, 1000):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        output = model.generate(random_ids(4, 50), max_new_tokens=new_tokens, **options)
        peaks.append(torch.cuda.max_memory_allocated())
        assert output.cache.lent_to is model.fast.decode
    assert peaks[2] <= 1.01 * peaks[1]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_reading_ahead_changes_nothing(backbone_config, rows: int, monkeypatch):
    """Over segment borders, and at an end that is not known before; then the conversation goes on."""
    model = make_model(backbone_config, torch.bfloat16).compile_armt()
    ids, begun, stats = random_ids(rows, 70), [], []
    begin = decode_armt.FixedShapes.begin
    monkeypatch.setattr(
        decode_armt.FixedShapes, "begin", lambda self, *a: (begin(self, *a), begun.append(self.begun is not None))
    )
    options = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": list(range(8)), "pad_token_id": 0}
    results = []
    for devices in ({"cuda"}, set()):
        monkeypatch.setattr(decode_armt, "READS_AHEAD", devices)
        output = model.generate(ids, return_dict_in_generate=True, **options)
        cache = output.cache
        logits = model(random_ids(rows, 1), cache=cache).logits
        stats.append(cache.stats())
        results.append((output.sequences, logits, *(state.A for state in cache.states.values())))
        assert any(begun) == bool(devices)
        begun.clear()
    assert stats[0] == stats[1]
    for ahead, plain in zip(*results, strict=True):
        assert torch.equal(ahead, plain)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 32])
def test_speed_of_decoding_on_the_shape_of_llama_3_2_1b(rows: int):
    """Prints tokens per second (`pytest -s`); that they are more than without compiled code is all it asserts."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        model = ARMTForCausalLM.from_backbone(backbone, segment_size=1024, num_mem_tokens=128, d_mem=64)
    cache, token = model(random_ids(rows, 1500), logits_to_keep=1).cache, random_ids(rows, 1)

    def speed(steps: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            model(token, cache=cache)
        torch.cuda.synchronize()
        return rows * steps / (time.perf_counter() - start)

    usual = speed(50)
    model.compile_armt()
    speed(1100)  # compiles, and captures a flush
    speed(1100)
    fast = speed(3 * 1024 + 100)
    start = time.perf_counter()
    ids = random_ids(rows, 1500)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=3100, **options)
    torch.cuda.synchronize()
    generated = rows * 3100 / (time.perf_counter() - start)
    decode = model.fast.decode
    print(
        f"\n{torch.cuda.get_device_name()}, {rows} rows: {usual:.0f} tokens/s as it is, {fast:.0f} compiled, "
        f"{generated:.0f} under generate (prefill included); prepared in {decode.prepare_seconds:.0f} s"
    )
    assert decode.step.is_captured and fast > 2 * usual


@pytest.mark.parametrize("lanes", ["one lane", "all lanes"])
@torch.no_grad()
def test_captured_diagonals_are_the_sequential_schedule(backbone_config, lanes: str, monkeypatch):
    monkeypatch.setattr(groups_armt, "FULL_DIAGONAL", 1 if lanes == "one lane" else 1 << 20)
    model, ids = make_model(backbone_config, torch.float32), random_ids(3, 500)
    mask = torch.ones_like(ids)
    mask[0, :130], mask[1, 400:] = 0, 0
    expected = model(ids, attention_mask=mask, schedule="sequential")
    model.compile_armt()
    for _ in range(3):  # compiled, captured, replayed
        found = model(ids, attention_mask=mask, schedule="diagonal")
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
        for layer, state in expected.cache.states.items():
            torch.testing.assert_close(found.cache.states[layer].A, state.A, atol=1e-3, rtol=1e-3)
    assert any(call.graph is not None for call in model.fast.diagonal[0].idle[0].calls.values())
    for layer in model.decoder.layers:  # in place: graphs see it
        layer.mlp.up_proj.weight.mul_(1.1)
    found = model(ids, attention_mask=mask, schedule="diagonal").logits
    expected = model.compile_armt(False)(ids, attention_mask=mask, schedule="sequential").logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_compiled_diagonals_have_the_gradients_of_the_sequential_schedule(backbone_config):
    model, ids = make_model(backbone_config, torch.float32).train(), random_ids(2, 500)
    gradients = []
    for compiled, schedule in ((False, "sequential"), (True, "diagonal")):
        model.compile_armt(compiled).zero_grad()
        model(ids, labels=ids, return_logits=False, schedule=schedule).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-2)


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)  # peft asks by the old name
@torch.no_grad()
def test_captured_diagonals_see_what_training_changes(backbone_config):
    model, ids = make_model(backbone_config, torch.bfloat16), random_ids(1, 1000)
    adapted = get_peft_model(model, lora_config(model, r=4)).train()
    weights = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]

    def last_memory() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):  # casts of weights are kept while it lasts
            return model.read(ids, schedule="diagonal").cache.states[3].A

    model.compile_armt()
    before = [last_memory() for _ in range(3)][-1]  # compiled, captured, replayed
    for weight in weights:
        weight.add_(0.02 * torch.randn_like(weight))
    after = last_memory()
    model.compile_armt()  # compiled, nothing captured yet
    expected = last_memory()
    assert (after - expected).norm() <= 1e-3 * expected.norm()
    assert (after - before).norm() > 0.1 * expected.norm()
