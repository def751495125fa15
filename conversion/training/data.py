"""What a run reads: for each stage the task, the lengths of its samples, training and validation batches."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..tasks import Task, task_class
from ..tasks.options import task_for
from .batches import Draw, StageBatches, load_batches
from .collating import collate
from .recipe import Recipe
from .texts import Texts


class StageData:
    """
    Args:
        recipe: with the stages.
        segment_size: of the model before training.
        tokenizer: of the model, if it has one.
        process, processes: which share of every batch is made here.

    Attributes:
        exact: whether the task has right answers.
        segment_sizes: in tokens, by stage.

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
        self.segment_sizes: list[int] = []
        self.tasks: list[Task] = []
        self.validations: list[list[dict[str, torch.Tensor]]] = []
        distillation, background = recipe.distillation, recipe.background
        self.plain = None if distillation is None else self.texts(distillation.source)
        self.background = None if background is None or background.source is None else self.texts(background.source)
        made: dict[str, Task] = {}
        for number, stage in enumerate(recipe.stages):
            segment_size = stage.segment_size or segment_size
            options = recipe.task_options | stage.task_options
            if str(options) not in made:
                made[str(options)] = self.make_task(options)
            self.segment_sizes.append(segment_size)
            self.tasks.append(made[str(options)])
            try:
                self.check(number)
                self.validations.append(self.make_validation(number))
            except ValueError as error:
                raise ValueError(f"stage {number + 1}: {error}") from error
        self.exact = self.tasks[0].exact

    def texts(self, source: str) -> Texts:
        return Texts(source, self.needed_tokenizer())

    def needed_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError(f"{self.recipe.model} has no tokenizer, which text needs.")
        return self.tokenizer

    def make_task(self, options: dict[str, Any]) -> Task:
        known = inspect.signature(task_class(self.recipe.task)).parameters
        if "vary" in known:
            options = {"vary": False} | options  # a batch has one length, which is drawn here
        return task_for(self.recipe.task, options, self.tokenizer)

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
        """Refuses a stage that would fail later: batches that cannot be shared, lengths that are too short."""
        rows, passes = self.rows(number), self.passes(number)
        if rows * passes * self.processes != self.batch_size(number):
            raise ValueError(
                f"batch_size {self.batch_size(number)} cannot be divided by {self.processes} processes and "
                f"gradient_accumulation {passes}."
            )
        if self.plain is not None and self.recipe.distillation.batch_size % self.processes:
            raise ValueError(f"distillation.batch_size cannot be divided by {self.processes} processes.")
        if self.plain is not None and (self.recipe.distillation.tokens or 0) > self.segment_sizes[number]:
            raise ValueError(
                f"distillation.tokens is {self.recipe.distillation.tokens}, but a segment has "
                f"{self.segment_sizes[number]}: the untouched backbone has no memory of more."
            )
        self.background_of(number)
        lengths = self.lengths(number)
        for length in {lengths[0], lengths[-1]}:
            next(iter(self.tasks[number].train(length)))

    def batch_size(self, number: int) -> int:
        """Samples of an optimizer step in stage `number`, of all processes together."""
        return self.recipe.stages[number].batch_size or self.recipe.batch_size

    def passes(self, number: int) -> int:
        """Of gradient accumulation in stage `number`."""
        return self.recipe.stages[number].gradient_accumulation or self.recipe.gradient_accumulation

    def rows(self, number: int) -> int:
        """Samples that go through the model at once on one device in stage `number`."""
        return self.batch_size(number) // self.processes // self.passes(number)

    def background_of(self, number: int) -> tuple[Draw | None, int]:
        """Where the text before the samples of stage `number` comes from, and how many segments it has at most."""
        if self.recipe.background is None:
            return None, 0
        segments = self.recipe.stages[number].background_segments
        segments = self.recipe.background.segments if segments is None else segments
        if not segments:
            return None, 0
        if self.background is not None:
            return self.background.draw, segments
        of_task = getattr(self.tasks[number], "train_background", None)
        if of_task is None:
            raise ValueError("background needs a source: the task of this stage has no background text of its own.")
        return of_task, segments

    def train(self, number: int, first: int, device: torch.device) -> Iterator[dict[str, Any]]:
        """This process's share of the batches of stage `number`, from batch `first` on; see [`StageBatches`]."""
        recipe, segment_size = self.recipe, self.segment_sizes[number]
        background, segments = self.background_of(number)
        dataset = StageBatches(
            task=self.tasks[number],
            lengths=self.lengths(number),
            batch_size=self.batch_size(number),
            seed=(recipe.seed, number),
            first=first,
            process=self.process,
            processes=self.processes,
            background=background,
            background_lengths=[n * segment_size for n in range(1, segments + 1)],
            background_share=recipe.background.share if background else 0.0,
        )
        if self.plain is not None:
            dataset.plain = self.plain.draw
            dataset.plain_shape = recipe.distillation.batch_size, recipe.distillation.tokens or segment_size
        return load_batches(dataset, recipe.workers, device)

    def make_validation(self, number: int) -> list[dict[str, torch.Tensor]]:
        samples = list(self.tasks[number].validation(self.lengths(number)[-1], self.recipe.validation_samples))
        mine, size = samples[self.process :: self.processes], self.rows(number)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        return [collate([s["input_ids"] for s in part], [s["labels"] for s in part]) for part in parts]
