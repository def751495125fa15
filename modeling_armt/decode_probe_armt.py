"""
Whether a model can decode at fixed shapes: tried out, since no list of families would stay complete.

A step is run, as it is, on a random memory and a few tokens, and compared with the model's own forward.
"""

from typing import TYPE_CHECKING

import torch

from .cache_armt import ARMTCache
from .compatibility_armt import CACHE
from .compilation_armt import is_passing
from .decode_step_armt import DecodeStep


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

# What equal computations may differ by, relative to the norm of the result.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2


def unsuitable(model: "ARMTPreTrainedModel") -> str | None:
    """Why not to try: where weights are fetched, spread or unpacked in ways that a fixed step would not follow."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(hasattr(module, "_hf_hook") for module in model.modules()) or any(t.is_meta for t in tensors):
        return "its weights are offloaded or dispatched"
    if len({tensor.device for tensor in tensors}) > 1:
        return "its weights are on several devices"
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.model, "hf_quantizer", None) is not None:
        return "its weights are quantized"
    return None


@torch.no_grad()
def find_decode_step(model: "ARMTPreTrainedModel", compiles: bool) -> tuple[DecodeStep | None, str | None]:
    """
    A decode step that does what the model does, or the reason why there is none: tried on a random memory and a few
    tokens, one of them padding, with the end of a segment among them.
    """
    embedding = model.get_input_embeddings()
    device, generator = embedding.weight.device, torch.Generator().manual_seed(0)
    opened = max(model.config.segment_size - 2, 1)
    ids = torch.randint(model.num_embeddings, (2, opened + 4), generator=generator).to(device)
    columns = [(ids[:, opened + n, None], [True, n != 1]) for n in range(4)]
    with torch.inference_mode(False):
        mask = torch.ones(2, opened, dtype=torch.long, device=device)
        mask[1, :-1] = 0
        cache = model(ids[:, :opened], attention_mask=mask, use_cache=True, logits_to_keep=1).cache
        keys = cache.keys
        if keys is None:  # a segment is a single token
            keys = model.decoder(ids[:, :1], use_cache=True)[CACHE]
        _fill(model, cache, generator)
        expected = _usual_way(model, cache.fork(), columns)
        reason = None
        for masks in _mask_kinds(model.config.text_config):
            step = None
            try:
                like = [(layer.keys[:1, :, :1].clone(), layer.values[:1, :, :1].clone()) for layer in keys.layers]
                step = DecodeStep(model, like, masks, compiles=False, captures=False)
                found = _at_fixed_shapes(step, cache.fork(), columns)
            except Exception as error:
                if is_passing(error):
                    raise
                reason = reason or f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            finally:
                if step is not None:
                    step.clear()
            error = max(((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))
            if error <= TOLERANCE.get(found[0].dtype, HALF_TOLERANCE):
                return DecodeStep(model, like, masks, compiles, captures=device.type == "cuda"), None
            reason = f"its results differ by {error:.1e} from those of its own forward"
    return None, reason


def _mask_kinds(config) -> list[str]:
    """What a decoder may want as its 4D mask, the likely one first; one for each kind if its layers differ."""
    kinds, types = ["full"], set(getattr(config, "layer_types", None) or ())
    if getattr(config, "sliding_window", None) is not None:
        kinds.insert(0, "sliding")
    if types:
        kinds.insert(0 if len(types) > 1 else len(kinds), "by kind")
    return kinds


def _fill(model: "ARMTPreTrainedModel", cache: ARMTCache, generator: torch.Generator) -> None:
    """Random memories, since those of a fresh conversion would add nothing."""
    scale = model.memory_tokens.weight.float().std().item()
    for index in cache.states:
        empty = model.memory[str(index)].zero_state(2, cache.last_hidden.device)
        A = scale * torch.randn(empty.A.shape, generator=generator)
        z = None if empty.z is None else 0.5 + torch.rand(empty.z.shape, generator=generator)
        filled = {"A": A, "z": z}
        cache.states[index] = type(empty)(**{n: None if t is None else t.to(empty.A) for n, t in filled.items()})
    cache.segments = [1, 1]


def _usual_way(model: "ARMTPreTrainedModel", cache: ARMTCache, columns: list) -> list[torch.Tensor]:
    """Logits of all columns, the memories and the last hidden states, as the model's forward has them."""
    logits = []
    for tokens, real in columns:
        mask = torch.tensor(real, device=tokens.device)[:, None]
        logits.append(model(tokens, attention_mask=mask, cache=cache).logits)
    return [torch.stack(logits), *(state.A for state in cache.states.values()), cache.last_hidden]


def _at_fixed_shapes(step: DecodeStep, cache: ARMTCache, columns: list) -> list[torch.Tensor]:
    """The same by a step."""
    step.resize(2)
    step.load(cache)
    opened, logits = cache.opened, []
    for tokens, real in columns:
        step.ids.copy_(tokens)
        step.real.copy_(torch.tensor(real))
        step.step()
        logits.append(step.logits.clone())
        opened = [n + r for n, r in zip(opened, real, strict=True)]
        full = [row for row, n in enumerate(opened) if n == step.segment_size]
        if full:
            step.flush(full)
        opened = [0 if n == step.segment_size else n for n in opened]
    return [torch.stack(logits), *(state.A for state in step.states.values()), step.last_hidden]
