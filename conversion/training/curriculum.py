"""The curriculum: which stage a run is in, when the next one begins, and what the stages came to."""

import math
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .recipe import Recipe, Stage


class Curriculum(TrainerCallback, ExportableState):
    """
    Follows a run: asks for a validation every `eval_steps` of a stage and at its end, and goes on to the next stage
    when the score is reached or the steps are used up. After the last stage the run stops.

    Args:
        recipe: with the stages.
        exact: whether a validation score is a share of right answers; otherwise it is a loss, which shall fall.

    Attributes:
        number: of the stage, from 0.
        started: steps of the run before this stage.
        records: of each stage up to this one: `steps`, `score`, `loss`, `seconds` and `scores`, a list of step in the
            stage, score and loss.
        tokens: that were trained on so far.
        over: whether the last stage has ended.
    """

    def __init__(self, recipe: Recipe, exact: bool):
        self.recipe, self.exact = recipe, exact
        self.number = self.started = self.tokens = 0
        self.records: list[dict[str, Any]] = [new_record()]
        self.over = False
        self.clock = time.monotonic()

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.number]

    @property
    def max_steps(self) -> int:
        """The most steps that all stages can take."""
        return sum(stage.max_steps for stage in self.recipe.stages)

    def state(self) -> dict[str, Any]:
        """What [`resume`] needs; the Trainer writes it into its checkpoints."""
        self.take_time()
        names = ("number", "started", "records", "tokens", "over")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from what [`state`] returned."""
        for name, value in state["attributes"].items():
            setattr(self, name, value)

    def rate(self, step: int) -> float:
        """What learning rates are multiplied by in step `step` of the run, from 0."""
        recipe, stage = self.recipe, self.stage
        warmup_steps = recipe.warmup_steps * (self.max_steps if recipe.warmup_steps < 1 else 1)
        warm = min(1.0, (step + 1) / max(1, warmup_steps))
        done = min(1.0, max(0, step - self.started) / stage.max_steps)
        falling = {"constant": 0.0, "linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2}[recipe.lr_schedule]
        return stage.lr_scale * warm * (1 - (1 - recipe.lr_end) * falling)

    def take_time(self) -> None:
        now = time.monotonic()
        self.records[-1]["seconds"] += now - self.clock
        self.clock = now

    # What the Trainer calls

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        steps = state.global_step - self.started
        if steps % self.recipe.eval_steps == 0 or steps == self.stage.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        steps, record = state.global_step - self.started, self.records[-1]
        record |= {"steps": steps, "score": metrics["eval_score"], "loss": metrics["eval_loss"]}
        record["scores"].append([steps, metrics["eval_score"], metrics["eval_loss"]])
        self.take_time()
        if state.is_world_process_zero:
            what = f"score {metrics['eval_score']:.3f}, loss" if self.exact else "loss"
            tqdm.write(
                f"stage {self.number + 1} of {len(self.recipe.stages)} ({describe(self.stage)}), step {steps}: "
                f"{what} {metrics['eval_loss']:.4f} on validation samples"
            )
        if not self.is_over(metrics, steps):
            return
        if self.number + 1 == len(self.recipe.stages):
            self.over = control.should_training_stop = True
        else:
            self.number += 1
            self.started = state.global_step
            self.records.append(new_record())

    def is_over(self, metrics: dict[str, float], steps: int) -> bool:
        """Whether a validation after `steps` of the stage ends it."""
        until, score = self.stage.until, metrics["eval_score"]
        reached = until is not None and (score >= until if self.exact else score <= until)
        return reached or steps >= self.stage.max_steps


def new_record() -> dict[str, Any]:
    return {"steps": 0, "score": None, "loss": None, "seconds": 0.0, "scores": []}


def describe(stage: Stage) -> str:
    """How long the samples of a stage are, in words."""
    if stage.length is not None:
        return f"{stage.length} tokens" if stage.length else "shortest samples"
    unit, most = ("pair", stage.pairs) if stage.segments is None else ("segment", stage.segments)
    fewest = stage.at_least if stage.vary else most
    return f"{most} {unit}{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} {unit}s"
