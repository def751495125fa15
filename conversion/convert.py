"""Conversion of a pretrained decoder into an ARMT checkpoint, and the proof that the result is sound."""

import copy
import warnings
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ..attachment_armt import attach_positions
from ..cache_armt import ARMTCache
from ..configuration_armt import VARIANTS, ARMTConfig
from ..memory_armt import MemoryNorm, rms_norm
from ..modeling_armt import ARMTForCausalLM
from .files import staged_folder
from .hub_names import check_exists
from .provenance import describe_backbone


# What an ARMT layer can be made of: attention whose cache is keys and values by position.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# What a tokenizer says of a model that has no longest input: the largest number that fits into 32 bits, wherever tools
# put it. (transformers' own 1e30 fits into no integer of theirs.)
LONGEST_INPUT = 2**31 - 1


class ConversionError(ValueError):
    """A backbone that cannot become an ARMT model, with the reason."""


def convert(
    backbone: str | Path,
    out: str | Path,
    segment_size: int = 1024,
    num_mem_tokens: int = 16,
    d_mem: int = 64,
    variant: str = "v2",
    memory_layers: list[int] | None = None,
    dtype: str = "auto",
    correction: bool = True,
    memory_norm: bool = False,
    spread_memory_tokens: bool = False,
    seed: int = 0,
) -> ARMTForCausalLM:
    """
    Turns a pretrained decoder into an ARMT checkpoint, with memories that add exactly zero until they are trained.

    Args:
        backbone: folder or Hub id of a causal language model of transformers.
        out: folder to write; must not exist, or be empty.
        segment_size, num_mem_tokens, d_mem, memory_layers, correction, memory_norm, spread_memory_tokens: see
            [`ARMTConfig`]. The norms are set by [`calibrate`].
        variant: `v2`, the authors' current model, or `paper`, the formula of the paper.
        dtype: of the backbone's weights; `auto` keeps the checkpoint's. Memories are float32.
        seed: of the fresh memories.

    Returns:
        The model that was saved.

    Raises:
        ConversionError: if the backbone cannot be loaded, or fails a check of [`check_conversion`].
        FileExistsError: if there is something in `out`.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of: {', '.join(VARIANTS)}.")
    with staged_folder(out) as folder:
        check_config(backbone)
        copy_text_files(backbone, folder)
        source = load_backbone(backbone, dtype)
        options = {"segment_size": segment_size, "num_mem_tokens": num_mem_tokens, "d_mem": d_mem}
        options |= {"memory_layers": memory_layers, "correction": correction, "memory_norm": memory_norm}
        options |= {"spread_memory_tokens": spread_memory_tokens}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = attach_checked(source, **options, **VARIANTS[variant])
            if memory_norm:
                calibrate(model)
        model.config.converted_from = describe_backbone(backbone)
        model.save_pretrained(folder)
    model.name_or_path = model.config.name_or_path = str(out)  # adapters name their base
    return model


def check_config(backbone: str | Path) -> None:
    """Refuses what is not a plain, unquantized decoder of attention layers, before its weights are loaded."""
    name = str(backbone)
    try:
        check_exists(name, "backbone", old=True)
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # a damaged file raises whatever its reader meets
        raise ConversionError(f"{name} is not a model that transformers can load: {error}") from error
    if isinstance(config, ARMTConfig):
        raise ConversionError(f"{name} is an ARMT checkpoint already.")
    if config.is_encoder_decoder or config.get_text_config() is not config:
        raise ConversionError(
            f"{name} is a {config.model_type} model, more than a decoder of text. ARMT needs a plain decoder; "
            "save the text part as a checkpoint of its own and convert that."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(f"{name} is quantized. Convert the original weights and quantize the ARMT checkpoint.")
    other_layers = set(getattr(config, "layer_types", None) or []) - ATTENTION_LAYERS
    if other_layers:
        raise ConversionError(
            f"{name} is a {config.model_type} model with {', '.join(sorted(other_layers))} layers. Their recurrent "
            "state cannot be cut into segments; ARMT needs attention layers only."
        )


def load_backbone(backbone: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """Loads a decoder with all its weights, or says what is wrong with them."""
    name = str(backbone)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except Exception as error:  # a damaged file raises whatever its format's reader does
        raise ConversionError(f"{name} cannot be loaded, its files may be damaged or incomplete: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConversionError(f"{name} lacks {len(info['missing_keys'])} of its weights: {missing}, ...")
    return model.eval()


def attach_checked(backbone: PreTrainedModel, **memory_options) -> ARMTForCausalLM:
    """[`ARMTForCausalLM.from_backbone`], with the checks of [`check_conversion`]."""
    family = backbone.config.model_type
    config = ARMTConfig(text_config=backbone.config, **memory_options)  # bad options are not the family's fault
    ids = probe_ids(config)
    try:
        with torch.no_grad():
            native = backbone(ids[:, : probe_segment(config)], use_cache=False).logits
        model = ARMTForCausalLM.from_backbone(backbone, **memory_options)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError, IndexError, KeyError) as error:
        raise ConversionError(f"{family} models cannot carry a memory: {type(error).__name__}: {error}") from error
    try:
        check_conversion(model, ids, native)
    except ConversionError as error:
        raise ConversionError(f"{family} models cannot carry a memory: {error}") from error
    except Exception as error:  # whatever a family that was never meant for this raises
        raise ConversionError(
            f"{family} models cannot carry a memory: {type(error).__name__} in the probe: {error}"
        ) from error
    return model


def probe_segment(config: ARMTConfig) -> int:
    """A short segment for the probe, but longer than the backbone's sliding window where segments will be."""
    windows = [
        getattr(config.text_config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")
    ]
    longest = max(
        [window for window in windows if isinstance(window, int) and window < config.segment_size], default=8
    )
    return min(config.segment_size, longest + 8)


def probe_ids(config: ARMTConfig) -> torch.Tensor:
    """`(1, T)` random ids, two and a half probe segments."""
    generator = torch.Generator().manual_seed(0)
    length = probe_segment(config) * 5 // 2 + 1
    return torch.randint(config.text_config.vocab_size, (1, length), generator=generator)


@torch.no_grad()
def calibrate(model: ARMTForCausalLM) -> None:
    """
    Sets the norms of a fresh model so that what they return has mean 0 and variance 1 in every channel, over random
    tokens, and mean 0 for each memory token: what all tokens of a backbone have in common, which is most of their
    length, says nothing about any, and keys and queries are left with what tells them apart.
    """

    def watch(norm: MemoryNorm, args: tuple[torch.Tensor]):
        x = rms_norm(args[0].to(norm.weight.dtype), torch.ones_like(norm.weight), torch.zeros_like(norm.bias))
        mean = x.mean((0, 1) if len(norm.bias) == 1 else 0)
        norm.weight.copy_((x - mean).square().mean((0, 1)).add(1e-6).rsqrt())
        norm.bias.copy_(-mean * norm.weight)

    segment_size = model.config.segment_size
    model.config.segment_size = segment = min(segment_size, 32)
    norms = [module for module in model.memory.modules() if isinstance(module, MemoryNorm)]
    watching = [norm.register_forward_pre_hook(watch) for norm in norms]
    try:
        ids = torch.randint(model.config.text_config.vocab_size, (32, 2 * segment), device=model.device)
        model(ids, use_cache=False, schedule="sequential", logits_to_keep=1)
    finally:
        model.config.segment_size = segment_size
        for handle in watching:
            handle.remove()


@torch.no_grad()
def check_conversion(model: ARMTForCausalLM, ids: torch.Tensor, native: torch.Tensor) -> None:
    """
    Checks on a short text that a model is what its backbone was, plus a working memory: one segment has the backbone's
    own logits to the bit, every memory is read and written, what is written moves the logits of the next segment and
    of no earlier one, and reading with a cache, alone or left-padded in a batch, gives what reading at once does.

    Args:
        model: a fresh conversion.
        ids: `(1, T)`, more than two probe segments.
        native: `(1, segment, vocabulary)`, the logits of the untouched backbone for the first segment.

    Raises:
        ConversionError: naming the check that failed.
        RuntimeError: if the hooks do not fire.
    """
    ids = ids.to(model.device)
    segment_size, segment = model.config.segment_size, probe_segment(model.config)
    values = {layer: memory.memory_value.weight.clone() for layer, memory in model.memory.items()}
    denom_eps = model.config.denom_eps
    model.config.segment_size = segment
    for memory in model.memory.values():
        memory.denom_eps = 1.0  # random memories divide by almost nothing, which would magnify rounding
    try:
        if not torch.equal(model(ids[:, :segment], use_cache=False).logits, native):
            raise ConversionError("a single segment does not have the backbone's own logits.")
        fresh = model(ids, use_cache=False).logits
        for memory in model.memory.values():
            torch.nn.init.normal_(memory.memory_value.weight, std=0.1 * memory.memory_value.in_features**-0.5)
        moved = model(ids, use_cache=False).logits
        if not torch.equal(fresh[:, :segment], moved[:, :segment]):
            raise ConversionError("what is written to memory changes the segment that wrote it.")
        if torch.equal(fresh[:, segment:], moved[:, segment:]):
            raise ConversionError("what is written to memory does not reach the next segment.")
        if model.config.spread_memory_tokens:
            attach_positions(model.decoder, None)
            behind = model(ids, use_cache=False).logits
            attach_positions(model.decoder, model.config.num_mem_tokens)
            if torch.equal(behind, moved):
                raise ConversionError("it does not turn by position, so that memory tokens cannot be spread.")
        _check_cached(model, ids, moved)
    finally:
        model.config.segment_size = segment_size
        for layer, memory in model.memory.items():
            memory.memory_value.weight.copy_(values[layer])
            memory.denom_eps = denom_eps


def _check_cached(model: ARMTForCausalLM, ids: torch.Tensor, logits: torch.Tensor) -> None:
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.05
    errors = _errors_with_a_cache(model, ids, logits)
    room = psutil.virtual_memory().available - 8 * sum(parameter.numel() for parameter in model.parameters())
    if tolerance <= max(errors.values()) < torch.inf and room > 0:
        # It may be rounding, which weights that were never trained magnify without bound: float64 tells.
        with suppress(RuntimeError, NotImplementedError):  # a family that knows no float64
            exact = copy.deepcopy(model).double()
            errors, tolerance = _errors_with_a_cache(exact, ids, exact(ids, use_cache=False).logits), 1e-3
    for how, error in errors.items():
        if not error < tolerance:
            raise ConversionError(f"reading {how} gives other logits than reading at once (off by {error:.1e}).")


def _errors_with_a_cache(model: ARMTForCausalLM, ids: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    """How far off the logits are on average, as a share of their spread, by the way of reading."""

    def read_in_two(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        cache, half = ARMTCache(), rows.shape[1] // 2
        first = model(rows[:, :half], attention_mask=mask[:, :half], cache=cache).logits
        return torch.cat([first, model(rows[:, half:], attention_mask=mask, cache=cache).logits], dim=1)

    # Two rows of different length, so that each has an open segment shorter than its neighbour's at some time.
    longer = torch.cat([ids[:, -3:], ids], dim=1)
    rows = torch.cat([torch.nn.functional.pad(ids, (3, 0)), longer])
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    padded = read_in_two(rows, mask)
    found = {
        "with a cache": (read_in_two(ids, torch.ones_like(ids)), logits),
        "left-padded": (padded[:1, 3:], logits),
        "beside a padded row": (padded[1:], model(longer, use_cache=False).logits),
    }
    return {how: ((cached - alone).abs().mean() / alone.std()).item() for how, (cached, alone) in found.items()}


def copy_text_files(backbone: str | Path, folder: Path) -> None:
    """Copies tokenizer, chat template and generation config of a backbone, as far as it has them."""
    folder_has_one = not Path(backbone).is_dir() or any(
        any(Path(backbone).glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")
    )
    try:
        # Without files some families get an empty tokenizer instead of an error.
        tokenizer = AutoTokenizer.from_pretrained(str(backbone)) if folder_has_one else None
    except ImportError as error:  # there is a tokenizer, and whoever loads the checkpoint will want it
        raise ConversionError(f"the tokenizer of {backbone} needs another package: {error}") from error
    except (OSError, ValueError, KeyError):
        tokenizer = None
    if tokenizer is None:
        warnings.warn(f"{backbone} comes without a tokenizer, so the checkpoint has none.", stacklevel=2)
    else:
        tokenizer.model_max_length = LONGEST_INPUT
        tokenizer.save_pretrained(folder)
    try:
        generation_config = GenerationConfig.from_pretrained(str(backbone))
    except OSError:
        return
    generation_config.cache_implementation = None  # some families ask for a cache of their own
    generation_config.save_pretrained(folder)
