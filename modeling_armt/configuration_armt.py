"""Configuration of an Associative Recurrent Memory Transformer (ARMT, arXiv 2407.04841)."""

from operator import attrgetter
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


ARMT_VERSION = 2
"""
Newest version of the checkpoint format. A checkpoint with a larger number needs a newer package. 2 is written for
models with `memory_norm` or `spread_memory_tokens` alone, which code for version 1 would overlook.
"""

VARIANTS: dict[str, dict[str, Any]] = {
    # The authors' current model: L2-normalised features.
    "v2": {"normalize_features": True, "gamma_eps": 0.0},
    # The formula of the paper: plain DPFP features, epsilon in gamma's denominator.
    "paper": {"normalize_features": False, "gamma_eps": 1e-5},
}

BACKBONE_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Fields of `text_config` that tools look for at the top."""

# What every configuration of transformers is made with, beside the fields that it declares.
_STOCK_ARGUMENTS = {"name_or_path", "num_labels", "output_attentions", "torch_dtype"}
_STOCK_ARGUMENTS |= {"attn_implementation", "experts_implementation"}


class ARMTConfig(PreTrainedConfig):
    """
    Configuration of [`ARMTModel`] and [`ARMTForCausalLM`]: a pretrained decoder (the backbone) that reads its input
    segment by segment and carries an associative memory in every layer from one segment to the next.

    Args:
        text_config (`PreTrainedConfig` or `dict`): the backbone's own configuration; required.
        segment_size (`int`): real tokens in a segment, S.
        num_mem_tokens (`int`): memory tokens appended to a complete segment, m.
        d_mem (`int`): width d of the memory's queries and keys, before the feature map.
        dpfp_nu (`int`): nu of the DPFP feature map; a feature has `2 * dpfp_nu * d_mem` entries.
        normalize_features (`bool`): L2-normalise the features (`v2`) or not (`paper`).
        gamma_eps (`float`): added to |k|^2 in the correction gamma; 0 for `v2`, 1e-5 for `paper`.
        denom_eps (`float`): added to the denominators q.z and k.z.
        correction (`bool`): scale what a write adds to z by gamma, so that rewriting a key does not grow z.
        use_denom (`bool`): divide reads by q.z (and k.z); without it there is no z at all.
        write_guard (`bool`): write less where a write would let the memory grow without end; changes nothing
            elsewhere. Published models were trained without.
        memory_norm (`bool`): RMS-normalise what the memory's projections get, with weight and bias for reads, and for
            writes with a bias for each memory token. Published models were trained without.
        spread_memory_tokens (`bool`): give memory tokens rotary positions all over their segment instead of behind it,
            so that each looks at another part of it. Published models were trained without.
        memory_layers (`list[int]`, *optional*): backbone layers that have a memory; None means all.
        armt_version (`int`): version of the checkpoint format; written by the package, not set by hand.
        code_version (`str`, *optional*): digest of the code that the checkpoint was saved with; written likewise.

    The backbone's `vocab_size`, `hidden_size`, `num_hidden_layers`, `num_attention_heads` and
    `max_position_embeddings`, as far as it has them, can be read here too, and are set in `text_config` only.

    Raises:
        ValueError: for a value that cannot work, also when it is set later or given to `from_pretrained`, and for an
            unknown field; the message says which and what to do.

    Example:

    ```python
    >>> from transformers import AutoConfig
    >>> config = ARMTConfig(text_config=AutoConfig.from_pretrained("meta-llama/Llama-3.2-1B"), segment_size=1024)
    ```
    """

    model_type = "armt"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # There is no default backbone to compare with when the configuration is saved.
    has_no_defaults_at_init = True

    text_config: PreTrainedConfig | dict | None = None
    segment_size: int = 1024
    num_mem_tokens: int = 16
    d_mem: int = 64
    dpfp_nu: int = 3
    normalize_features: bool = True
    gamma_eps: float = 0.0
    denom_eps: float = 1e-5
    correction: bool = True
    use_denom: bool = True
    write_guard: bool = True
    memory_norm: bool = False
    spread_memory_tokens: bool = False
    memory_layers: list[int] | None = None
    armt_version: int = 1
    code_version: str | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            model_type = fields.pop("model_type", None)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"text_config has model_type {model_type!r}, which this transformers does not know. Pass the "
                    "configuration of a decoder that transformers can load with AutoModelForCausalLM."
                )
            self.text_config = CONFIG_MAPPING[model_type](**fields)
        if self.text_config is None:
            raise ValueError(
                "ARMTConfig needs text_config, the configuration of the backbone. To turn a pretrained decoder into "
                "an ARMT checkpoint run: armt convert BACKBONE --out DIR"
            )
        self.validate_memory()
        if self.memory_norm or self.spread_memory_tokens:
            self.armt_version = ARMT_VERSION
        # What a file holds beside these was set by other tools, or by a later version that this code can do without.
        unknown = [] if self.transformers_version else kwargs.keys() - _STOCK_ARGUMENTS
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: ARMTConfig has no such field. What belongs to the backbone "
                "is set in its own configuration, text_config."
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in BACKBONE_SIZES}
        kwargs.pop("tie_word_embeddings", None)  # the backbone's
        # A configuration hands these down, so it must not start with less than the backbone's loader decided on.
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        kwargs.setdefault("experts_implementation", self.text_config._experts_implementation)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any):
        if name in BACKBONE_SIZES:
            raise AttributeError(f"{name} is the backbone's, and can only be set in text_config.")
        complete, before = hasattr(self, "_name_or_path"), self.__dict__.get(name)
        super().__setattr__(name, value)
        if complete and (name == "text_config" or name in MEMORY_FIELDS):
            try:
                self.validate_memory()
            except ValueError:
                super().__setattr__(name, before)
                raise

    def validate_memory(self):
        """Raises ValueError for a value that cannot work."""
        if not isinstance(self.text_config, PreTrainedConfig):
            raise ValueError(
                f"text_config is {self.text_config!r}; it must be a configuration of transformers or a dict."
            )
        for name, least in {"segment_size": 1, "num_mem_tokens": 1, "d_mem": 1, "dpfp_nu": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
        if self.dpfp_nu >= 2 * self.d_mem:
            raise ValueError(
                f"dpfp_nu is {self.dpfp_nu}, but a feature of d_mem {self.d_mem} can only be rolled by up to "
                f"{2 * self.d_mem - 1} places. Lower dpfp_nu or raise d_mem."
            )
        for name in ("gamma_eps", "denom_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a number from 0 to below 1, such as 1e-5.")
        if self.use_denom and self.denom_eps == 0:
            raise ValueError("denom_eps is 0, so an empty memory would divide by zero; use 1e-5, or use_denom=False.")
        switches = ("normalize_features", "correction", "use_denom", "write_guard", "memory_norm")
        for name in (*switches, "spread_memory_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False.")
        if not isinstance(self.armt_version, int) or self.armt_version < 1:
            raise ValueError(f"armt_version is {self.armt_version!r}; leave it out, the package writes it.")
        if self.armt_version > ARMT_VERSION:
            raise ValueError(
                f"this checkpoint has armt_version {self.armt_version}, but the code that reads it knows versions up "
                f"to {ARMT_VERSION}. Upgrade modeling-armt, or uninstall it so that the checkpoint's own code is used."
            )
        if self.memory_layers is not None:
            self._validate_memory_layers()

    def _validate_memory_layers(self):
        layers, count = self.memory_layers, self.text_config.num_hidden_layers
        if not isinstance(layers, (list, tuple)) or not all(type(index) is int for index in layers) or not layers:
            raise ValueError(
                f"memory_layers is {layers!r}; it must be a non-empty list of layer indices, or None for all layers."
            )
        outside = [index for index in layers if not 0 <= index < count]
        if outside or len(set(layers)) != len(layers):
            raise ValueError(
                f"memory_layers is {list(layers)}; indices must be different and lie between 0 and {count - 1}, since "
                f"the backbone has {count} layers."
            )
        if layers != sorted(layers):
            self.memory_layers = sorted(layers)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the backbone's head is tied to its embedding. Tools that part them say so here."""
        return getattr(self.text_config, "tie_word_embeddings", False)

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool):
        self.text_config.tie_word_embeddings = value

    @property
    def memory_fields(self) -> dict[str, Any]:
        """The fields that say how a memory works, without the backbone's."""
        return {name: getattr(self, name) for name in MEMORY_FIELDS}

    @property
    def memory_layer_indices(self) -> list[int]:
        """Indices of the backbone layers that have a memory, in ascending order."""
        return list(range(self.text_config.num_hidden_layers)) if self.memory_layers is None else self.memory_layers

    def to_dict(self) -> dict[str, Any]:
        """As for any configuration, but without the place on this machine that the backbone came from."""
        fields = super().to_dict()
        fields["text_config"].pop("_name_or_path", None)
        return fields | {"tie_word_embeddings": self.tie_word_embeddings}  # PEFT reads it here

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Builds the configuration from a `config.json` dict and options given at load, which are checked as one; refuses
        the configuration of a plain backbone.
        """
        model_type = config_dict.get("model_type")
        if model_type != cls.model_type:
            raise ValueError(
                f"this is the configuration of a {model_type!r} model, not of an ARMT checkpoint. Convert it first: "
                "armt convert BACKBONE --out DIR"
            )
        options = {name: kwargs.pop(name) for name in MEMORY_FIELDS if name in kwargs}
        return super().from_dict(config_dict | options, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As for any configuration; nothing is written of one that would not load again."""
        self.validate_memory()
        super().save_pretrained(save_directory, **kwargs)


MEMORY_FIELDS = tuple(name for name in ARMTConfig.__annotations__ if name not in ("text_config", "code_version"))
for _size in BACKBONE_SIZES:
    setattr(ARMTConfig, _size, property(attrgetter(f"text_config.{_size}")))

# Only the installed package registers classes with transformers (in its __init__, which is never copied): code that
# came with a checkpoint serves that checkpoint alone. This says that it is to be saved with what it loaded.
ARMTConfig.register_for_auto_class()

# transformers tells the code of two folders apart by their names, and by the files that an entry file's text shows it
# to import. Folders of one name that differ in any file must be told apart by this entry too.
_SEEN_BY_TRANSFORMERS = """
from .modeling_armt import ARMTForCausalLM
"""
