"""
Associative Recurrent Memory Transformer (arXiv 2407.04841) around any pretrained decoder of transformers.

tokens -> segments -> (read, layer, write) for every layer -> logits. The layers are the backbone's own, run by its own
forward; `attachment_armt.py` says how the memories get in, `memory_armt.py` what they compute, `segmentation_armt.py`
how a batch is cut, `cache_armt.py` what is kept between calls.
"""

import copy
import copyreg
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .attachment_armt import (
    are_attached,
    attach_memories,
    attach_positions,
    causal_table_size,
    find_decoder,
    find_decoder_layers,
)
from .cache_armt import ARMTCache
from .compatibility_armt import CACHE, ARMTCausalLMOutput, ARMTModelOutput, one_cache
from .compilation_armt import FastPaths
from .configuration_armt import MEMORY_FIELDS, ARMTConfig
from .decode_armt import decode
from .generation_armt import ARMTGenerationMixin
from .head_armt import run_head
from .input_armt import check_columns, check_input, check_position_table, check_training, refuse_arguments
from .memory_armt import AssociativeMemory
from .memory_file_armt import load_memory, save_memory
from .reading_armt import draft, run_steps
from .replica_armt import Replica
from .schedule_armt import choose_schedule
from .segmentation_armt import OutputColumns, RealTokens, Step, count_targets
from .streaming_armt import read_stream
from .transfer_armt import working_device
from .truncation_armt import truncated_loss, zero_loss
from .version_armt import code_version, warn_of_other_code


AUTO_MAP = {
    "AutoConfig": "configuration_armt.ARMTConfig",
    "AutoModel": "modeling_armt.ARMTModel",
    "AutoModelForCausalLM": "modeling_armt.ARMTForCausalLM",
}
"""What a checkpoint's configuration says of where its classes are."""


class ARMTPreTrainedModel(PreTrainedModel):
    """
    What [`ARMTModel`] and [`ARMTForCausalLM`] share: the backbone with its head (`model`), the memories of its layers
    (`memory`) and the memory tokens (`memory_tokens`). Both load the same checkpoint.
    """

    config_class = ARMTConfig
    # Of a property: the child `model` reads without memory.
    base_model_prefix = "headless"
    supports_gradient_checkpointing = True
    # The backbone checks its own support when it is built.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _no_split_modules = ["AssociativeMemory"]
    # What is tied is the backbone's to say; PEFT asks it only where this is a dictionary.
    _tied_weights_keys = {}
    # The memories and the memory tokens: both names start so.
    _keep_in_fp32_modules = ["memory"]
    _keep_in_fp32_modules_strict = ["memory"]

    def __init__(self, config: ARMTConfig):
        super().__init__(config)
        backbone = config.text_config
        self.model = AutoModelForCausalLM.from_config(backbone)
        self.memory = nn.ModuleDict(
            {
                str(layer): AssociativeMemory(
                    backbone.hidden_size,
                    config.d_mem,
                    config.dpfp_nu,
                    config.normalize_features,
                    config.gamma_eps,
                    config.denom_eps,
                    config.correction,
                    config.use_denom,
                    config.write_guard,
                    config.memory_norm,
                    config.num_mem_tokens,
                )
                for layer in config.memory_layer_indices
            }
        )
        # An Embedding rather than a bare parameter: adapters and quantizers look for modules.
        self.memory_tokens = nn.Embedding(config.num_mem_tokens, self.get_input_embeddings().embedding_dim)
        self.gradient_checkpointing = False
        self.fast = FastPaths()
        self._attach()
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # whether there are experts is the backbone's business

    def _attach(self):
        num_layers = self.config.text_config.num_hidden_layers
        self.decoder_name = find_decoder(self.model, num_layers)
        self.max_columns = causal_table_size(self.decoder)
        check_position_table(self)
        attach_memories(self.decoder, num_layers, self.config.memory_layer_indices)
        attach_positions(self.decoder, self.config.num_mem_tokens if self.config.spread_memory_tokens else None)

    @property
    def decoder(self) -> PreTrainedModel:
        """The backbone without its head."""
        return getattr(self.model, self.decoder_name)

    @property
    def num_embeddings(self) -> int:
        """How many token ids there are, whatever adapters have put around the embedding."""
        return self.get_input_embeddings().weight.shape[0]

    # Embeddings and head are the backbone's: resizing and quantizers find them through these.

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.model.set_output_embeddings(value)

    def get_decoder(self) -> "ARMTModel":
        return self.base_model

    def set_decoder(self, decoder: nn.Module):
        raise NotImplementedError("the decoder has hooks that belong to the memory; make a new model: from_backbone")

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, **memory_options) -> "ARMTPreTrainedModel":
        """
        Puts fresh memories on a loaded decoder, which becomes part of the new model. They add exactly zero until they
        are trained.

        Args:
            backbone: a causal language model of transformers, with head.
            memory_options: fields of [`ARMTConfig`], such as `segment_size` or `num_mem_tokens`.

        Example:

        ```python
        >>> backbone = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = ARMTForCausalLM.from_backbone(backbone, segment_size=1024)
        ```
        """
        if isinstance(backbone, ARMTPreTrainedModel) or getattr(backbone, "get_output_embeddings", bool)() is None:
            raise TypeError(f"{type(backbone).__name__} is not a plain causal language model with a head.")
        unknown = set(memory_options) - set(MEMORY_FIELDS)
        if unknown:
            raise TypeError(f"{', '.join(sorted(unknown))}: no such option; see ARMTConfig.")
        config = ARMTConfig(text_config=backbone.config, **memory_options)
        with torch.device("meta"):
            model = cls(config)
        model.model = backbone
        model._attach()
        for layer, device in model.layer_devices().items():
            if str(layer) in model.memory:
                memory = model.memory[str(layer)].to_empty(device=device)
                model._init_weights(memory)
        embedding = backbone.get_input_embeddings()
        device = working_device(embedding)
        model.memory_tokens.to_empty(device=device)
        # As large as what the embedding returns, which some families scale.
        sample = embedding(torch.arange(min(1000, model.num_embeddings), device=device))
        nn.init.normal_(model.memory_tokens.weight, std=sample.float().std().item())
        memory_dtype = torch.promote_types(embedding.weight.dtype, torch.float32)
        model.memory.to(memory_dtype)
        model.memory_tokens.to(memory_dtype)
        model.generation_config = copy.deepcopy(backbone.generation_config)
        model.generation_config.cache_implementation = None  # some families ask for a cache of their own
        return model.train(backbone.training)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # Of custom code the stock method leaves modules out that have no parameters of their own: the memories.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, AssociativeMemory):
            for name, parameter in module.named_parameters():
                if name == "memory_beta.bias" or name.endswith("norm.weight"):
                    init.ones_(parameter)
                elif name == "memory_value.weight" or name.endswith("norm.bias"):
                    init.zeros_(parameter)  # a fresh memory stores and returns 0
                else:
                    bound = parameter.shape[-1] ** -0.5
                    init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)

    def layer_devices(self) -> dict[int, torch.device]:
        """The device of every decoder layer."""
        layers = find_decoder_layers(self.decoder, self.config.text_config.num_hidden_layers)
        return {index: working_device(layer) for index, layer in enumerate(layers)}

    # Loading and saving: both Auto classes find their code in the folder, and the memory of a text has its own file

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As for any model; warns where the installed code runs a checkpoint that came with another version of it."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with what was missing, if that was asked for
        warn_of_other_code(pretrained_model_name_or_path, model.config)
        return loaded

    def save_pretrained(self, save_directory, **kwargs):
        self.config.validate_memory()
        self.config.auto_map = dict(AUTO_MAP)
        self.config.code_version = code_version()
        super().save_pretrained(save_directory, **kwargs)

    def save_memory(self, cache: ARMTCache, path) -> None:
        """Writes what `cache` remembers to a safetensors file, with this model's identity."""
        save_memory(self, cache, path)

    def load_memory(self, path) -> ARMTCache:
        """
        Reads a memory that this model wrote, in this process or another. It starts a new conversation: `generate` and
        forward take the ids that come after what it has read.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for anything but a memory of this model as it was saved.
        """
        return load_memory(self, path)

    # Speed

    def compile_armt(self, enabled: bool = True) -> "ARMTPreTrainedModel":
        """
        Switches compiled code on, or off again. What is compiled is compiled when it is first needed, once per shape;
        results stay the same up to rounding.

        Returns:
            The model itself.
        """
        self.fast = FastPaths(enabled)
        return self

    def _apply(self, *args, **kwargs):
        for groups in self.fast.diagonal:  # weights may move; buffers would hold on to them
            groups.idle.clear()
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Replica:
        return Replica(self)

    # Gradient checkpointing: per segment, not per layer

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True loses the gradients that flow through the memory. Leave it out or pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        self.gradient_checkpointing = enable

    def checkpointed(self, function: Callable, *args):
        """Calls a function that has no side effects, under gradient checkpointing if that is on."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)

    # Reading a text

    def _read(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        attention_mask: torch.Tensor | None,
        cache: ARMTCache | None,
        whole: bool,
        bptt_segments: int | None = None,
        output_hidden_states: bool = False,
        schedule: str | None = None,
    ) -> tuple[
        RealTokens, list[Step], Callable[..., Iterator[tuple[Step, tuple[torch.Tensor, ...]]]], ARMTCache | None
    ]:
        """
        Checks the input and cuts it into steps. `whole` says that it is not one of several parts of a text.

        Returns:
            Where the real tokens are, the steps, [`run_steps`] to run them with, and what they are read into.
        """
        source, tokens = check_input(self, input_ids, inputs_embeds, attention_mask, cache, whole)
        check_training(self, bptt_segments)
        where = self.decoder, self.config.text_config.num_hidden_layers, self.config.memory_layer_indices
        if self.training and not are_attached(*where):
            attach_memories(*where)
        opened = [0] * tokens.batch_size
        if cache is not None and cache.opened:
            opened = cache.opened * (tokens.batch_size // cache.batch_size)
        steps, prepared = choose_schedule(
            self, tokens.counts, opened, cache is not None, schedule, output_hidden_states, bptt_segments
        )
        work = None if cache is None else draft(cache, tokens)
        run = partial(run_steps, self, source, tokens, steps, work, bptt_segments, output_hidden_states, prepared)
        return tokens, steps, run, work

    def _read_columns(
        self, columns: OutputColumns, run: Callable[..., Iterator], work: ARMTCache | None
    ) -> tuple[torch.Tensor, ...]:
        """Runs all steps; returns `(last hidden state, hidden states of all layers ...)` in the wanted columns."""
        before = None if work is None else work.last_hidden
        for step, outputs in run(wants=columns.wants):
            columns.add(step, outputs)
        if before is None and not columns.empty:  # no row has had a token yet
            shape = (columns.tokens.batch_size, self.get_output_embeddings().in_features)
            device = working_device(self.get_input_embeddings())
            before = torch.zeros(shape, dtype=self.dtype, device=device)
        hidden, *hidden_states = columns.collect(before)
        return self._using_all_memories(hidden), *hidden_states

    def _using_all_memories(self, value: torch.Tensor) -> torch.Tensor:
        """
        The same value, with every trainable parameter of the memories and the memory tokens in its graph: those that a
        text does not need get a gradient of 0 instead of none, for which data parallel training would wait.
        """
        memories = (*self.memory.parameters(), *self.memory_tokens.parameters())
        parameters = [parameter for parameter in memories if parameter.requires_grad]
        if not parameters or not torch.is_grad_enabled():
            return value
        return value + zero_loss(parameters).to(value.device)

    @torch.no_grad()
    def close_segment(self, cache: ARMTCache) -> None:
        """
        Writes the open, incomplete segments to memory, as if they had been complete. A text that is read from here on
        starts a new segment. Rows with nothing open keep their memory.
        """
        if not any(cache.opened):
            return
        batch_size = cache.batch_size
        closes = [opened > 0 for opened in cache.opened]
        step = Step([0] * batch_size, [0] * batch_size, cache.opened, closes, self.config.num_mem_tokens)
        tokens = RealTokens(batch_size, 0)
        source = torch.zeros(batch_size, 0, dtype=torch.long)
        work = draft(cache, tokens)
        for _ in run_steps(self, source, tokens, [step], work):
            pass
        cache.become(work)

    def _cache_for(self, given, use_cache: bool | None, labels=None) -> ARMTCache | None:
        if given is not None:
            if not isinstance(given, ARMTCache):
                raise ValueError(f"cache must be an ARMTCache, not {type(given).__name__}.")
            return given
        if use_cache is None:
            configured = getattr(self.config, "use_cache", getattr(self.config.text_config, "use_cache", True))
            use_cache = configured and not self.training and labels is None
        return ARMTCache() if use_cache else None


class ARMTModel(ARMTPreTrainedModel):
    """The backbone with memory, without using its head: returns hidden states."""

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: ARMTCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        schedule: str | None = None,
        return_dict: bool | None = None,
        past_key_values: ARMTCache | None = None,
        **kwargs,
    ) -> ARMTModelOutput | tuple:
        """
        Args:
            input_ids: `(B, T)`, T of any length.
            attention_mask: `(B, T)`, 0 for padding, which may be anywhere; or with the columns read before.
            cache: what earlier calls returned; advanced by this one.
            inputs_embeds: `(B, T, D)` instead of `input_ids`.
            use_cache: return a cache; default: unless training.
            output_hidden_states: return the hidden states of all layers too.
            schedule: `sequential`, `diagonal`, or None for what is faster here; they return the same.
            return_dict: False for a tuple.
            past_key_values: another name of `cache`, the one before transformers 5.24.

        Returns:
            `last_hidden_state` `(B, T, D)`, `cache` and `hidden_states`. A padding column holds what the
            last real token before it got, zeros if there was none.
        """
        refuse_arguments(kwargs, accepted=())
        given = one_cache(cache, past_key_values)
        cache = self._cache_for(given, use_cache)
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        tokens, _, run, work = self._read(
            input_ids,
            inputs_embeds,
            attention_mask,
            cache,
            whole=given is None,
            output_hidden_states=bool(output_hidden_states),
            schedule=schedule,
        )
        hidden, *hidden_states = self._read_columns(OutputColumns(tokens, 0, tokens.num_columns), run, work)
        output = ARMTModelOutput(
            last_hidden_state=hidden,
            **{CACHE: cache},
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        if cache is not None:
            cache.become(work)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class _HeadlessView(ARMTModel):
    """All that a causal language model has but for how it is called: a forward put in its place has the head."""

    @property
    def __class__(self):
        return ARMTModel

    @property
    def forward(self):
        return MethodType(ARMTModel.forward, self)

    @property
    def _compiled_call_impl(self):
        return None

    @_compiled_call_impl.setter
    def _compiled_call_impl(self, value):
        raise AttributeError("base_model shares all it has with the causal language model: compile that.")

    def __reduce_ex__(self, protocol):
        """A copy is an ARMTModel of its own."""
        own = ("forward", "_compiled_call_impl")
        state = {name: value for name, value in self.__dict__.items() if name not in own}
        return copyreg.__newobj__, (ARMTModel,), state


_views: WeakKeyDictionary["ARMTForCausalLM", _HeadlessView] = WeakKeyDictionary()


class ARMTForCausalLM(ARMTPreTrainedModel, ARMTGenerationMixin):
    """A causal language model of constant memory: the backbone, its head, and an associative memory in its layers."""

    @property
    def headless(self) -> ARMTModel:
        """
        This model as an [`ARMTModel`]: not a copy, but the same object under the other class, so that whatever is done
        to one is done to both. It is what `base_model`, `base_model_prefix` and `get_decoder` lead to.
        """
        view = _views.get(self)
        if view is None or view.__dict__ is not self.__dict__:
            view = _views[self] = _HeadlessView.__new__(_HeadlessView)
            object.__setattr__(view, "__dict__", self.__dict__)
        return view

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: ARMTCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_logits: bool = True,
        bptt_segments: int | None = None,
        schedule: str | None = None,
        return_dict: bool | None = None,
        past_key_values: ARMTCache | None = None,
        **kwargs,
    ) -> ARMTCausalLMOutput | tuple:
        """
        Args:
            input_ids: `(B, T)`, T of any length.
            attention_mask: `(B, T)`, 0 for padding, which may be anywhere; or with the columns read before.
            cache: what earlier calls returned; advanced by this one.
            inputs_embeds: `(B, T, D)` instead of `input_ids`.
            labels: `(B, T)`, the ids themselves (they are shifted here), -100 where there is no loss. Predictions
                cross segment borders.
            use_cache: return a cache; default: unless training or given labels.
            output_hidden_states: return the hidden states of all layers too.
            logits_to_keep: logits of the last so many columns only (0: all), or of the columns in a 1D tensor of
                indices or a bool mask.
            return_logits: False computes the same loss segment by segment and returns no logits, so that those of two
                segments never exist at once: for training on long texts.
            bptt_segments: gradients flow back through so many segments at most (counted from the end of the text);
                None: through all. With `return_logits=False` it bounds the memory of training too: a window is
                differentiated as soon as it is read.
            schedule: `sequential`, `diagonal`, or None for what is faster here; they return the same.
            return_dict: False for a tuple.
            past_key_values: another name of `cache`, the one before transformers 5.24.
            kwargs: `num_items_in_batch`, by which the sum of the losses is divided: the labels behind the first column
                of all batches of a step, as the Trainer counts them; and other arguments of the loss function.

        Returns:
            `loss`, `logits` `(B, T, vocabulary)`, `cache`, `hidden_states`. A padding column holds what its
            row's last real token before it got.
        """
        asked = [name for name, value in kwargs.items() if value is not None and value is not False]
        given = one_cache(cache, past_key_values)
        if self.fast.enabled and isinstance(given, ARMTCache) and not asked:
            plain = inputs_embeds is None and labels is None and bptt_segments is None and schedule is None
            states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            if plain and return_logits and not states and type(logits_to_keep) is int and logits_to_keep >= 0:
                logits = decode(self, input_ids, attention_mask, given)
                if logits is not None:
                    output = ARMTCausalLMOutput(logits=logits, **{CACHE: given})
                    as_dict = self.config.return_dict if return_dict is None else return_dict
                    return output if as_dict else output.to_tuple()
        refuse_arguments(kwargs, accepted=("num_items_in_batch", "ignore_index"))
        cache = self._cache_for(given, use_cache, labels)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(
                "labels need the logits of all columns; leave logits_to_keep out, or use return_logits=False."
            )
        if not return_logits and (labels is None or output_hidden_states):
            raise ValueError("return_logits=False computes the loss and nothing else: pass labels, ask for no states.")
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        tokens, steps, run, work = self._read(
            input_ids,
            inputs_embeds,
            attention_mask,
            cache,
            whole=given is None,
            bptt_segments=bptt_segments,
            output_hidden_states=bool(output_hidden_states),
            schedule=schedule,
        )
        if labels is not None and labels.shape != (tokens.batch_size, tokens.num_columns):
            expected = (tokens.batch_size, tokens.num_columns)
            raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be that of the input, {expected}.")
        loss = logits = hidden_states = targets = None
        if labels is not None:
            targets = tokens.next_of(labels)
            if kwargs.get("num_items_in_batch") is not None:
                kwargs["num_items_in_batch"] = count_targets(labels, targets, kwargs["num_items_in_batch"])
        if return_logits:
            if isinstance(logits_to_keep, torch.Tensor):
                logits_to_keep = check_columns(logits_to_keep, tokens.num_columns)
            first, last = self._columns_to_keep(logits_to_keep, tokens.num_columns)
            kept = (0, tokens.num_columns) if output_hidden_states else (first, last)
            hidden, *hidden_states = self._read_columns(OutputColumns(tokens, *kept), run, work)
            hidden = hidden[:, first - kept[0] : last - kept[0]]
            if isinstance(logits_to_keep, torch.Tensor):
                hidden = hidden[:, logits_to_keep.to(hidden.device) - first]
            logits = self._logits(hidden)
            if labels is not None:
                if tokens.rank is not None:
                    targets = targets.gather(1, tokens.rank.clamp(min=0)).masked_fill(~tokens.real, -100)
                loss = self._loss(logits, targets, **kwargs)
        else:
            loss = self._loss_by_segment(targets, steps, run, bptt_segments, inputs_embeds, **kwargs)
        output = ARMTCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: cache},
            hidden_states=tuple(hidden_states) if output_hidden_states and hidden_states else None,
        )
        if cache is not None:  # nothing can fail any more
            cache.become(work)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @torch.no_grad()
    def read(
        self,
        tokens: Any,
        cache: ARMTCache | None = None,
        schedule: str | None = None,
        block_segments: int = 512,
        progress: Callable[[int], Any] | None = None,
        past_key_values: ARMTCache | None = None,
    ) -> ARMTCausalLMOutput:
        """
        Reads a text of any length from wherever it is, block by block and without gradients: what one forward call
        would return for its last token, with no more of the text in memory than a block.

        Args:
            tokens: `(T,)` or `(B, T)` ids: a tensor of any integer dtype on any device, or an array (`np.memmap` and
                `np.load(..., mmap_mode="r")` too), of which blocks are sliced; or an iterable of ints, or an iterator
                of `(n,)` chunks of any sizes, which is taken as far as the next block needs.
            cache: what earlier calls returned; advanced when everything is read, untouched if that fails.
            schedule: as in forward.
            block_segments: segments in a block.
            progress: called after each block with the number of tokens it had.
            past_key_values: another name of `cache`.

        Returns:
            `logits` `(B, 1, vocabulary)` of the last token and `cache`.

        Raises:
            ValueError: for an empty text, or what is not token ids of this vocabulary; it names the position.
        """
        cache = self._cache_for(one_cache(cache, past_key_values), use_cache=True)
        return read_stream(self, tokens, cache, schedule, block_segments, progress)

    @staticmethod
    def _columns_to_keep(logits_to_keep: int | torch.Tensor, num_columns: int) -> tuple[int, int]:
        if isinstance(logits_to_keep, int):
            if logits_to_keep < 0:
                raise ValueError(f"logits_to_keep is {logits_to_keep}; it must be at least 0.")
            return max(num_columns - logits_to_keep, 0) if logits_to_keep else 0, num_columns
        return int(logits_to_keep.min()), int(logits_to_keep.max()) + 1

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return run_head(self.model, self.decoder_name, hidden)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.loss_function(
            logits=logits, labels=None, vocab_size=logits.shape[-1], shift_labels=targets.contiguous(), **kwargs
        )

    def _loss_by_segment(
        self,
        targets: torch.Tensor,
        steps: list[Step],
        run: Callable,
        bptt_segments: int | None,
        inputs_embeds: torch.Tensor | None,
        **kwargs,
    ) -> torch.Tensor:
        """The loss for `(B, T)` targets by token, with the logits of one segment at a time."""
        packed = RealTokens(*targets.shape)  # targets are by token: there is no padding to skip
        of_step = [packed.pack(targets, step, fill=-100) for step in steps]
        counts = torch.stack([(target != -100).sum() for target in of_step]).tolist()
        if kwargs.get("num_items_in_batch") is None:
            kwargs["num_items_in_batch"] = sum(counts)
        if not any(counts):
            counts[-1] = 1  # without labels, the stock loss: 0 of some items, or the mean of nothing
        # What lies before the window of the first target cannot receive a gradient.
        labelled = next((number for number, count in enumerate(counts) if count), len(steps))
        window = bptt_segments or len(steps)
        grad_from = max(labelled - (labelled - len(steps)) % window, 0)

        def segment_loss(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self._loss(self._logits(hidden), target, **kwargs)

        def windows() -> Iterator[torch.Tensor]:
            loss = zero = torch.zeros((), device=targets.device)
            wanted = {id(step) for step, count in zip(steps, counts, strict=True) if count}
            outputs = run(grad_from=grad_from, wants=lambda step: id(step) in wanted)
            for number, (target, count) in enumerate(zip(of_step, counts, strict=True)):
                step, (hidden, *_) = next(outputs)
                if count:
                    hidden = hidden[:, : max(step.taken)]
                    # Checkpointed, so that no segment's logits are kept for the backward pass.
                    loss = loss + checkpoint(segment_loss, hidden, target, use_reentrant=False).to(loss.device)
                del hidden
                if (len(steps) - number - 1) % window == 0:
                    yield loss
                    loss = zero
            next(outputs, None)  # lets the schedule finish its work

        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if inputs_embeds is not None and inputs_embeds.requires_grad:
            parameters.append(inputs_embeds)
        if bptt_segments is None or not torch.is_grad_enabled() or not parameters:
            return self._using_all_memories(sum(windows()))
        return truncated_loss(windows(), parameters)


# Names by which transformers knows a causal language model: its Trainer smooths shifted labels for no other one.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ARMTConfig.model_type] = ARMTForCausalLM.__name__

ARMTModel.register_for_auto_class("AutoModel")
ARMTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
