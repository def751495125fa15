"""What a run reads: for each stage the task, the lengths of its samples, training and validation batches."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..tasks import Task, load_task, task_class
from .batches import StageBatches, load_batches
from .collating import collate
from .recipe import Recipe


class StageData:
    """
    Args:
        recipe: with the stages.
        segment_size: of the model before training.
        tokenizer: of the model, if it has one.
        process, processes: which share of every batch is made here.

    Attributes:
        exact: whether the task has right answers.

    Raises:
        ValueError: if a stage does not go with the task, such as a length shorter than its facts; with the number of
            the stage.
    """

    def __init__(
        self,
        recipe: Recipe,
        segment_size: int,
        tokenizer: PreTrainedTokenizerBase | None,
        process: int = 0,
        processes: int = 1,
    ):
        self.recipe, self.tokenizer = recipe, tokenizer
        self.process, self.processes = process, processes
        self.segment_sizes, self.tasks, made = [], [], {}
        for number, stage in enumerate(recipe.stages):
            segment_size = stage.segment_size or segment_size
            self.segment_sizes.append(segment_size)
            options = recipe.task_options | stage.task_options
            if str(options) not in made:
                made[str(options)] = self.make_task(options)
            self.tasks.append(made[str(options)])
            self.check(number)
        self.exact = self.tasks[0].exact
        self.validations: dict[int, list[dict[str, torch.Tensor]]] = {}

    def make_task(self, options: dict[str, Any]) -> Task:
        known = inspect.signature(task_class(self.recipe.task)).parameters
        given = {}
        if "tokenizer" in known:
            if self.tokenizer is None:
                raise ValueError(f"the task {self.recipe.task!r} needs a tokenizer, but {self.recipe.model} has none.")
            given["tokenizer"] = self.tokenizer
        if "vary" in known:
            given["vary"] = False  # a batch has one length, which is drawn here
        return load_task(self.recipe.task, **given | options)

    def segment_size(self, number: int) -> int:
        """Tokens of a segment in stage `number`."""
        return self.segment_sizes[number]

    def lengths(self, number: int) -> list[int]:
        """In tokens, that samples of stage `number` may have, in ascending order."""
        stage, task = self.recipe.stages[number], self.tasks[number]
        if stage.length is not None:
            return [stage.length]
        most = stage.pairs if stage.segments is None else stage.segments
        sizes = range(stage.at_least if stage.vary else most, most + 1)
        if stage.segments is not None:
            return [size * self.segment_sizes[number] for size in sizes]
        if not hasattr(task, "pair_size"):
            raise ValueError(f"the task {task.name!r} has no pairs; give segments.")
        return [task.length(pairs) for pairs in sizes]

    def check(self, number: int) -> None:
        """Makes a sample of the shortest and of the longest kind, so that what cannot work fails now."""
        try:
            lengths = self.lengths(number)
            for length in {lengths[0], lengths[-1]}:
                next(iter(self.tasks[number].train(length)))
            next(iter(self.tasks[number].validation(lengths[-1], 1)))
        except ValueError as error:
            raise ValueError(f"stage {number + 1}: {error}") from error

    def train(self, number: int, first: int, device: torch.device) -> Iterator[dict[str, Any]]:
        """This process's share of the batches of stage `number`, from batch `first` on."""
        recipe = self.recipe
        dataset = StageBatches(
            self.tasks[number],
            self.lengths(number),
            recipe.batch_size,
            (recipe.seed, number),
            first,
            self.process,
            self.processes,
        )
        return load_batches(dataset, recipe.workers, device)

    def validation(self, number: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of the validation samples at the limit of stage `number`, in batches."""
        if number not in self.validations:
            samples = list(self.tasks[number].validation(self.lengths(number)[-1], self.recipe.validation_samples))
            mine = samples[self.process :: self.processes]
            size = self.rows(number)
            self.validations = {number: []}  # those of stages that are over are not needed again
            for start in range(0, len(mine), size):
                part = mine[start : start + size]
                batch = collate([s["input_ids"] for s in part], [s["labels"] for s in part])
                self.validations[number].append({name: tensor.to(device) for name, tensor in batch.items()})
        yield from self.validations[number]

    def rows(self, number: int) -> int:
        """Samples that go through the model at once on one device in stage `number`."""
        passes = self.recipe.stages[number].gradient_accumulation or self.recipe.gradient_accumulation
        return self.recipe.batch_size // self.processes // passes
