"""Loading what `convert`, `train` and `merge` wrote: ARMT checkpoints, and adapters on one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_armt import ARMTConfig
from ..modeling_armt import ARMTForCausalLM
from .hub_names import check_exists


TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def load_checkpoint(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trainable: bool = False,
) -> tuple[ARMTForCausalLM | PeftModel, PreTrainedTokenizerBase | None]:
    """
    Loads a checkpoint to use it.

    Args:
        path: folder or Hub id of an ARMT checkpoint, or of a PEFT adapter whose base is one.
        dtype: of the backbone; `auto` keeps the checkpoint's. Memories are float32, or float64 with it.
        device: where to; by default the GPU if there is one.
        trainable: whether an adapter shall get gradients.

    Returns:
        The model in eval mode, a `PeftModel` for an adapter, and its tokenizer, which is the base's if the adapter has
        none, or None.

    Raises:
        ValueError: for what is not ARMT, or is damaged.
        FileNotFoundError: if there is nothing.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base, adapter = check_checkpoint(path)
    name = str(path)
    of = "" if adapter is None else f", the base of the adapter {name},"
    revision = None if adapter is None else adapter.revision
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, revision=revision, output_loading_info=True
        )
    except Exception as error:
        raise ValueError(f"{base}{of} cannot be loaded, its files may be damaged or incomplete: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"{base}{of} lacks {len(info['missing_keys'])} of its weights: {missing}, ...")
    tokenizer = load_tokenizer(base)
    if adapter is not None:
        try:
            model = PeftModel.from_pretrained(model, name, is_trainable=trainable)
        except Exception as error:
            raise ValueError(f"the adapter {name} does not load on its base {base}: {error}") from error
        tokenizer = load_tokenizer(name) or tokenizer
    return model.to(device).eval(), tokenizer


def check_checkpoint(path: str | Path) -> tuple[str, PeftConfig | None]:
    """
    Says what a checkpoint is, without loading any weights.

    Args:
        path: as for [`load_checkpoint`].

    Returns:
        Folder or Hub id of the ARMT checkpoint, and the configuration of the adapter on it if there is one.

    Raises:
        ValueError, FileNotFoundError: as [`load_checkpoint`].
    """
    name = str(path)
    check_exists(name, "checkpoint")
    adapter = _adapter_config(name)
    base = name if adapter is None else str(adapter.base_model_name_or_path)
    of = "" if adapter is None else f", the base of the adapter {name},"
    if adapter is not None:
        check_exists(base, f"base of the adapter {name},")
    try:
        config = AutoConfig.from_pretrained(base, revision=None if adapter is None else adapter.revision)
    except Exception as error:  # a damaged file raises whatever its reader meets
        kind = FileNotFoundError if not Path(base).exists() else ValueError
        raise kind(f"{base}{of} is not a checkpoint that can be loaded: {error}") from error
    if not isinstance(config, ARMTConfig):
        advice = "Convert it first: armt convert" if adapter is None else "Train on an ARMT checkpoint: armt convert"
        raise ValueError(f"{base}{of} is a plain {config.model_type} model, not an ARMT checkpoint. {advice}")
    return base, adapter


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or Hub id, None where it has none."""
    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        return None  # without files some families get an empty tokenizer instead of an error
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        if folder.is_dir():
            raise ValueError(f"the tokenizer in {path} cannot be loaded: {error}") from error
        return None


@contextmanager
def backbone_only(model: ARMTForCausalLM | PeftModel) -> Iterator[PreTrainedModel]:
    """
    The backbone as a plain model: full attention over the whole input, without memory, and without the adapter if
    there is one. What an adapter was trained on is the untouched backbone; after full training it is the trained one.
    """
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model.get_base_model().model
    else:
        yield model.model


def armt_model(model: ARMTForCausalLM | PeftModel) -> ARMTForCausalLM:
    """The ARMT model itself, with the layers of the adapter in it if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _adapter_config(name: str) -> PeftConfig | None:
    """The configuration of an adapter; None for what is none."""
    if Path(name).is_dir() and not (Path(name) / "adapter_config.json").exists():
        return None
    if Path(name).is_dir() and (Path(name) / "config.json").exists():
        raise ValueError(f"{name} has both an adapter and a model in it. Put the adapter into a folder of its own.")
    try:
        return PeftConfig.from_pretrained(name)
    except Exception as error:
        if Path(name).is_dir():
            raise ValueError(f"{name}/adapter_config.json cannot be read: {error}") from error
        return None
