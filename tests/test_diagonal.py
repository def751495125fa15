"""Invariant 6: the diagonal schedule returns what the sequential one returns, states and gradients included."""

import copy
import gc
import itertools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, NUM_MEM_TOKENS, SEGMENT_SIZE, Family, add_memory, random_ids, tiny_backbone, tiny_model
from helpers import cache_contents, difference, enable_checkpointing, examples, pad_left, pad_right, same
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt import diagonal_armt as diagonal_module
from modeling_armt import groups_armt as groups_module
from modeling_armt import schedule_armt as schedule_module
from modeling_armt.attachment_armt import find_decoder_layers
from modeling_armt.diagonal_armt import Pipeline
from modeling_armt.segmentation_armt import plan_pipeline
from modeling_armt.stacking_armt import named_tensors, stacked


LENGTH = 6 * SEGMENT_SIZE + 3
NOT_GROUPED = {
    "bloom": "autograd.Function",  # its own gelu
    "jetmoe": "storage",  # its experts look at the addresses of their weights
    "gemma4_text": "called with a",  # a dict in which layers hand keys on
}


def deep(name: str) -> Family:
    """The family with so many layers that every kind of layer comes twice."""
    family = FAMILIES[name]
    options = dict(family.options)
    layers = options.get("num_hidden_layers", 2)
    for key in ("layer_types", "no_rope_layers"):
        if key in options:
            options[key] = options[key] * 2
    if "attention_types" in options:
        options["attention_types"] = [[["global", "local"], 2]]
    return replace(family, options={**options, "num_hidden_layers": 2 * layers})


def deep_model(name: str = "llama", **options) -> ARMTForCausalLM:
    return add_memory(tiny_backbone(deep(name)), **options)


def memories(cache: ARMTCache) -> dict[str, torch.Tensor]:
    """All that a cache remembers but the open segment, whose columns may be filled up differently."""
    contents = cache_contents(cache)["tensors"]
    return {name: tensor for name, tensor in contents.items() if not name.startswith(("keys", "values"))}


def compare(model: ARMTForCausalLM, tolerance: float, ids: torch.Tensor, **kwargs):
    """Reads with and without a cache in both schedules, and goes on from there."""
    for cached in (False, True):
        plain, fast = (model(ids, use_cache=cached, schedule=s, **kwargs) for s in ("sequential", "diagonal"))
        assert difference(fast.logits, plain.logits) <= tolerance
    a, b = plain.cache, fast.cache
    assert memories(a).keys() == memories(b).keys()
    for name, value in memories(a).items():
        finite = value.isfinite()
        assert torch.equal(finite, memories(b)[name].isfinite()), name
        scale = max(1.0, value[finite].abs().max().item()) if finite.any() else 1.0
        assert difference(memories(b)[name][finite], value[finite]) <= tolerance * scale, name
    for name in ("tokens", "segments", "opened", "columns"):
        assert getattr(a, name) == getattr(b, name), name
    more = random_ids(len(ids), 2 * SEGMENT_SIZE + 1, seed=9)
    plain = model(more, cache=a, schedule="sequential")
    fast = model(more, cache=b, schedule="diagonal")
    assert difference(fast.logits, plain.logits) <= 2 * tolerance


class TestEveryFamily:
    @pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_GROUPED])
    @torch.no_grad()
    def test_schedules_agree(self, name: str):
        model = deep_model(name)
        tolerance = FAMILIES[name].tolerance * (10 if FAMILIES[name].dtype == torch.float32 else 1)
        compare(model, tolerance, random_ids(2, LENGTH))
        sizes = [len(group.indices) for group in model.fast.diagonal[0].groups]
        # Every layer of diffllama has a constant of its own.
        assert max(sizes) > 1 or name == "diffllama"

    @pytest.mark.parametrize(("name", "reason"), NOT_GROUPED.items())
    @torch.no_grad()
    def test_families_that_cannot_be_grouped_say_so(self, name: str, reason: str):
        model, ids = deep_model(name), random_ids(1, LENGTH)
        for _ in range(2):  # the second time from memory
            with pytest.raises(ValueError, match=rf"{name} .*diagonal.*{reason}"):
                model(ids, schedule="diagonal")
        assert torch.equal(model(ids).logits, model(ids, schedule="sequential").logits)

    def test_layers_of_different_kinds_are_different_groups(self):
        model = deep_model("gemma3_text")
        model(random_ids(1, LENGTH), schedule="diagonal")
        assert [group.indices for group in model.fast.diagonal[0].groups] == [[0, 2], [1, 3]]

    @torch.no_grad()
    def test_a_group_that_computes_something_else_is_found_out(self, monkeypatch):
        model = deep_model()
        weights = [layer.mlp.up_proj.weight for layer in model.decoder.layers]
        forward = type(model.decoder.layers[0]).forward

        def by_identity(self, *args, **kwargs):  # what cannot be seen from outside
            scale = 1.0 + sum(i for i, weight in enumerate(weights) if self.mlp.up_proj.weight is weight)
            return forward(self, *args, **kwargs) * scale

        monkeypatch.setattr(type(model.decoder.layers[0]), "forward", by_identity)
        with pytest.raises(ValueError, match="do not compute the same"):
            model(random_ids(1, LENGTH), schedule="diagonal")


class TestRefusals:
    """What cannot be run as one is found before anything is read, and told."""

    def refused(self, model: ARMTForCausalLM, reason: str):
        ids = random_ids(1, LENGTH)
        with torch.no_grad():
            with pytest.raises(ValueError, match=reason):
                model(ids, schedule="diagonal")
            assert torch.isfinite(model(ids).logits).all()

    def accepted(self, model: ARMTForCausalLM):
        with torch.no_grad():
            compare(model, 1e-9, random_ids(1, LENGTH))

    @pytest.mark.parametrize("module", ["decoder.layers.1", "decoder.layers.1.mlp", "memory.1.memory_query"])
    def test_hooks_of_others(self, module: str):
        model = deep_model()
        self.accepted(model)
        handle = model.get_submodule(module).register_forward_hook(lambda module, args, output: output * 1.1)
        self.refused(model, "there are hooks on")
        handle.remove()
        self.accepted(model)

    def test_hidden_states_that_transformers_captures_are_no_hooks_of_others(self):
        model = deep_model()
        model(random_ids(1, LENGTH), output_hidden_states=True)
        self.accepted(model)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda x, layer, embeds: (layer(x) if layer is None else x + embeds.mean(), None), "between its layers"),
            (lambda x, layer, embeds: (x, {"scale": embeds.mean()}), "depends on the text"),
        ],
        ids=["between layers", "arguments"],
    )
    def test_decoders_that_do_more_than_run_layers(self, change, reason: str, monkeypatch):
        model = deep_model()
        decoder = type(model.decoder)

        def forward(self, inputs_embeds=None, **kwargs):
            from transformers.modeling_outputs import BaseModelOutputWithPast

            hidden = inputs_embeds
            positions = torch.arange(hidden.shape[1])[None]
            tables = self.rotary_emb(hidden, position_ids=positions)
            for layer in self.layers:
                hidden, extra = change(hidden, layer, inputs_embeds)
                hidden = layer(hidden, position_embeddings=tables, attention_mask=None, **(extra or {}))
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        monkeypatch.setattr(decoder, "forward", forward)
        with torch.no_grad(), pytest.raises(ValueError, match=reason):
            model(random_ids(1, LENGTH), schedule="diagonal")

    @torch.no_grad()
    def test_memory_that_is_short_once_is_no_reason(self, monkeypatch):
        model, ids = deep_model(), random_ids(1, LENGTH)

        def no_room(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(schedule_module, "_pays", lambda model, segments: True)
        with monkeypatch.context() as broken:
            broken.setattr(groups_module.LayerGroups, "check", no_room)
            with pytest.raises(torch.OutOfMemoryError):
                model(ids, schedule="diagonal")
            expected = model(ids).logits
        assert not model.fast.diagonal
        assert difference(model(ids).logits, expected) <= 1e-9
        assert model.fast.diagonal

    def test_layers_that_share_a_weight(self):
        model = deep_model()
        model.decoder.layers[2].mlp.up_proj.weight = model.decoder.layers[1].mlp.up_proj.weight
        self.refused(model, "share a weight")

    def test_a_memory_that_is_no_linear_any_more(self):
        model = deep_model()
        self.accepted(model)
        linear = model.memory["1"].memory_query
        model.memory["1"].memory_query = copy.deepcopy(linear)
        model.memory["1"].memory_query.__class__ = type("OtherLinear", (torch.nn.Linear,), {})
        self.refused(model, "memory_query is a .*OtherLinear")
        model.memory["1"].memory_query = linear
        self.accepted(model)

    def test_memories_of_different_kinds_are_different_groups(self):
        model = deep_model()
        self.accepted(model)
        model.memory["2"].denom_eps = 0.5
        self.accepted(model)

    @torch.no_grad()
    def test_masks_in_a_table(self):
        model = deep_model("gpt_neo_short")
        ids, mask = pad_left([random_ids(n, seed=n) for n in (7, 3)])
        caches = [model(ids, attention_mask=mask, schedule="sequential").cache for _ in range(2)]
        more, more_mask = pad_right([random_ids(n, seed=n) for n in (25, 6)])
        plain, fast = (
            model(more, attention_mask=torch.cat([mask, more_mask], dim=1), cache=cache, schedule=schedule)
            for cache, schedule in zip(caches, ("sequential", "diagonal"), strict=True)
        )
        assert difference(fast.logits, plain.logits) <= 1e-6

    def test_truncation_with_a_cache(self):
        model, ids = deep_model(), random_ids(2, LENGTH)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, labels=ids, use_cache=True, bptt_segments=2, schedule="diagonal")


class TestBatches:
    @torch.no_grad()
    @pytest.mark.parametrize("full", [1, 60, 10_000], ids=["one lane", "few lanes", "all rows side by side"])
    @pytest.mark.parametrize("pad", [pad_left, pad_right])
    def test_rows_of_different_length_in_lanes(self, full: int, pad, monkeypatch):
        monkeypatch.setattr(groups_module, "FULL_DIAGONAL", full)
        rows = [random_ids(length, seed=length) for length in (LENGTH, 10, 3, SEGMENT_SIZE, 17, 40, 24)]
        ids, mask = pad(rows)
        compare(deep_model(), 1e-9, ids, attention_mask=mask)

    @torch.no_grad()
    def test_many_rows_equal_each_row_alone(self, monkeypatch):
        monkeypatch.setattr(groups_module, "FULL_DIAGONAL", 100)
        model, ids = deep_model(), random_ids(9, 2 * SEGMENT_SIZE)
        together = model(ids, schedule="diagonal").logits
        for row, logits in zip(ids, together, strict=True):
            assert difference(logits, model(row[None], schedule="sequential").logits[0]) <= 1e-9

    @torch.no_grad()
    def test_one_memory_for_many_rows(self):
        model = deep_model()
        memory = model(random_ids(1, LENGTH)).cache
        questions = random_ids(3, 2 * SEGMENT_SIZE + 3, seed=1)
        plain = model(questions, cache=memory.fork(), schedule="sequential").logits
        assert difference(model(questions, cache=memory.fork(), schedule="diagonal").logits, plain) <= 1e-9

    @torch.no_grad()
    def test_columns_asked_for(self):
        model, ids = deep_model(), random_ids(2, LENGTH)
        every = model(ids, schedule="sequential").logits
        for keep in (1, SEGMENT_SIZE + 2, torch.tensor([0, 9, 50])):
            kept = model(ids, schedule="diagonal", logits_to_keep=keep).logits
            assert difference(kept, every[:, -keep:] if isinstance(keep, int) else every[:, keep]) <= 1e-9

    @torch.no_grad()
    def test_embeddings_instead_of_ids(self):
        model, ids = deep_model(), random_ids(2, LENGTH)
        embeds = model.get_input_embeddings()(ids)
        plain = model(inputs_embeds=embeds, schedule="sequential").logits
        assert difference(model(inputs_embeds=embeds, schedule="diagonal").logits, plain) <= 1e-9

    @torch.no_grad()
    def test_layers_without_memory(self):
        compare(deep_model(memory_layers=[1, 2]), 1e-9, random_ids(2, LENGTH))

    @torch.no_grad()
    @pytest.mark.parametrize("option", ["use_denom", "correction", "normalize_features"])
    def test_variants_of_the_memory(self, option: str):
        compare(deep_model(**{option: False}), 1e-9, random_ids(2, LENGTH))

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
    def test_normalised_inputs_and_spread_memory_tokens(self, checkpointing: bool):
        model, ids = deep_model(memory_norm=True, spread_memory_tokens=True), random_ids(2, LENGTH)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.startswith("memory."):
                torch.nn.init.normal_(parameter)
        compare(model, 1e-9, ids)
        if checkpointing:
            enable_checkpointing(model.train())
        loss, expected = gradients(model, ids, schedule="sequential")
        fast_loss, found = gradients(model, ids, schedule="diagonal")
        assert fast_loss == pytest.approx(loss, abs=1e-9)
        for parameter, gradient in expected.items():
            assert difference(found[parameter], gradient) <= 1e-8, parameter

    @torch.no_grad()
    def test_statistics_agree(self):
        model, ids = deep_model(), random_ids(3, LENGTH)
        plain, fast = (model(ids, schedule=s).cache.stats() for s in ("sequential", "diagonal"))
        for layer, values in plain.items():
            for name, expected in values.items():
                assert fast[layer][name] == pytest.approx(expected, rel=1e-9), (layer, name)


class TestPlan:
    @given(
        counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
        seed=st.integers(0, 99),
        cached=st.booleans(),
        lanes=st.integers(1, 4),
    )
    @examples(200)
    def test_every_token_is_read_once_and_in_order(self, counts: list[int], seed: int, cached: bool, lanes: int):
        opened = [(seed * (row + 3)) % SEGMENT_SIZE if cached else 0 for row in range(len(counts))]
        steps = plan_pipeline(counts, opened, SEGMENT_SIZE, NUM_MEM_TOKENS, cached, lanes)
        read, filled = [0] * len(counts), list(opened)
        for step in steps:
            rows = list(range(len(counts))) if step.rows is None else step.rows
            assert len(set(rows)) == len(rows)
            for row, start, taken, before, closes in zip(
                rows, step.start, step.taken, step.opened, step.closes, strict=True
            ):
                if taken:
                    assert (start, before) == (read[row], filled[row])
                read[row] += taken
                filled[row] += taken
                assert filled[row] <= SEGMENT_SIZE
                if filled[row] == SEGMENT_SIZE and taken:
                    assert closes == (cached or read[row] < counts[row])
                if closes:
                    filled[row] = 0
        assert read == counts

    def test_rows_queue_for_lanes(self):
        steps = plan_pipeline([16, 40, 8, 24], [0] * 4, 8, 3, True, lanes=2)
        rows = [step.rows for step in steps]
        assert rows == [[1, 3], [1, 3], [1, 3], [1, 0], [1, 0], [2]]


def gradients(model: ARMTForCausalLM, ids: torch.Tensor, **kwargs) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class TestTraining:
    @pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "smollm3", "qwen3"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"return_logits": False}, {"bptt_segments": 2}, {"bptt_segments": 3, "return_logits": False}],
        ids=str,
    )
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
    def test_loss_and_gradients_agree(self, name: str, options: dict, checkpointing: bool):
        model, ids = deep_model(name).train(), random_ids(2, LENGTH)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            enable_checkpointing(model)
        loss, expected = gradients(model, ids, schedule="sequential", **options)
        fast_loss, found = gradients(model, ids, schedule="diagonal", **options)
        assert fast_loss == pytest.approx(loss, abs=1e-9)
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert difference(found[parameter], gradient) <= 1e-8, parameter

    @pytest.mark.parametrize("name", ["gpt2", "opt"])
    def test_dropout_does_not_stand_in_the_way(self, name: str):
        model, ids = deep_model(name).train(), random_ids(2, LENGTH)  # trained before it is ever evaluated
        loss, _ = gradients(model, ids, schedule="diagonal")
        again, _ = gradients(model, ids, schedule="diagonal")
        assert loss != again
        with torch.no_grad():
            compare(model.eval(), 1e-9, ids)
            evaluated = model(ids, labels=ids, schedule="diagonal").loss.item()
        model.train()
        for module in find_decoder_layers(model.decoder, 4)[1].modules():  # frozen, say
            module.eval()
        assert gradients(model, ids, schedule="diagonal")[0] != evaluated
        assert [group.indices for group in model.fast.diagonal[-1].groups] == [[0, 2, 3], [1]]

    def test_ragged_rows_have_the_same_gradients(self):
        model = deep_model().train()
        ids, mask = pad_left([random_ids(n, seed=n) for n in (LENGTH, 11, 30)])
        _, expected = gradients(model, ids, attention_mask=mask, schedule="sequential")
        _, found = gradients(model, ids, attention_mask=mask, schedule="diagonal")
        assert all(difference(found[name], gradient) <= 1e-9 for name, gradient in expected.items())

    def test_loss_on_the_last_tokens_only(self):
        model, ids = deep_model().train(), random_ids(2, LENGTH)
        labels = ids.masked_fill(torch.arange(LENGTH) < LENGTH - 4, -100)
        results = []
        for schedule in ("sequential", "diagonal"):
            model.zero_grad()
            model(ids, labels=labels, return_logits=False, bptt_segments=2, schedule=schedule).loss.backward()
            results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert all(difference(results[1][name], gradient) <= 1e-9 for name, gradient in results[0].items())

    def test_an_optimizer_step_is_seen(self):
        model, ids = deep_model(), random_ids(1, LENGTH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            gradients(model, ids, schedule="diagonal")
            optimizer.step()
            with torch.no_grad():
                plain, fast = (model(ids, schedule=s).logits for s in ("sequential", "diagonal"))
            assert difference(fast, plain) <= 1e-9


class TestStackedWeights:
    """Stacked weights replace the parameters: one copy, seen by both sides, found again or rebuilt."""

    def read(self, model: ARMTForCausalLM) -> float:
        """How far the schedules are apart, after the diagonal one has stacked the weights."""
        ids = random_ids(1, LENGTH).to(model.device)
        with torch.no_grad():
            fast = model(ids, schedule="diagonal").logits
            return difference(fast, model(ids, schedule="sequential").logits)

    def weight(self, model: ARMTForCausalLM, layer: int) -> torch.Tensor:
        return model.decoder.layers[layer].mlp.up_proj.weight

    def is_stacked(self, model: ARMTForCausalLM) -> bool:
        weights = [self.weight(model, layer) for layer in range(4)]
        steps = {b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(weights)}
        return steps == {weights[0].numel() * weights[0].element_size()}

    def test_values_survive_and_are_held_once(self):
        model = deep_model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        parameters = list(map(id, model.parameters()))
        assert not self.is_stacked(model)
        assert self.read(model) <= 1e-9
        assert self.is_stacked(model)
        assert same(dict(model.state_dict()), before)
        assert list(map(id, model.parameters())) == parameters
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        assert sum(storages.values()) == sum(p.numel() * p.element_size() for p in model.parameters())

    def test_found_again_without_a_copy(self):
        model = deep_model()
        self.read(model)
        place = self.weight(model, 0).data_ptr()
        self.read(model)
        assert self.weight(model, 0).data_ptr() == place

    @pytest.mark.parametrize(
        "move",
        [
            lambda model: model.to(torch.float32).to(torch.float64),
            copy.deepcopy,
            lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), model)[1],
            lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict())), model)[1],
        ],
        ids=["to", "deepcopy", "assigned", "loaded"],
    )
    def test_moved_weights_are_stacked_again(self, move):
        model = deep_model()
        self.read(model)
        moved = move(model)
        self.weight(moved, 2).data.mul_(1.5)
        assert self.read(moved) <= 1e-9
        assert self.is_stacked(moved)

    def test_a_copy_has_no_ties(self):
        model = deep_model()
        self.read(model)
        other = copy.deepcopy(model)
        self.weight(other, 1).data.zero_()
        expected = model(random_ids(1, LENGTH), schedule="sequential").logits
        self.read(other)
        assert torch.equal(model(random_ids(1, LENGTH), schedule="diagonal").logits, expected)

    def test_saved_and_loaded(self, tmp_path):
        model, ids = deep_model(), random_ids(1, LENGTH)
        self.read(model)
        model.save_pretrained(tmp_path)
        size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
        assert size < 1.1 * sum(weights.values()) + 20_000
        loaded = ARMTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert difference(loaded(ids).logits, model(ids).logits) <= 1e-9

    def test_other_writers_of_checkpoints(self, tmp_path):
        from accelerate import Accelerator

        model = deep_model()
        plain = {name: value.clone() for name, value in model.state_dict().items()}
        self.read(model)
        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare(model)
        accelerator.save_state(tmp_path / "state")
        with torch.no_grad():
            self.weight(model, 1).zero_()
        accelerator.load_state(tmp_path / "state")
        assert same(dict(prepared.state_dict()), plain)
        torch.save(model.state_dict(), tmp_path / "all.pt")
        torch.save(
            {"weight": model.state_dict()[f"model.{model.decoder_name}.layers.1.mlp.up_proj.weight"]},
            tmp_path / "one.pt",
        )
        assert (tmp_path / "one.pt").stat().st_size < 2 * self.weight(model, 1).nbytes + 4096
        assert same(torch.load(tmp_path / "all.pt"), plain)
        model.load_state_dict(plain)
        assert self.read(model) <= 1e-9

    def test_a_layer_on_its_own_is_saved_without_the_others(self, tmp_path):
        from safetensors.torch import load_file, save_model

        model = deep_model()
        self.read(model)
        layer = model.decoder.layers[1]
        expected = {name: value.clone() for name, value in layer.state_dict().items()}
        torch.save(layer.mlp.up_proj, tmp_path / "layer.pt")
        assert (tmp_path / "layer.pt").stat().st_size < 2 * self.weight(model, 1).nbytes + 4096
        save_model(layer, tmp_path / "layer.safetensors")
        assert same(load_file(tmp_path / "layer.safetensors"), expected)
        assert len(pickle.dumps(self.weight(model, 1))) < 2 * self.weight(model, 1).nbytes + 4096

    def test_weights_that_processes_share_stay_where_they_are(self):
        model, ids = deep_model(), random_ids(1, LENGTH)
        expected = model(ids).logits
        self.read(model)
        model.share_memory()
        assert all(parameter.is_shared() for parameter in model.parameters())
        places = [parameter.data_ptr() for parameter in model.parameters()]
        with pytest.raises(ValueError, match=r"in memory that processes share.*schedule='sequential'"):
            model(ids, schedule="diagonal")
        assert torch.equal(model(ids).logits, expected)
        assert places == [parameter.data_ptr() for parameter in model.parameters()]

    def test_weights_that_somebody_keeps_in_one_tensor_stay_where_they_are(self):
        model, ids = deep_model(), random_ids(1, LENGTH)
        weights = [self.weight(model, layer) for layer in range(4)]
        flat = torch.cat([weight.detach().flatten() for weight in weights])  # as DeepSpeed and FSDP do
        for weight, part in zip(weights, flat.split(weights[0].numel()), strict=True):
            weight.data = part.view_as(weight)
        with pytest.raises(ValueError, match="part of a larger tensor"):
            model(ids, schedule="diagonal")
        flat.zero_()
        assert not any(weight.any() for weight in weights)

    def test_weights_of_a_loaded_model_are_stacked(self, tmp_path):
        deep_model().save_pretrained(tmp_path)
        loaded = ARMTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert self.read(loaded) <= 1e-9
        assert self.is_stacked(loaded)

    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    def test_adapters(self):
        from peft import get_peft_model

        from modeling_armt.conversion.adapters import lora_config, merge

        model, ids = deep_model(), random_ids(1, LENGTH)
        self.read(model)
        adapted = get_peft_model(model, lora_config(model))
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter) * ("lora" in name))
        losses = {}
        for schedule in ("sequential", "diagonal"):
            adapted.zero_grad()
            loss = adapted(input_ids=ids, labels=ids, schedule=schedule).loss
            loss.backward()
            losses[schedule] = loss.item()
            grads = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}
            if schedule == "sequential":
                expected = grads
        assert [group.indices for group in model.fast.diagonal[-1].groups] == [[0, 1, 2, 3]]
        assert losses["diagonal"] == pytest.approx(losses["sequential"], abs=1e-9)
        assert all(difference(grads[name], gradient) <= 1e-9 for name, gradient in expected.items())
        with adapted.disable_adapter(), torch.no_grad():
            plain, fast = (adapted(input_ids=ids, schedule=s).logits for s in ("sequential", "diagonal"))
            assert difference(fast, plain) <= 1e-9
        with torch.no_grad():
            with_adapters = adapted(input_ids=ids, schedule="diagonal").logits
            merged = merge(adapted)
            assert difference(merged(ids, schedule="diagonal").logits, with_adapters) <= 1e-9
            assert self.read(merged) <= 1e-9

    def test_stacked_tensors_share_memory(self):
        tensors = [torch.nn.Parameter(torch.full((2, 3), float(i))) for i in range(3)]
        stack = stacked(tensors)
        tensors[1].data.fill_(7)
        assert stack[1].eq(7).all()
        assert stacked(tensors).data_ptr() == stack.data_ptr()
        assert stacked(tensors[1:]).data_ptr() == tensors[1].data_ptr()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)

    def test_the_memory_of_a_stack_goes_with_its_last_tensor(self):
        tensors = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
        memory = StorageWeakRef(stacked(tensors).untyped_storage())
        place = tensors[0].data_ptr()
        for tensor in tensors[1:]:
            tensor.data = torch.ones(2, 3)
        assert not memory.expired()
        assert stacked(tensors)[:, 0, 0].tolist() == [0, 1, 1]
        assert memory.expired()
        assert tensors[0].data_ptr() != place


class TestChoice:
    @torch.no_grad()
    def test_layers_that_all_differ_are_not_worth_it(self, monkeypatch):
        monkeypatch.setattr(schedule_module, "_pays", lambda model, segments: True)
        model, ids = deep_model("diffllama"), random_ids(1, LENGTH)
        assert schedule_module.choose_schedule(model, [LENGTH], [0], True, None, False)[1] is None
        assert schedule_module.choose_schedule(model, [LENGTH], [0], True, "diagonal", False)[1] is not None
        assert torch.equal(model(ids).logits, model(ids, schedule="sequential").logits)

    @torch.no_grad()
    def test_sequential_on_a_cpu_unless_asked(self):
        model = deep_model()
        model(random_ids(1, LENGTH))
        assert not model.fast.diagonal

    def test_unknown_schedule(self):
        with pytest.raises(ValueError, match="'sequential', 'diagonal' or None"):
            tiny_model()(random_ids(1, LENGTH), schedule="fast")

    def test_hidden_states_come_from_the_sequential_schedule(self):
        with pytest.raises(ValueError, match="hidden states"):
            tiny_model()(random_ids(1, LENGTH), schedule="diagonal", output_hidden_states=True)

    @torch.no_grad()
    def test_a_short_text_needs_no_diagonal(self):
        model, ids = deep_model(), random_ids(1, 3)
        assert torch.equal(model(ids, schedule="diagonal").logits, model(ids, schedule="sequential").logits)

    @torch.no_grad()
    def test_generate_takes_it(self):
        model, ids = deep_model(), random_ids(1, LENGTH)
        options = {"max_new_tokens": 2 * SEGMENT_SIZE, "do_sample": False}
        expected = model.generate(ids, schedule="sequential", **options)
        assert torch.equal(model.generate(ids, schedule="diagonal", **options), expected)

    @torch.no_grad()
    def test_hidden_states_without_head(self):
        from modeling_armt import ARMTModel

        model, ids = deep_model(), random_ids(2, LENGTH)
        body = ARMTModel.from_backbone(tiny_backbone(deep("llama")), **model.config.memory_fields).double()
        plain, fast = (body(ids, schedule=s).last_hidden_state for s in ("sequential", "diagonal"))
        assert difference(fast, plain) <= 1e-9


class TestMemory:
    @torch.no_grad()
    def test_a_stream_does_not_hold_what_it_has_replaced(self, monkeypatch):
        model, replaced, alive = deep_model(), [], []
        collect = Pipeline._collect

        def watch(self):
            alive.append([state() is not None for state in replaced])
            collect(self)
            replaced[:] = [weakref.ref(state.A) for state in self.states.values()]

        monkeypatch.setattr(Pipeline, "_collect", watch)
        ids = random_ids(1, 8 * SEGMENT_SIZE + 3)
        output = model.read(ids, block_segments=2, schedule="diagonal")
        assert alive == [[], [False] * 4, [False] * 4, [False] * 4]
        assert difference(output.logits, model(ids, schedule="sequential").logits[:, -1:]) <= 1e-9

    @torch.no_grad()
    def test_positions_embedded_before_are_let_go_of(self, monkeypatch):
        monkeypatch.setattr(diagonal_module, "EMBEDDED", 2 * (SEGMENT_SIZE + NUM_MEM_TOKENS))
        native_pass, embedded = diagonal_module.native_pass, []

        def watched(*args):
            assert all(storage.expired() for storage in embedded)
            calls, hidden = native_pass(*args)
            embedded.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (calls[0].x, hidden))
            return calls, hidden

        monkeypatch.setattr(diagonal_module, "native_pass", watched)
        deep_model()(random_ids(1, LENGTH), schedule="diagonal")
        assert len(embedded) == 2 * 3  # three stretches of two segments

    @torch.no_grad()
    def test_a_stream_that_fails_leaves_the_cache_alone(self):
        model, cache = deep_model(), ARMTCache()
        model.read(random_ids(1, LENGTH), cache=cache, schedule="diagonal")
        before = cache_contents(cache)
        bad = torch.cat([random_ids(1, 6 * SEGMENT_SIZE), torch.full((1, 5), 10_000)], dim=1)
        with pytest.raises(ValueError, match="10000"):
            model.read(bad, cache=cache, block_segments=2, schedule="diagonal")
        assert same(cache_contents(cache), before)


class TestThreads:
    def test_texts_do_not_meet(self):
        model = deep_model()
        texts = [random_ids(1, LENGTH, seed=seed) for seed in range(6)]
        with torch.no_grad():
            expected = [model(text, schedule="sequential").logits for text in texts]

            def read(number: int) -> float:
                with torch.no_grad():
                    schedule = ("diagonal", "sequential")[number % 2]
                    return difference(model(texts[number], schedule=schedule).logits, expected[number])

            with ThreadPoolExecutor(4) as pool:
                assert max(pool.map(read, list(range(6)) * 3)) <= 1e-9

    def test_a_failing_call_leaves_the_cache_alone(self, monkeypatch):
        model, cache = deep_model(), ARMTCache()
        with torch.no_grad():
            model(random_ids(1, LENGTH), cache=cache, schedule="diagonal")
            before = cache_contents(cache)
            calls = itertools.count()
            monkeypatch.setattr(
                groups_module.CellGroup, "_run_in_place", lambda *args: 1 / 0 if next(calls) > 3 else None
            )
            model.fast.diagonal.clear()
            with pytest.raises(ZeroDivisionError):
                model(random_ids(1, LENGTH), cache=cache, schedule="diagonal")
        assert same(cache_contents(cache), before)

    def test_a_call_in_inference_mode_leaves_weights_that_can_be_trained(self):
        model, ids = deep_model(), random_ids(1, LENGTH)
        with torch.inference_mode():
            fast = model(ids, schedule="diagonal").logits
        with torch.no_grad():
            assert difference(model(ids, schedule="sequential").logits, fast) <= 1e-9
        gradients(model, ids, schedule="diagonal")


class TestCompiled:
    """Real compilation of a tiny model; what only a GPU has, graphs, is in test_gpu.py."""

    @torch.no_grad()
    def test_compiled_cells_return_the_same(self):
        model, ids = tiny_model(), random_ids(1, LENGTH)
        expected = model(ids, schedule="sequential")
        assert model.compile_armt() is model
        for _ in range(2):  # the second time with the buffers of the first
            found = model(ids, schedule="diagonal")
            assert difference(found.logits, expected.logits) <= 1e-4  # its norms are float32
            for layer, state in expected.cache.states.items():
                assert difference(found.cache.states[layer].A, state.A) <= 1e-4
        groups = model.fast.diagonal[0]
        assert groups.cold_start_s > 0
        assert len(groups.idle) == 1
        assert copy.deepcopy(model).fast.enabled
        assert not copy.deepcopy(model).fast.diagonal

    @torch.no_grad()
    def test_buffers_do_not_hold_on_to_old_weights(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
        model, ids = deep_model().compile_armt(), random_ids(1, LENGTH)
        model(ids, schedule="diagonal")
        buffers = weakref.ref(model.fast.diagonal[0].idle[0])
        assert buffers() is not None
        model.to(torch.float32)
        gc.collect()
        assert buffers() is None

    @torch.no_grad()
    def test_inference_mode_and_back(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
        model, ids = deep_model(), random_ids(1, LENGTH)
        expected = model(ids).logits
        model.compile_armt()
        with torch.inference_mode():
            model(ids, schedule="diagonal")
        assert difference(model(ids, schedule="diagonal").logits, expected) <= 1e-9

    @torch.no_grad()
    def test_few_groups_are_kept(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
        model, ids = deep_model().compile_armt(), random_ids(1, LENGTH)
        for step in range(12):
            for layer in model.decoder.layers:
                layer.step = step
            model(ids, schedule="diagonal")
        assert len(model.fast.diagonal) <= groups_module.MOST_KEPT + 1
        assert sum(len(groups.idle) for groups in model.fast.diagonal) == 1

    @torch.no_grad()
    def test_buffers_are_given_up_when_weights_move(self, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
        model, ids = deep_model().compile_armt(), random_ids(1, LENGTH)
        model(ids, schedule="diagonal")
        first = model.fast.diagonal[0].idle[0]
        model(ids, schedule="diagonal")
        assert model.fast.diagonal[0].idle[0] is first
        for layer in model.decoder.layers:
            layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * 1.5
        for memory in model.memory.values():  # in place: the buffers stay
            memory.memory_query.weight.data.mul_(1.5)
        plain = copy.deepcopy(model).compile_armt(False)
        assert difference(model(ids, schedule="diagonal").logits, plain(ids).logits) <= 1e-9
        assert model.fast.diagonal[0].idle[0] is not first

    @pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
    def test_both_schedules_run_compiled_cells(self, schedule: str, monkeypatch):
        compiled = []
        monkeypatch.setattr(torch, "compile", lambda function, **kwargs: compiled.append(function) or function)
        model, ids = deep_model(), random_ids(2, LENGTH)
        with torch.no_grad():
            expected = model(ids).logits
            model.compile_armt()
            assert difference(model(ids, schedule=schedule).logits, expected) <= 1e-9
        assert compiled
        _, fast = gradients(model, ids, schedule=schedule)
        _, plain = gradients(model.compile_armt(False), ids, schedule="sequential")
        assert all(difference(fast[name], gradient) <= 1e-9 for name, gradient in plain.items())


def test_tensors_are_found_under_the_names_that_torch_gives_them():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
            self.again, self.nothing = self.first, None  # the same module twice is one
            self.inner = nn.Sequential(nn.Linear(2, 2, bias=False))
            self.inner[0].weight = self.first.weight  # and so is a weight

    layer = Layer()
    expected = [tensor for _, tensor in (*layer.named_parameters(), *layer.named_buffers())]
    found = named_tensors(layer)
    assert sorted(map(id, found.values())) == sorted(map(id, expected))
    assert all(dict(layer.named_parameters(remove_duplicate=False)).get(n, t) is t for n, t in found.items())
