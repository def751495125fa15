"""
The diagonal schedule (arXiv 2506.05229): the cells (segment, layer) of one diagonal at once.

Layer l at segment s needs layer l - 1 at segment s and the memory that layer l had after segment s - 1. So the cells
with equal s + l do not need each other. A diagonal is one call for each group of equal layers (`stacking_armt.py`),
which reads, runs and writes all of its cells; what leaves layer l enters layer l + 1 on the next diagonal:

    diagonal     0    1    2    3    4    5
    layer 2                s0   s1   s2   s3
    layer 1           s0   s1   s2   s3
    layer 0      s0   s1   s2   s3              at both ends only the layers that have a segment are run

Segments of several rows go side by side, in lanes, and where a row ends in a lane another one begins.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from .attachment_armt import MemoryStatistics, find_decoder_layers
from .memory_armt import MemoryState
from .native_armt import StandIn, with_layers
from .segmentation_armt import RealTokens, Step
from .sequential_armt import embed_memory_tokens, embed_tokens
from .stacked_memory_armt import StackedMemory, memory_weights
from .stacking_armt import CannotStack, LayerGroup, kind


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

# From so many positions on a diagonal gains nothing by more rows.
FULL_DIAGONAL = 16 * 1024
# Positions that are embedded at once.
EMBEDDED = 16 * 1024


Tensors = dict[int, torch.Tensor]


class LayerState(NamedTuple):
    """What the layers of a call remember, `(G, W, ...)` each for W lanes; the last three only outside of training."""

    A: torch.Tensor | None
    z: torch.Tensor | None
    gamma_sum: torch.Tensor | None = None
    gamma_count: torch.Tensor | None = None
    min_denominator: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerState":
        return LayerState(*(None if tensor is None else function(tensor) for tensor in self))


class NativeCall(NamedTuple):
    """How a decoder called one of its layers."""

    x: torch.Tensor
    leaves: list[Any]  # its other arguments, flattened
    structure: Any
    output: Any


class _Recorder(StandIn):
    """Records how its layer is called, and answers in the layer's place unless it is to run it."""

    def __init__(self, layer: nn.Module, calls: list[NativeCall], run: bool, answer: Callable):
        super().__init__(layer)
        self.__dict__.update(calls=calls, run=run, answer=answer)

    def forward(self, *args, **kwargs):
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        output = self.layer(x, *args, **kwargs) if self.run else self.answer(x)
        leaves, structure = tree_flatten((args, kwargs))
        self.calls.append(NativeCall(x, leaves, structure, output))
        return output


def native_pass(
    model: "ARMTPreTrainedModel", embeds: torch.Tensor, answers: Sequence[Callable] | None = None
) -> tuple[list[NativeCall], torch.Tensor]:
    """
    Runs the decoder's own forward on `(B, P, D)` embeddings, without memories.

    Args:
        answers: what each layer is replaced by; None runs the layers.

    Returns:
        The calls of all layers, and the last hidden state.
    """
    num_layers = model.config.text_config.num_hidden_layers
    calls: list[NativeCall] = []
    layers = find_decoder_layers(model.decoder, num_layers)
    recorders = [
        _Recorder(layer, calls, answers is None, None if answers is None else answers[number])
        for number, layer in enumerate(layers)
    ]
    decoder = with_layers(model.decoder, num_layers, recorders)
    output = type(decoder).forward(decoder, inputs_embeds=embeds, use_cache=False, return_dict=True)
    if len(calls) != num_layers:
        raise CannotStack("its decoder does not run every layer exactly once")
    return calls, output.last_hidden_state


class CellGroup:
    """
    The cells of equal layers.

    Args:
        indices: of the layers in the decoder.
        layers: the layers.
        memories: theirs, None for layers without.
        call: how the decoder calls the first of them.
        compiled: whether to compile what is run.
    """

    def __init__(
        self, indices: list[int], layers: list[nn.Module], memories: list | None, call: NativeCall, compiled: bool
    ):
        self.indices = indices
        self.layers = LayerGroup(layers)
        self.like = None if memories is None else memories[0]
        self.structure = call.structure
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in call.leaves]
        self.tensor_places = [n for n, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor)]
        self.run = torch.compile(self._run, dynamic=False) if compiled else self._run
        # Every size is compiled apart; small ones are as fast per cell, so a few serve all.
        size, self.sizes = len(indices), []
        while compiled and size > 1:
            self.sizes.append(size)
            size //= 4
        self.sizes.append(1)
        self.compiled = compiled

    def parts(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cuts a range of the group's layers into calls."""
        if not self.compiled:
            yield first, last
            return
        for size in self.sizes:
            while last - first >= size:
                yield first, first + size
                first += size

    def arguments(self, calls: list[NativeCall]) -> tuple[Tensors, Tensors]:
        """By place in a call: tensors that all layers are called with, and those that differ, `(G, ...)`."""
        shared, own = {}, {}
        for place in self.tensor_places:
            leaves = [call.leaves[place] for call in calls]
            if all(leaf is leaves[0] or torch.equal(leaf, leaves[0]) for leaf in leaves):
                shared[place] = leaves[0]
            else:
                own[place] = torch.stack(leaves)
        return shared, own

    def run_layers(self, weights: dict, x: torch.Tensor, shared: Tensors, own: Tensors) -> torch.Tensor:
        """The layers alone: `(G, W, P, D)` to `(G, W, P, D)`."""

        def call(own: Tensors):
            leaves = list(self.constants)
            for place, tensor in (*shared.items(), *own.items()):
                leaves[place] = tensor
            return tree_unflatten(leaves, self.structure)

        # cuDNN's attention is the fastest where it runs, but fails in the backward pass under vmap (torch 2.11).
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        if x.device.type == "cpu":
            backends = [SDPBackend.MATH]
        elif not torch.is_grad_enabled():
            backends = [SDPBackend.CUDNN_ATTENTION, *backends]
        with sdpa_kernel(backends, set_priority=True):
            return self.layers(weights, x, own, call)

    def _run(
        self,
        weights: dict[str, torch.Tensor],
        memory_weights: dict[str, torch.Tensor] | None,
        state: LayerState | None,
        x: torch.Tensor,
        shared: Tensors,
        own: Tensors,
        num_mem_tokens: int,
        first: torch.Tensor | None,
        writes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, LayerState | None]:
        """
        Reads, runs and writes the cells of G layers and W lanes.

        Args:
            weights, memory_weights: `(G, ...)` each.
            state: before the segments.
            x: `(G, W, P, D)`.
            shared, own: further arguments of the layers.
            num_mem_tokens: m; the last m positions are the memory tokens.
            first: `(G, W)` bool, the cells whose row has never written; None if all have.
            writes: `(G, W)` bool, the cells that write; None if all do.

        Returns:
            `(G, W, P, D)` and the state after the segments.
        """
        if memory_weights is None:
            return self.run_layers(weights, x, shared, own), state
        memory, old = StackedMemory(self.like, memory_weights), MemoryState(state.A, state.z)
        x, read_denominator = memory.read(x, old)
        y = self.run_layers(weights, x, shared, own)
        new, terms = memory.write(y[:, :, -num_mem_tokens:], old, first)
        if writes is not None:
            new = new.where(writes, old)
        if state.gamma_sum is None:
            return y, LayerState(*new)
        wrote = torch.ones_like(state.gamma_sum) if writes is None else writes.to(state.gamma_sum)
        least = state.min_denominator
        if read_denominator is not None:
            met = read_denominator.amin(-1).minimum(terms.denominator.amin(-1))
            for rows in (first, None if writes is None else ~writes):
                met = met if rows is None else met.masked_fill(rows, float("inf"))
            least = least.minimum(met)
        gamma_sum = state.gamma_sum + terms.gamma.sum(-1) * wrote
        return y, LayerState(*new, gamma_sum, state.gamma_count + num_mem_tokens * wrote, least)


class Diagonal:
    """
    The layers of a model in groups.

    Args:
        model: the model.
        calls: how its decoder calls the layers, with their outputs.
        kinds: what can be told apart of each layer and its call.

    Attributes:
        cold_start_s: seconds that preparation and compilation have taken so far.
    """

    def __init__(self, model: "ARMTPreTrainedModel", calls: list[NativeCall], kinds: list[tuple]):
        self.kinds = kinds
        self.tuple_sizes = [len(call.output) if isinstance(call.output, tuple) else 0 for call in calls]
        self.cold_start_s = 0.0
        self.warm: set[tuple] = set()
        layers = find_decoder_layers(model.decoder, len(calls))
        members: dict[tuple, list[int]] = {}
        for number, of_layer in enumerate(kinds):
            members.setdefault(of_layer, []).append(number)
        self.groups = []
        for indices in members.values():
            memories = [model.memory[str(i)] for i in indices] if str(indices[0]) in model.memory else None
            self.groups.append(
                CellGroup(indices, [layers[i] for i in indices], memories, calls[indices[0]], model.fast.enabled)
            )

    @torch.no_grad()
    def check(self, model: "ARMTPreTrainedModel", calls: list[NativeCall]) -> None:
        """Compares with the layers one by one. Raises CannotStack if a group does not do what its layers do."""
        layers = find_decoder_layers(model.decoder, len(calls))
        for group in self.groups:
            of_group = [calls[i] for i in group.indices]
            group.layers.train_as(layers[group.indices[0]])
            weights = group.layers.weights([layers[i] for i in group.indices])
            try:
                together = group.run_layers(
                    weights, torch.stack([call.x for call in of_group]), *group.arguments(of_group)
                )
            except Exception as error:  # whatever an operation raises that cannot be batched
                reason = str(error).strip().split("\n")[0]
                raise CannotStack(f"its layers cannot be run as one ({type(error).__name__}: {reason})") from error
            for call, y in zip(of_group, together, strict=True):
                alone = call.output[0] if isinstance(call.output, tuple) else call.output
                error = (y - alone).float().norm() / alone.float().norm().clamp(min=1e-30)
                if not error < (1e-3 if y.dtype in (torch.float32, torch.float64) else 5e-2):
                    raise CannotStack(f"layers {group.indices} do not compute the same when run as one")

    def answers(self) -> list[Callable]:
        """What stands in for each layer and returns its input, in the form that the decoder expects."""
        return [partial(_as_output, size) for size in self.tuple_sizes]


def _as_output(tuple_size: int, x: torch.Tensor):
    return (x, *[None] * (tuple_size - 1)) if tuple_size else x


class Prepared(NamedTuple):
    """A diagonal schedule for one call: the groups and what their layers are called with."""

    diagonal: Diagonal
    calls: list[NativeCall]
    lanes: int


def lanes_for(model: "ARMTPreTrainedModel", rows: int) -> int:
    """How many rows are read side by side: as many as fill a diagonal, and all of them where gradients are wanted."""
    if torch.is_grad_enabled():
        return rows
    config = model.config
    positions = config.text_config.num_hidden_layers * (config.segment_size + config.num_mem_tokens)
    return min(rows, -(-FULL_DIAGONAL // positions))


def prepare(model: "ARMTPreTrainedModel", lanes: int) -> Prepared:
    """
    Finds out how a model's layers can be run as groups, or finds that again.

    Raises:
        CannotStack: saying what about the model is in the way.
    """
    started = time.perf_counter()
    config, fast = model.config, model.fast
    layers = find_decoder_layers(model.decoder, config.text_config.num_hidden_layers)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise CannotStack("it is spread over several devices")
    attention = config.text_config._attn_implementation
    kinds = [(kind(layer), str(i) in model.memory, attention) for i, layer in enumerate(layers)]
    generator = torch.Generator(model.device).manual_seed(0)
    shape = (lanes, config.segment_size + config.num_mem_tokens, model.memory_tokens.embedding_dim)
    embeds = 0.02 * torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
    with fast.lock, torch.no_grad():
        fast.diagonal = fast.diagonal or []
        known = [entry for entry in fast.diagonal if [of_layer[:3] for of_layer in entry.kinds] == kinds]
        if known:
            calls, _ = native_pass(model, embeds, known[0].answers())
            kinds_now = [(*of_layer, *_describe_call(call)) for of_layer, call in zip(kinds, calls, strict=True)]
            for entry in known:
                if entry.kinds == kinds_now:
                    return Prepared(entry, calls, lanes)
        calls, _ = native_pass(model, embeds)
        kinds = [(*of_layer, *_describe_call(call)) for of_layer, call in zip(kinds, calls, strict=True)]
        diagonal = Diagonal(model, calls, kinds)
        diagonal.check(model, calls)
        diagonal.cold_start_s += time.perf_counter() - started
        fast.diagonal.append(diagonal)
    return Prepared(diagonal, calls, lanes)


def _describe_call(call: NativeCall) -> tuple:
    leaves = ((leaf.dim(), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in call.leaves)
    return str(call.structure), *leaves


Slot = tuple[Any, int]  # a tensor, or a tuple of tensors, with one entry per layer, and the entry


def join(slots: list[Slot]) -> Any:
    """The entries of the slots as one: without a copy if they lie side by side in one tensor."""
    values, first = slots[0]
    if all(other is values and i == first + number for number, (other, i) in enumerate(slots)):
        part = slice(first, first + len(slots))
        return values[part] if isinstance(values, torch.Tensor) else values.map(lambda tensor: tensor[part])
    if isinstance(values, torch.Tensor):
        return torch.stack([tensor[i] for tensor, i in slots])
    fields = zip(*(values for values, _ in slots), strict=True)
    places = [i for _, i in slots]
    return type(values)(
        *(
            None if field[0] is None else torch.stack([tensor[i] for tensor, i in zip(field, places, strict=True)])
            for field in fields
        )
    )


class Pipeline:
    """
    Reads a stretch of steps that [`plan_pipeline`] made, in the diagonal schedule.

    Args:
        model, source, tokens: as for [`run_steps`].
        prepared: what [`prepare`] returned.
        steps: steps with `rows`; the first has the most rows.
        states, segments: the memories of all rows, and how many segments each row has written.
        statistics: filled if given.
        cached: whether somebody may go on from the end.
        wants: whether anybody looks at the outputs of a step.

    Attributes:
        states, segments: after the stretch, once `run` is exhausted.
        last_hidden: by row, `(D,)`, the last hidden state of its last token.
    """

    def __init__(
        self,
        model: "ARMTPreTrainedModel",
        source: torch.Tensor,
        tokens: RealTokens,
        prepared: Prepared,
        steps: list[Step],
        states: dict[int, MemoryState | None],
        segments: list[int],
        statistics: MemoryStatistics | None,
        cached: bool,
        wants: Callable[[Step], bool],
    ):
        self.model, self.source, self.tokens, self.steps = model, source, tokens, steps
        self.diagonal, self.calls, _ = prepared
        self.states, self.segments, self.statistics = dict(states), list(segments), statistics
        self.cached, self.wants = cached, wants
        self.lanes = len(steps[0].rows)
        self.last_hidden: dict[int, torch.Tensor] = {}
        rows = [step.rows + [-1] * (self.lanes - len(step.rows)) for step in steps]
        nobody = [-1] * self.lanes
        # By step, the lanes in which a row begins, and those in which one ends.
        lanes, before, after = range(self.lanes), [nobody, *rows[:-1]], [*rows[1:], nobody]
        self.begins = [[w for w in lanes if a[w] != b[w] >= 0] for a, b in zip(before, rows, strict=True)]
        self.ends = [[w for w in lanes if b[w] != a[w] >= 0] for a, b in zip(rows, after, strict=True)]
        self.rows = rows
        self.ended: dict[int, dict[int, LayerState]] = {layer: {} for layer in states}

    def run(self) -> Iterator[tuple[Step, tuple[torch.Tensor, ...]]]:
        """Yields each step with its outputs, `(last hidden state,)`, which is empty if nobody wants it."""
        model, steps = self.model, self.steps
        num_layers, length = len(self.calls), len(steps)
        layers = find_decoder_layers(model.decoder, num_layers)
        weights = []
        for group in self.diagonal.groups:
            group.layers.train_as(layers[group.indices[0]])
            memories = None
            if group.like is not None:
                halves = model.dtype == torch.bfloat16 and model.device.type == "cuda"
                memories = memory_weights([model.memory[str(i)] for i in group.indices], halves)
            own = group.layers.weights([layers[i] for i in group.indices])
            weights.append((own, memories, *group.arguments([self.calls[i] for i in group.indices])))
        entering = self._entering()
        state: dict[int, Slot] = {}
        y: dict[int, Slot] = {}
        for number in range(length + num_layers - 1):
            low, high = max(0, number - length + 1), min(num_layers - 1, number)
            x = {layer: y[layer - 1] for layer in range(max(low, 1), high + 1)}
            if low == 0:
                x[0] = next(entering)
            y = {}
            for group, of_group in zip(self.diagonal.groups, weights, strict=True):
                active = [i for i, layer in enumerate(group.indices) if low <= layer <= high]
                if not active:
                    continue
                for first, last in group.parts(active[0], active[-1] + 1):
                    layers_now = group.indices[first:last]
                    output, new = self._call(group, of_group, first, last, number, state, [x[i] for i in layers_now])
                    for i, layer in enumerate(layers_now):
                        y[layer] = (output, i)
                        if new is not None:
                            state[layer] = (new, i)
                            self._end_rows(layer, number - layer, new, i)
            done = number - (num_layers - 1)
            if done >= 0:
                values, i = y[num_layers - 1]
                yield steps[done], self._leaving(steps[done], done, values[i])
        self._collect()

    def _call(self, group, of_group, first: int, last: int, number: int, state: dict[int, Slot], x: list[Slot]):
        """One call of a group's layers `first` to `last - 1` on diagonal `number`."""
        weights, memory, shared, own = of_group
        layers = group.indices[first:last]
        steps = [number - layer for layer in layers]
        before = new_rows = writes = None
        if memory is not None:
            for layer, step in zip(layers, steps, strict=True):
                if self.begins[step]:
                    state[layer] = self._begin_rows(layer, step, state.get(layer))
            before = join([state[layer] for layer in layers])
            new_rows = self._flags([self._never_written(step) for step in steps], False)
            writes = self._flags([self._writes(step) for step in steps], True)
            if group.compiled and last - first < len(group.indices) and new_rows is None:
                # Parts see both kinds of diagonals: one compilation serves them.
                new_rows = torch.zeros(last - first, self.lanes, dtype=torch.bool, device=before.A.device)
            memory = {name: tensor[first:last] for name, tensor in memory.items()}
        part = slice(first, last)
        arguments = (
            {name: tensor[part] for name, tensor in weights.items()},
            memory,
            before,
            join(x),
            shared,
            {place: tensor[part] for place, tensor in own.items()},
            self.model.config.num_mem_tokens,
            new_rows,
            writes,
        )
        with self.model.fast.lock:
            shape = (id(group), last - first, self.lanes, new_rows is None, writes is None, torch.is_grad_enabled())
            if shape in self.diagonal.warm or not group.compiled:
                return self.model.checkpointed(group.run, *arguments)
            started = time.perf_counter()
            with torch._dynamo.config.patch(recompile_limit=256):
                result = self.model.checkpointed(group.run, *arguments)
            self.diagonal.cold_start_s += time.perf_counter() - started
            self.diagonal.warm.add(shape)
            return result

    def _flags(self, flags: list[list[bool]], usual: bool) -> torch.Tensor | None:
        """`(G, W)` flags on the device, None if all are as usual."""
        if all(flag == usual for of_layer in flags for flag in of_layer):
            return None
        return torch.tensor(flags).to(self.model.device, non_blocking=True)

    def _never_written(self, step: int) -> list[bool]:
        return [
            row >= 0 and w in self.begins[step] and self.segments[row] == 0 for w, row in enumerate(self.rows[step])
        ]

    def _writes(self, step: int) -> list[bool]:
        closes = self.steps[step].closes
        return [w < len(closes) and closes[w] for w in range(self.lanes)]

    # Rows that begin and end

    def _initial(self, layer: int, rows: list[int]) -> LayerState:
        """`(rows, ...)`, what is remembered of the rows when they begin."""
        state, memory = self.states[layer], self.model.memory[str(layer)]
        if state is None:
            state = memory.zero_state(len(rows), self.model.device)
        elif rows != list(range(len(state.A))):
            state = state.map(lambda tensor: tensor[rows])
        if self.statistics is None:
            return LayerState(*state)
        fields = [by.get(layer) for by in (self.statistics.gamma_sum, self.statistics.gamma_count)]
        sums = [state.A.new_zeros(len(rows)) if field is None else field[rows] for field in fields]
        least = self.statistics.min_denominator.get(layer)
        least = state.A.new_full((len(rows),), float("inf")) if least is None else least[rows]
        return LayerState(*state, *sums, least)

    def _begin_rows(self, layer: int, step: int, before: Slot | None) -> Slot:
        lanes = self.begins[step]
        fresh = self._initial(layer, [self.rows[step][w] for w in lanes])
        if before is None:  # the first step: every lane begins
            return fresh.map(lambda tensor: tensor[None]), 0
        values, i = before

        def replace(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            old = old[i].clone()
            old[lanes] = new
            return old[None]

        pairs = zip(values, fresh, strict=True)
        return LayerState(*(None if old is None else replace(old, new) for old, new in pairs)), 0

    def _end_rows(self, layer: int, step: int, values: LayerState, i: int) -> None:
        for w in self.ends[step]:
            # Copied, so that it does not keep what all layers and lanes remembered at this time.
            state = values.map(lambda tensor, w=w: tensor[i, w] if torch.is_grad_enabled() else tensor[i, w].clone())
            self.ended[layer][self.rows[step][w]] = state

    def _collect(self) -> None:
        """Leaves states, segments and statistics as they are after the stretch."""
        for step in self.steps:
            for row, closes in zip(step.rows, step.closes, strict=True):
                self.segments[row] += closes
        if not any(any(step.closes) for step in self.steps):
            return
        for layer, ended in self.ended.items():
            others = [row for row in range(len(self.segments)) if row not in ended]
            if others:
                initial = self._initial(layer, others)
                for number, row in enumerate(others):
                    ended[row] = initial.map(lambda tensor, number=number: tensor[number])
            fields = zip(*(ended[row] for row in range(len(self.segments))), strict=True)
            A, z, *sums = (None if field[0] is None else torch.stack(field) for field in fields)
            self.states[layer] = MemoryState(A, z)
            if self.statistics is not None:
                for name, value in zip(("gamma_sum", "gamma_count", "min_denominator"), sums, strict=True):
                    getattr(self.statistics, name)[layer] = value

    # What the decoder does before its first layer and after its last one

    def _entering(self) -> Iterator[Slot]:
        """By step, `(W, P, D)`, the input of the first layer."""
        model, segment_size = self.model, self.model.config.segment_size
        width = segment_size + model.config.num_mem_tokens
        at_once = max(1, EMBEDDED // (self.lanes * width))
        for number in range(0, len(self.steps), at_once):
            steps = self.steps[number : number + at_once]
            # A lane without a row reads along with the first one.
            places = [(step, min(w, len(step.rows) - 1)) for step in steps for w in range(self.lanes)]
            rows, start, taken = zip(*((s.rows[w], s.start[w], s.taken[w]) for s, w in places), strict=True)
            some = [False] * len(rows)
            packed = Step(list(start), list(taken), [0] * len(rows), some, model.config.num_mem_tokens, list(rows))
            embeds = embed_tokens(model, self.source, self.tokens, packed)
            embeds = nn.functional.pad(embeds, (0, 0, 0, segment_size - embeds.shape[1]))
            memory_tokens = embed_memory_tokens(model, embeds).expand(len(embeds), -1, -1)
            calls, _ = native_pass(model, torch.cat([embeds, memory_tokens], dim=1), self.diagonal.answers())
            entering = calls[0].x.unflatten(0, (len(steps), self.lanes))
            for i in range(len(steps)):
                yield entering, i

    def _leaving(self, step: Step, number: int, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs of a step, from the `(W, P, D)` output of the last layer."""
        hidden = hidden[: len(step.rows)]
        wanted = self.wants(step)
        if wanted:
            hidden = self._after_layers(hidden)
        for w in self.ends[number] if self.cached else ():
            last = hidden[w : w + 1, step.taken[w] - 1 : step.taken[w]]
            self.last_hidden[step.rows[w]] = (last if wanted else self._after_layers(last))[0, 0]
        return (hidden if wanted else hidden[:, :0],)

    def _after_layers(self, hidden: torch.Tensor) -> torch.Tensor:
        answers = self.diagonal.answers()
        last = answers[-1]
        answers[-1] = lambda x: last(hidden)
        embeds = hidden.new_zeros(*hidden.shape[:2], self.model.memory_tokens.embedding_dim)
        return native_pass(self.model, embeds, answers)[1]
