"""The plain way to keep what moves along a diagonal: nothing is changed in place, so gradients flow."""

from typing import TYPE_CHECKING, Any

import torch

from .cells_armt import CellGroup, GroupInputs, LayerState, pick_lanes
from .groups_armt import LayerGroups
from .transfer_armt import on_device


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

Slot = tuple[Any, int]  # a tensor, or a tuple of tensors, with one entry per layer, and the entry


def join(slots: list[Slot]) -> Any:
    """The entries of the slots as one: without a copy if they lie side by side in one tensor."""
    values, first = slots[0]
    if all(other is values and i == first + number for number, (other, i) in enumerate(slots)):
        part = slice(first, first + len(slots))
        return values[part] if isinstance(values, torch.Tensor) else values.map(lambda tensor: tensor[part])
    if isinstance(values, torch.Tensor):
        return torch.stack([tensor[i] for tensor, i in slots])
    fields = zip(*([None if tensor is None else tensor[i] for tensor in state] for state, i in slots), strict=True)
    return LayerState(*(None if field[0] is None else torch.stack(field) for field in fields))


class FunctionalCells:
    """
    Hidden states and memories between the calls of a pipeline, by layer.

    Args:
        model: the model.
        groups: its layers in groups.
        inputs: of each group.
    """

    captures = False  # whether calls become graphs

    def __init__(self, model: "ARMTPreTrainedModel", groups: LayerGroups, inputs: list[GroupInputs]):
        self.model, self.groups, self.inputs = model, groups, inputs
        self.x: dict[int, Slot] = {}
        self.y: dict[int, Slot] = {}
        self.state: dict[int, Slot] = {}

    def enter(self, x: torch.Tensor) -> None:
        """Gives the first layer its `(W, P, D)` input."""
        self.x[0] = (x[None], 0)

    def begin(self, layer: int, lanes: list[int], state: LayerState) -> None:
        """Puts rows with their memories `(lanes, ...)` into lanes. With gradients every lane has one row only."""
        self.state[layer] = (state.map(lambda tensor: tensor[None]), 0)

    def remembered(self, layer: int, lanes: list[int]) -> LayerState:
        """`(lanes, ...)`, the memory of a layer in some lanes."""
        state, i = self.state[layer]
        return pick_lanes(state.map(lambda tensor: tensor[i]), lanes)

    def run(self, group: int, first: int, last: int, new_rows: list[list[bool]], writes: list[list[bool]]) -> None:
        """
        Runs layers `first` to `last - 1` of a group.

        Args:
            new_rows: `(layers, W)`, the cells whose row has never written. Layers without memory do not look.
            writes: the cells that write.
        """
        cells = self.groups.groups[group]
        layers = cells.indices[first:last]
        inputs = self.inputs[group].part(first, last)
        state = None
        if inputs.memory is not None:
            state = join([self.state[layer] for layer in layers])
            new_rows, writes = self._flags(cells, new_rows, False), self._flags(cells, writes, True)
        arguments = (
            inputs.weights,
            inputs.memory,
            state,
            join([self.x[layer] for layer in layers]),
            inputs.shared,
            inputs.own,
            self.model.config.num_mem_tokens,
            new_rows,
            writes,
        )
        with self.groups.compiling((group, last - first, arguments[3].shape)):
            y, state = self.model.checkpointed(cells.run, *arguments)
        for i, layer in enumerate(layers):
            self.y[layer] = (y, i)
            if state is not None:
                self.state[layer] = (state, i)

    def _flags(self, cells: CellGroup, flags: list[list[bool]], usual: bool) -> torch.Tensor | None:
        if not cells.compiled and all(flag == usual for of_layer in flags for flag in of_layer):
            return None
        return on_device(flags, self.model.device)

    def leaving(self) -> torch.Tensor:
        """The `(W, P, D)` output of the last layer."""
        y, i = self.y[len(self.groups.kinds) - 1]
        return y[i]

    def advance(self, low: int, high: int) -> None:
        """Makes what left layers `low` to `high` the input of the next ones."""
        self.x = {layer + 1: slot for layer, slot in self.y.items()}
        self.y = {}

    def give_back(self) -> None:
        """Nothing is kept."""
