"""
Loss and gradients: the labels of any causal language model of transformers, across segment borders; and the three ways
to train on long texts with bounded memory (loss by segment, checkpoints per segment, truncated backpropagation).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SEGMENT_SIZE, VOCABULARY, add_memory, random_ids, tiny_backbone, tiny_model
from helpers import CHECKPOINTING, cache_contents, difference, enable_checkpointing, pad_left, pad_right, same
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from modeling_armt import ARMTCache, ARMTForCausalLM, replica_armt
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.training.trainer import one_device


LENGTH = 3 * SEGMENT_SIZE + 3
SEGMENTS = 4
Gradients = dict[str, torch.Tensor]

every_way = pytest.mark.parametrize("return_logits", [True, False], ids=["with logits", "by segment"])


@pytest.fixture
def model() -> ARMTForCausalLM:
    return tiny_model("llama").train()


def loss_and_gradients(model: ARMTForCausalLM, ids: torch.Tensor, **kwargs) -> tuple[torch.Tensor, Gradients]:
    """The loss with `ids` as labels unless others are given, and the gradients of all parameters that got one."""
    model.zero_grad()
    loss = model(ids, **{"labels": ids, **kwargs}).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: tuple[torch.Tensor, Gradients], expected: tuple[torch.Tensor, Gradients], rtol: float = 1e-6):
    """Losses are computed in float32, so that their gradients are equal to its precision only."""
    assert found[0].item() == pytest.approx(expected[0].item(), rel=rtol)
    assert found[1].keys() == expected[1].keys()
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert difference(found[1][name], gradient) <= rtol * scale, name


def assert_identical(found: tuple[torch.Tensor, Gradients], expected: tuple[torch.Tensor, Gradients]):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The definition: `(B, T, V)` logits predict the label one place on."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


# The loss


@every_way
def test_the_loss_of_one_segment_is_the_backbones(return_logits: bool):
    backbone, ids = tiny_backbone(FAMILIES["llama"]), random_ids(2, SEGMENT_SIZE)
    expected = backbone(ids, labels=ids).loss
    loss = add_memory(backbone)(ids, labels=ids, return_logits=return_logits).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@every_way
def test_the_loss_of_several_segments_is_the_cross_entropy_of_all_logits(return_logits: bool, model):
    ids = random_ids(2, LENGTH)
    expected = mean_cross_entropy(model(ids).logits, ids)
    assert model(ids, labels=ids, return_logits=return_logits).loss.item() == pytest.approx(expected.item(), rel=1e-6)


@every_way
def test_labels_of_minus_100_are_left_out(return_logits: bool, model):
    ids = random_ids(2, LENGTH)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
    expected = mean_cross_entropy(model(ids).logits, labels)
    loss = model(ids, labels=labels, return_logits=return_logits).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@every_way
@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("masked", [True, False], ids=["padding masked in the labels", "labels equal ids"])
def test_padding_does_not_count(return_logits: bool, pad, masked: bool, model):
    rows = [random_ids(length, seed=length) for length in (LENGTH, 5, SEGMENT_SIZE + 1)]
    losses = [mean_cross_entropy(model(row[None]).logits, row[None]) * (len(row) - 1) for row in rows]
    expected = sum(losses) / sum(len(row) - 1 for row in rows)
    ids, mask = pad(rows)
    labels = ids.masked_fill(mask == 0, -100) if masked else ids
    loss = model(ids, attention_mask=mask, labels=labels, return_logits=return_logits).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@every_way
def test_num_items_in_batch_replaces_the_count_of_labels(return_logits: bool, model):
    ids = random_ids(2, LENGTH)
    mean = model(ids, labels=ids, return_logits=return_logits).loss.item()
    loss = model(ids, labels=ids, return_logits=return_logits, num_items_in_batch=torch.tensor(1000)).loss.item()
    assert loss == pytest.approx(mean * 2 * (LENGTH - 1) / 1000, rel=1e-6)


@every_way
def test_without_any_label_the_loss_is_nan_as_in_other_models(return_logits: bool, model):
    ids = random_ids(2, LENGTH)
    loss = model(ids, labels=torch.full_like(ids, -100), return_logits=return_logits).loss
    assert loss.isnan()


@every_way
def test_a_micro_batch_without_any_label_adds_nothing_to_the_batch(return_logits: bool, model):
    ids = random_ids(2, LENGTH)
    options = {"labels": torch.full_like(ids, -100), "num_items_in_batch": 10, "return_logits": return_logits}
    loss, gradients = loss_and_gradients(model, ids, **options)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_library_that_computes_the_loss_itself_gets_the_same(model):
    """From the hidden states of `base_model` and the head, as TRL does, which puts its own forward into the model."""
    ids = random_ids(2, LENGTH)
    expected = loss_and_gradients(model, ids)

    def forward(input_ids: torch.Tensor):
        return model.get_output_embeddings()(model.base_model(input_ids, use_cache=False).last_hidden_state)

    model.zero_grad()
    model.forward = forward
    loss = mean_cross_entropy(model(ids), ids)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.detach(), gradients), expected)


def test_logits_come_back_with_labels(model):
    ids = random_ids(2, LENGTH)
    assert torch.equal(model(ids, labels=ids).logits, model(ids).logits)


# The loss by segment


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "opt_projected", "gpt_neox", "mixtral"])
def test_the_loss_by_segment_has_the_same_gradients(name: str):
    """Softcaps, scales and projections of the head included."""
    model, ids = tiny_model(name), random_ids(2, LENGTH)  # without dropout
    rtol = 1e-6 if model.dtype == torch.float64 else 1e-5
    assert_close(loss_and_gradients(model, ids, return_logits=False), loss_and_gradients(model, ids), rtol)


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_the_loss_by_segment_has_the_same_gradients_in_a_padded_batch(pad, model):
    ids, mask = pad([random_ids(length, seed=length) for length in (LENGTH, 5, SEGMENT_SIZE + 1)])
    found = loss_and_gradients(model, ids, attention_mask=mask, return_logits=False)
    assert_close(found, loss_and_gradients(model, ids, attention_mask=mask))


@pytest.mark.parametrize("labelled", [slice(0, 3), slice(10, 12), slice(LENGTH - 1, LENGTH)], ids=str)
def test_the_loss_by_segment_has_the_same_gradients_with_few_labels(labelled: slice, model):
    ids = random_ids(2, LENGTH)
    labels = torch.full_like(ids, -100)
    labels[:, labelled] = ids[:, labelled]
    found = loss_and_gradients(model, ids, labels=labels, return_logits=False)
    expected = loss_and_gradients(model, ids, labels=labels)
    for name in expected[1].keys() - found[1].keys():  # no gradient at all instead of one of zero
        found[1][name] = torch.zeros_like(expected[1][name])
    assert_close(found, expected)


class Kept:
    """A tensor that autograd keeps for a backward, and the count of the bytes of all of them."""

    bytes_now = bytes_at_most = 0

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.detach()  # with its graph, the output of an operation would keep the operation itself
        Kept.bytes_now += tensor.nbytes
        Kept.bytes_at_most = max(Kept.bytes_now, Kept.bytes_at_most)

    def __del__(self):
        Kept.bytes_now -= self.tensor.nbytes


def kept_for_backward(model: ARMTForCausalLM, length: int, **kwargs) -> tuple[int, list[torch.Size]]:
    """Most bytes that a forward with loss keeps at a time for a backward, parameters aside, and all shapes kept."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    ids, shapes = random_ids(1, length), []

    def pack(tensor: torch.Tensor) -> Kept | torch.Tensor:
        if tensor.untyped_storage().data_ptr() in parameters:
            return tensor
        shapes.append(tensor.shape)
        return Kept(tensor)

    def unpack(kept: Kept | torch.Tensor) -> torch.Tensor:
        return kept.tensor if isinstance(kept, Kept) else kept

    Kept.bytes_now = Kept.bytes_at_most = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = model(ids, labels=ids, **kwargs).loss
    assert loss.requires_grad
    return Kept.bytes_at_most, shapes


def size_kept_for_backward(model: ARMTForCausalLM, length: int, **kwargs) -> int:
    return kept_for_backward(model, length, return_logits=False, **kwargs)[0]


def hidden_size_of(model: ARMTForCausalLM, positions: int) -> int:
    """Bytes of so many hidden states."""
    return positions * model.config.text_config.hidden_size * model.dtype.itemsize


def test_the_loss_by_segment_makes_the_logits_of_one_segment_at_a_time(model):
    columns = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, logits: columns.append(logits.shape[1]))
    ids = random_ids(1, LENGTH)
    model(ids, labels=ids, return_logits=False)
    assert columns == [SEGMENT_SIZE] * 3 + [3]


@every_way
def test_only_the_loss_by_segment_keeps_no_logits_for_backward(return_logits: bool, model):
    shapes = kept_for_backward(model, LENGTH, return_logits=return_logits)[1]
    assert any(len(shape) > 1 and shape[-1] == VOCABULARY for shape in shapes) == return_logits


def test_without_checkpoints_everything_is_kept_for_backward(model):
    per_segment = (
        size_kept_for_backward(model, 12 * SEGMENT_SIZE) - size_kept_for_backward(model, 4 * SEGMENT_SIZE)
    ) / 8
    assert per_segment > hidden_size_of(model, 50 * SEGMENT_SIZE)


def test_with_checkpoints_no_activations_are_kept_for_backward(model):
    enable_checkpointing(model)
    per_segment = (
        size_kept_for_backward(model, 12 * SEGMENT_SIZE) - size_kept_for_backward(model, 4 * SEGMENT_SIZE)
    ) / 8
    assert per_segment < hidden_size_of(model, 4 * SEGMENT_SIZE)


def test_truncation_bounds_what_is_kept_for_backward(model):
    short, long = (size_kept_for_backward(model, segments * SEGMENT_SIZE, bptt_segments=2) for segments in (6, 12))
    assert 0 < long <= short


# Gradient checkpointing


@every_way
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_checkpoints_change_neither_loss_nor_gradients(name: str, return_logits: bool):
    model, ids = tiny_model(name).train(), random_ids(2, LENGTH)
    expected = loss_and_gradients(model, ids, return_logits=return_logits)
    enable_checkpointing(model)
    assert_identical(loss_and_gradients(model, ids, return_logits=return_logits), expected)


@every_way
def test_checkpoints_draw_the_same_dropout(return_logits: bool):
    model, ids = tiny_model("gpt2").train(), random_ids(2, LENGTH)
    assert model.config.text_config.resid_pdrop > 0
    torch.manual_seed(0)
    expected = loss_and_gradients(model, ids, return_logits=return_logits)
    enable_checkpointing(model)
    torch.manual_seed(0)
    assert_identical(loss_and_gradients(model, ids, return_logits=return_logits), expected)


@every_way
def test_checkpoints_change_nothing_in_a_padded_batch_with_truncation(return_logits: bool, model):
    ids, mask = pad_left([random_ids(length, seed=length) for length in (LENGTH, 5, SEGMENT_SIZE + 1)])
    options = {"attention_mask": mask, "bptt_segments": 2, "return_logits": return_logits}
    expected = loss_and_gradients(model, ids, **options)
    enable_checkpointing(model)
    assert_identical(loss_and_gradients(model, ids, **options), expected)


def test_checkpoints_change_nothing_with_a_cache(model):
    ids, caches = random_ids(2, LENGTH), [ARMTCache(), ARMTCache()]
    expected = loss_and_gradients(model, ids, cache=caches[0])
    enable_checkpointing(model)
    assert_identical(loss_and_gradients(model, ids, cache=caches[1]), expected)
    assert same(cache_contents(caches[1]), cache_contents(caches[0]))


@pytest.mark.parametrize("loaded", [False, True], ids=["read", "loaded"])
def test_training_goes_on_from_a_memory_of_inference_mode(loaded: bool, model, tmp_path):
    text, ids = random_ids(2, SEGMENT_SIZE + 3), random_ids(2, LENGTH, seed=1)
    with torch.no_grad():
        memory = model(text, use_cache=True).cache
    expected = loss_and_gradients(model, ids, cache=memory.fork())
    with torch.inference_mode():
        memory = model(text, use_cache=True).cache
        if loaded:
            model.save_memory(memory, tmp_path / "memory.safetensors")
            memory = model.load_memory(tmp_path / "memory.safetensors")
    assert memory.states[0].A.is_inference()
    assert_identical(loss_and_gradients(model, ids, cache=memory), expected)


def test_checkpoints_train_a_memory_on_a_frozen_backbone(model):
    model.model.requires_grad_(False)
    ids = random_ids(2, LENGTH)
    expected = loss_and_gradients(model, ids, return_logits=False)
    enable_checkpointing(model)
    assert_identical(loss_and_gradients(model, ids, return_logits=False), expected)


def test_checkpoints_can_be_switched_off(model):
    enable_checkpointing(model)
    getattr(model, f"{CHECKPOINTING}_disable")()
    assert size_kept_for_backward(model, LENGTH) > hidden_size_of(model, 50 * SEGMENT_SIZE)


@every_way
def test_layers_that_fsdp_wraps_for_checkpointing_have_the_same_gradients(return_logits: bool, model):
    ids = random_ids(2, LENGTH)
    expected = loss_and_gradients(model, ids, return_logits=return_logits)
    for index, layer in enumerate(model.decoder.layers):
        model.decoder.layers[index] = checkpoint_wrapper(layer)
    loss, gradients = loss_and_gradients(model, ids, return_logits=return_logits)
    plain = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in gradients.items()}
    assert_identical((loss, plain), expected)
    with pytest.raises(ValueError, match="wrapped for activation checkpointing"):
        model(ids, schedule="diagonal")


def test_reentrant_checkpoints_are_refused(model):
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradients"):
        enable_checkpointing(model, use_reentrant=True)


def test_checkpoints_inside_the_backbone_are_refused(model):
    enable_checkpointing(model.model)
    with pytest.raises(ValueError, match="on the ARMT model instead"):
        model(random_ids(1, LENGTH))


# Truncated backpropagation


def windowed(model: ARMTForCausalLM, ids: torch.Tensor, detach_before: set[int]) -> tuple[torch.Tensor, Gradients]:
    """Loss and gradients of reading segment by segment, with the memory detached before some segments."""
    model.zero_grad()
    cache, logits = ARMTCache(), []
    for number, segment in enumerate(ids.split(SEGMENT_SIZE, dim=1)):
        if number in detach_before:
            cache.states = {layer: state.map(torch.Tensor.detach) for layer, state in cache.states.items()}
        logits.append(model(segment, cache=cache).logits)
    loss = mean_cross_entropy(torch.cat(logits, dim=1), ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_way
@pytest.mark.parametrize(("bptt_segments", "detach_before"), [(1, {1, 2, 3}), (2, {2}), (3, {1}), (None, set())])
def test_truncation_detaches_the_memory_between_windows(
    bptt_segments: int | None, detach_before: set[int], return_logits: bool, model
):
    """Windows are counted from the end of the text, so that its last tokens have a full one."""
    ids = random_ids(2, LENGTH)
    found = loss_and_gradients(model, ids, bptt_segments=bptt_segments, return_logits=return_logits)
    assert_close(found, windowed(model, ids, detach_before))


def test_a_window_of_one_segment_trains_no_writes(model):
    gradients = loss_and_gradients(model, random_ids(2, LENGTH), bptt_segments=1)[1]
    writing = [name for name in gradients if any(part in name for part in ("_key", "_value", "_beta"))]
    assert not any(gradients[name].any() for name in writing if name.startswith("memory."))


@every_way
@pytest.mark.parametrize("bptt_segments", [SEGMENTS, SEGMENTS + 5])
def test_a_window_as_long_as_the_text_is_no_truncation(bptt_segments: int, return_logits: bool, model):
    ids = random_ids(2, LENGTH)
    found = loss_and_gradients(model, ids, bptt_segments=bptt_segments, return_logits=return_logits)
    assert_identical(found, loss_and_gradients(model, ids, return_logits=return_logits))


@pytest.mark.parametrize("labelled", [slice(LENGTH - 2, LENGTH), slice(10, 13)], ids=str)
def test_the_loss_by_segment_truncates_alike_with_few_labels(labelled: slice, model):
    ids = random_ids(2, LENGTH)
    labels = torch.full_like(ids, -100)
    labels[:, labelled] = ids[:, labelled]
    found = loss_and_gradients(model, ids, labels=labels, bptt_segments=2, return_logits=False)
    expected = loss_and_gradients(model, ids, labels=labels, bptt_segments=2)
    for name in expected[1].keys() - found[1].keys():
        found[1][name] = torch.zeros_like(expected[1][name])
    assert_close(found, expected)


@every_way
@pytest.mark.parametrize("bptt_segments", [None, 2])
def test_gradients_scale_with_the_loss_and_add_up(bptt_segments: int | None, return_logits: bool, model):
    """As gradient scalers and accumulation need it."""
    ids, options = random_ids(2, LENGTH), {"bptt_segments": bptt_segments, "return_logits": return_logits}
    expected = loss_and_gradients(model, ids, **options)
    model.zero_grad()
    for factor in (3.0, -0.5):
        (model(ids, labels=ids, **options).loss * factor).backward()
    found = {name: parameter.grad / 2.5 for name, parameter in model.named_parameters()}
    assert_close((expected[0], found), expected)


@every_way
@pytest.mark.parametrize("bptt_segments", [None, 2])
def test_gradients_reach_given_embeddings(bptt_segments: int | None, return_logits: bool, model):
    """As prompt tuning needs it."""
    ids = random_ids(2, LENGTH)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    options = {"bptt_segments": bptt_segments, "return_logits": return_logits}
    model(inputs_embeds=embeddings, labels=ids, **options).loss.backward()
    assert embeddings.grad is not None and (embeddings.grad.abs().amax(dim=2) > 0).all(dim=0)[: LENGTH - 1].all()


@every_way
def test_a_text_can_be_trained_in_several_calls(return_logits: bool, model):
    """With a cache from call to call; its end is the end of a window too."""
    ids, cache = random_ids(2, 2 * LENGTH), ARMTCache()
    for part in ids.split(LENGTH, dim=1):
        output = model(part, labels=part, cache=cache, bptt_segments=2, return_logits=return_logits)
        output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("bptt_segments", [0, -1, 1.5, "2"])
def test_bad_windows_are_refused(bptt_segments, model):
    with pytest.raises(ValueError, match="bptt_segments is"):
        model(random_ids(1, LENGTH), labels=random_ids(1, LENGTH), bptt_segments=bptt_segments)


# Models in training


def test_gradients_reach_every_parameter(model):
    gradients = loss_and_gradients(model, random_ids(2, LENGTH), return_logits=False)[1]
    assert [name for name, _ in model.named_parameters() if not gradients[name].any()] == []


def test_a_fresh_memory_can_start_to_learn():
    """Its values are zero, so that nothing flows into what multiplies them; the values themselves learn."""
    model = tiny_model("llama").train()
    for memory in model.memory.values():
        torch.nn.init.zeros_(memory.memory_value.weight)
    gradients = loss_and_gradients(model, random_ids(2, LENGTH))[1]
    assert all(gradients[f"memory.{layer}.memory_value.weight"].any() for layer in model.memory)


def test_a_copy_trains_itself_and_not_the_original(model):
    twin, ids = copy.deepcopy(model), random_ids(2, LENGTH)
    expected = loss_and_gradients(model, ids)
    model.zero_grad()
    assert_identical(loss_and_gradients(twin, ids), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_makes_no_cache_unless_asked(model):
    ids = random_ids(1, LENGTH)
    assert model(ids).cache is None
    assert isinstance(model(ids, use_cache=True).cache, ARMTCache)


def test_mixed_precision_keeps_the_memory_in_float32(model):
    model, ids = model.float(), random_ids(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, use_cache=True)
    output.loss.backward()
    assert all(state.A.dtype == torch.float32 for state in output.cache.states.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Parameters that a text does not use


UNUSED = {
    "a text of one segment": {"length": SEGMENT_SIZE},
    "labels in the first segment": {"labelled": slice(0, 3)},
    "a window of one segment": {"bptt_segments": 1},
}


def loss_of(model: torch.nn.Module, length: int = LENGTH, labelled: slice = slice(None), **options) -> torch.Tensor:
    ids = random_ids(2, length)
    labels = torch.full_like(ids, -100)
    labels[:, labelled] = ids[:, labelled]
    return model(ids, labels=labels, **options).loss


@every_way
@pytest.mark.parametrize("options", UNUSED.values(), ids=UNUSED)
def test_memories_that_a_text_does_not_use_get_a_gradient_of_zero(return_logits: bool, options: dict, model):
    model.model.requires_grad_(False)
    loss = loss_of(model, return_logits=return_logits, **options)
    with torch.no_grad():
        assert torch.equal(loss, loss_of(model, return_logits=return_logits, **options))
    loss.backward()
    writing = [name for name, _ in model.memory.named_parameters() if "query" not in name]
    gradients = {name: parameter.grad for name, parameter in model.memory.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert not any(gradients[name].any() for name in writing)
    assert model.memory_tokens.weight.grad is not None and not model.memory_tokens.weight.grad.any()


def test_infinite_weights_that_a_text_does_not_use_change_nothing(model):
    expected = loss_and_gradients(model, random_ids(2, SEGMENT_SIZE))
    torch.nn.init.constant_(model.memory_tokens.weight, torch.inf)
    found = loss_and_gradients(model, random_ids(2, SEGMENT_SIZE))
    assert_identical(found, expected)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT uses the old name
@every_way
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_data_parallel_training_waits_for_no_gradient(return_logits: bool, adapted: bool, model, process_group):
    """As the Trainer has it with gradient checkpointing; after a gradient that is missing the next forward fails."""
    enable_checkpointing(model)
    if adapted:
        model = get_peft_model(model, lora_config(model)).train()
    parallel = DistributedDataParallel(model, find_unused_parameters=False)
    for options in (*UNUSED.values(), {}):
        loss_of(parallel, return_logits=return_logits, **options).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


# Under the stock Trainer


def batch_of(pad: Callable, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    ids, mask = pad([random_ids(length, seed=length) for length in lengths])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer_for(model: torch.nn.Module, folder: Path, **options) -> Trainer:
    return Trainer(model, TrainingArguments(folder, report_to="none", use_cpu=True, disable_tqdm=True, **options))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT uses the old name
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_smoothed_labels_are_shifted_as_for_the_backbone(adapted: bool, tmp_path):
    backbone, ids = tiny_backbone(FAMILIES["llama"]), random_ids(2, SEGMENT_SIZE)

    def smoothed_loss(model: torch.nn.Module) -> float:
        trainer = trainer_for(model, tmp_path, label_smoothing_factor=0.1)
        return trainer.compute_loss(model, {"input_ids": ids, "labels": ids}).item()

    expected = smoothed_loss(backbone)
    model = ARMTForCausalLM.from_backbone(backbone, segment_size=SEGMENT_SIZE)
    if adapted:
        model = get_peft_model(model, lora_config(model))
    assert smoothed_loss(model) == pytest.approx(expected, rel=1e-9)


@every_way
@pytest.mark.parametrize("pad", [pad_left, pad_right])
@pytest.mark.parametrize("masked", [True, False], ids=["padding masked in the labels", "labels equal ids"])
def test_the_trainer_divides_by_the_targets_that_are_summed(return_logits: bool, pad, masked: bool, model, tmp_path):
    """It counts the first token of a row that begins behind padding, which nothing predicts here."""
    batch = batch_of(pad, (LENGTH, 5, 3))
    if not masked:
        batch["labels"] = batch["input_ids"]
    trainer = trainer_for(model, tmp_path)
    _, number = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    found = trainer.compute_loss(model, batch | {"return_logits": return_logits}, num_items_in_batch=number)
    assert found.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_of_several_batches_in_a_step_each_counts_by_its_labels(model, tmp_path):
    batches = [batch_of(pad_right, (LENGTH, 5)), batch_of(pad_left, (5, 3))]
    trainer = trainer_for(model, tmp_path)
    _, number = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    found = sum(trainer.compute_loss(model, dict(batch), num_items_in_batch=number).item() for batch in batches)
    first, second = (model(**batch).loss.item() for batch in batches)
    counts = LENGTH - 1 + 4, 4 + 3  # of the second batch, 7 labels are behind the first column
    assert found == pytest.approx((counts[0] * first + counts[1] * second) / sum(counts), rel=1e-6)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["plain", "checkpointed"])
def test_the_stock_trainer_trains_and_evaluates(checkpoints: bool, tmp_path):
    model = tiny_model("llama").float()
    rows = [random_ids(length, seed=length) for length in (LENGTH, 5, SEGMENT_SIZE + 1, LENGTH - 1) * 4]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def collate(texts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ids, mask = pad_right(texts)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    options = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{CHECKPOINTING: checkpoints},
    )
    trainer = Trainer(model, options, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_the_trainer_predicts_logits_for_metrics(tmp_path):
    model, ids = tiny_model("llama").float(), random_ids(4, LENGTH)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True))
    assert trainer.predict(rows).predictions.shape == (4, LENGTH, VOCABULARY)


# Several devices without a launcher: the Trainer wraps a model in nn.DataParallel


def test_what_data_parallel_takes_for_copies_trains_the_model_itself(model, monkeypatch):
    messages = []
    monkeypatch.setattr(replica_armt.logger, "warning_once", messages.append)
    ids = random_ids(2, 2 * SEGMENT_SIZE, seed=3)
    expected = loss_and_gradients(model, ids)
    copies = [model._replicate_for_data_parallel() for _ in range(2)]
    assert [*copies[0].parameters()] == [] and copies[0].training and copies[0].config is model.config
    model.zero_grad()
    with ThreadPoolExecutor(2) as threads:
        losses = [*threads.map(lambda copy, row: copy(input_ids=row, labels=row).loss, copies, ids.split(1))]
    loss = sum(losses) / 2
    loss.backward()
    assert_close((loss.detach(), {name: p.grad for name, p in model.named_parameters()}), expected)
    assert "accelerate launch" in messages[0]


def test_training_arguments_take_one_device_of_several(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    assert one_device(arguments).n_gpu <= 1
    arguments._n_gpu = 2
    with pytest.warns(UserWarning, match="one of 2 GPUs. To use all: accelerate launch"):
        assert one_device(arguments).n_gpu == 1
