"""The fast way to keep what moves along a diagonal: in buffers that stay in place, so that graphs can be captured."""

from typing import TYPE_CHECKING

import torch

from .cells_armt import GroupInputs, LayerState
from .groups_armt import LayerGroups


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel


class BufferedCells:
    """
    Hidden states and memories between the calls of a pipeline that needs no gradients; the same methods as
    [`FunctionalCells`], which says what they do.

    On a GPU compiled calls are captured as CUDA graphs when they come again: replaying one costs the host next to
    nothing. A graph knows its tensors by their address, so buffers and graphs outlive the call that made them, and the
    next one takes them over if all weights are where they were.

    Args:
        model: the model.
        groups: its layers in groups.
        inputs: of each group.
        lanes: W.
        collect: whether statistics are kept.
    """

    captures = True

    def __init__(
        self,
        model: "ARMTPreTrainedModel",
        groups: LayerGroups,
        inputs: list[GroupInputs],
        lanes: int,
        collect: bool,
    ):
        self.model, self.groups = model, groups
        # What is not a weight is given anew with every call, and copied to where it was.
        self.inputs = [
            of_group._replace(
                **{name: {k: t.clone() for k, t in getattr(of_group, name).items()} for name in ("shared", "own")}
            )
            for of_group in inputs
        ]
        config, device = model.config, model.device
        self.key = (lanes, config.segment_size, config.num_mem_tokens, collect, model.dtype, device)
        positions = config.segment_size + config.num_mem_tokens
        self.place = {layer: (n, i) for n, group in enumerate(groups.groups) for i, layer in enumerate(group.indices)}
        self.x, self.y, self.state, self.flags, self.flags_now = [], [], [], [], []
        for group in groups.groups:
            size = len(group.indices)
            shape = (size, lanes, positions, config.text_config.hidden_size)
            self.x.append(torch.zeros(shape, dtype=model.dtype, device=device))
            self.y.append(torch.zeros(shape, dtype=model.dtype, device=device))
            state = None
            if group.like is not None:
                memory = group.like
                state = memory.zero_state(lanes, device)
                sums = [state.A.new_zeros(lanes) for _ in range(3)] if collect else ()
                state = LayerState(*state, *sums).map(
                    lambda tensor, size=size: tensor.expand(size, *tensor.shape).clone()
                )
            self.state.append(state)
            self.flags.append(torch.tensor([False, True], device=device)[:, None, None].repeat(1, size, lanes))
            self.flags_now.append([[[usual] * lanes for _ in range(size)] for usual in (False, True)])
        self.graphs: dict[tuple, torch.cuda.CUDAGraph | None] = {}
        self.pool = None
        self.moves: dict[tuple[int, int], tuple[list, list]] = {}

    @classmethod
    def take(
        cls, model: "ARMTPreTrainedModel", groups: LayerGroups, inputs: list[GroupInputs], lanes: int, collect: bool
    ) -> "BufferedCells":
        """Buffers for a call: those of an earlier one if they fit, else new ones."""
        with model.fast.lock:
            idle = groups.idle.pop() if groups.idle else None
        with torch.inference_mode(False), torch.no_grad():
            if idle is not None:
                config = model.config
                key = (lanes, config.segment_size, config.num_mem_tokens, collect, model.dtype, model.device)
                if idle.key == key and idle._takes_over(inputs):
                    return idle
                del idle
            return cls(model, groups, inputs, lanes, collect)

    def _takes_over(self, inputs: list[GroupInputs]) -> bool:
        """Brings what was computed from the weights up to date, unless the weights themselves have moved."""
        for old, new in zip(self.inputs, inputs, strict=True):
            if [t.data_ptr() for t in old.weights.values()] != [t.data_ptr() for t in new.weights.values()]:
                return False
            pairs = [*zip(old.tensors(), new.tensors(), strict=True)]
            if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
                return False
            for name in old.memory or ():
                if not name.endswith("halves") and old.memory[name].data_ptr() != new.memory[name].data_ptr():
                    return False
        for old, new in zip(self.inputs, inputs, strict=True):
            for a, b in zip(old.tensors(), new.tensors(), strict=True):
                if a.data_ptr() != b.data_ptr():
                    a.copy_(b)
        return True

    def give_back(self) -> None:
        """Leaves the buffers to the next call."""
        if self.model.fast.enabled:
            with self.model.fast.lock:
                self.groups.idle[:] = [self]

    def enter(self, x: torch.Tensor) -> None:
        group, i = self.place[0]
        self.x[group][i].copy_(x)

    def begin(self, layer: int, lanes: list[int], state: LayerState) -> None:
        group, i = self.place[layer]
        for old, new in zip(self.state[group], state, strict=True):
            for number, lane in enumerate(lanes if old is not None else ()):
                old[i, lane].copy_(new[number])

    def remembered(self, layer: int, lane: int) -> LayerState:
        group, i = self.place[layer]
        return self.state[group].map(lambda tensor: tensor[i, lane].clone())

    def run(self, group: int, first: int, last: int, new_rows: list | None, writes: list | None) -> None:
        cells, key = self.groups.groups[group], (group, first, last)
        if new_rows is not None:
            self._set_flags(group, first, last, new_rows, writes)
        graph = self.graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        part = slice(first, last)
        inputs = self.inputs[group].part(first, last)
        has_memory = inputs.memory is not None
        usual = [None, None]
        if has_memory and (
            cells.compiled
            or any(self.flags_now[group][n][i] != [bool(n)] * self.key[0] for n in (0, 1) for i in range(first, last))
        ):
            usual = [self.flags[group][0, part], self.flags[group][1, part]]
        arguments = (
            inputs.weights,
            inputs.memory,
            self.state[group].map(lambda tensor: tensor[part]) if has_memory else None,
            self.x[group][part],
            self.y[group][part],
            inputs.shared,
            inputs.own,
            self.model.config.num_mem_tokens,
            *usual,
        )
        with self.model.fast.lock:
            if key in self.graphs and cells.compiled and self.x[group].device.type == "cuda":
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                # What other threads do on the device meanwhile does not matter.
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    cells.run_in_place(*arguments)
                self.graphs[key] = graph
                graph.replay()
            else:
                with self.groups.compiling((group, last - first, self.key)):
                    cells.run_in_place(*arguments)
                self.graphs[key] = None  # the next time it will have been compiled

    def _set_flags(self, group: int, first: int, last: int, new_rows: list, writes: list) -> None:
        for n, flags in enumerate((new_rows, writes)):
            if self.flags_now[group][n][first:last] != flags:
                self.flags_now[group][n][first:last] = flags
                self.flags[group][n, first:last] = torch.tensor(flags, device=self.flags[group].device)

    def leaving(self) -> torch.Tensor:
        group, i = self.place[len(self.place) - 1]
        return self.y[group][i].clone()

    def advance(self, low: int, high: int) -> None:
        if (low, high) not in self.moves:
            self.moves[low, high] = self._moves(low, min(high, len(self.place) - 2))
        sources, destinations = self.moves[low, high]
        if len(sources) == 1:
            destinations[0].copy_(sources[0])
        elif sources:
            torch._foreach_copy_(destinations, sources)

    def _moves(self, low: int, high: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What is copied where when the outputs of layers `low` to `high` become inputs; neighbours as one."""
        runs: list[list[int]] = []
        for layer in range(low, high + 1):
            (group, i), (other, j) = self.place[layer], self.place[layer + 1]
            if runs and runs[-1][:2] == [group, other] and (i - runs[-1][2]) == (j - runs[-1][3]) == runs[-1][4]:
                runs[-1][4] += 1
            else:
                runs.append([group, other, i, j, 1])
        sources = [self.y[group][i : i + n] for group, _, i, _, n in runs]
        return sources, [self.x[other][j : j + n] for _, other, _, j, n in runs]
