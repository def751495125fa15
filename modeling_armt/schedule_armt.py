"""Which schedule reads a call: diagonal where it can and is faster, sequential otherwise."""

from typing import TYPE_CHECKING

from transformers.utils import logging

from .compilation_armt import is_passing
from .groups_armt import Prepared, lanes_for, prepare
from .segmentation_armt import Step, plan_pipeline, plan_steps
from .stacking_armt import CannotStack


if TYPE_CHECKING:
    from .modeling_armt import ARMTPreTrainedModel

logger = logging.get_logger(__name__)


def choose_schedule(
    model: "ARMTPreTrainedModel",
    counts: list[int],
    opened: list[int],
    cached: bool,
    schedule: str | None,
    output_hidden_states: bool,
    bptt_segments: int | None = None,
) -> tuple[list[Step], Prepared | None]:
    """
    Cuts a call into the steps of a schedule.

    Args:
        counts, opened, cached: as for [`plan_steps`].
        schedule: `sequential`, `diagonal` or None for what is faster.
        output_hidden_states: whether the hidden states of all layers are asked for.
        bptt_segments: how far gradients flow back; None: as far as there is text.

    Returns:
        The steps, and the diagonal schedule if some of them are for it.

    Raises:
        ValueError: for an unknown schedule, or if `diagonal` is not possible.
    """
    if schedule not in (None, "sequential", "diagonal"):
        raise ValueError(f"schedule is {schedule!r}; it must be 'sequential', 'diagonal' or None.")
    if schedule == "diagonal" and output_hidden_states:
        raise ValueError("hidden states of all layers come from the sequential schedule; leave schedule out.")
    # With a cache, what is left over is read last for all rows, which would move the windows of truncation.
    possible = not output_hidden_states and not (cached and bptt_segments is not None)
    if schedule == "diagonal" and not possible:
        raise ValueError("bptt_segments with a cache takes the sequential schedule; use_cache=False, or no schedule.")
    sizes = (model.config.segment_size, model.config.num_mem_tokens)
    compiled = model.fast.enabled  # then cell by cell is the sequential schedule, compiled
    if (schedule != "sequential" or compiled) and possible:
        rows = sum(count > 0 for count in counts)
        steps = plan_pipeline(counts, opened, *sizes, cached, lanes_for(model, rows))
        first = next((step for step in steps if step.rows is not None), None)
        depth = sum(step.rows is not None for step in steps)
        # A backbone whose masks are a table cannot take as many columns as the first and the last step may have.
        wide = any(step.rows is None and max(step.opened) + step.width > (model.max_columns or 1e9) for step in steps)
        if first is not None and not wide and (schedule is not None or _pays(model, depth)):
            try:
                prepared = prepare(model, len(first.rows))
                groups, layers = len(prepared.groups.groups), len(prepared.calls)
                if schedule is None and 2 * groups > layers:
                    raise CannotStack(f"its {layers} layers are of {groups} kinds, so that too few can be run as one")
                return steps, prepared._replace(one_by_one=schedule == "sequential")
            except Exception as error:
                stays = isinstance(error, CannotStack)
                if not stays and (schedule == "diagonal" or not is_passing(error)):
                    raise
                reason = f"{model.config.text_config.model_type} cannot be read in the diagonal schedule: {error}."
                if schedule == "diagonal":
                    raise ValueError(f"{reason} Use schedule='sequential'.") from error
                (logger.warning_once if stays else logger.warning)(f"{reason} It is read segment by segment.")
    return list(plan_steps(counts, opened, *sizes, cached, model.max_columns)), None


def _pays(model: "ARMTPreTrainedModel", segments: int) -> bool:
    """Whether the diagonal schedule is the faster one for so many segments in a row."""
    if model.device.type != "cuda":
        return False
    layers = model.config.text_config.num_hidden_layers
    return segments >= (2 if model.fast.enabled else 2 * layers)
