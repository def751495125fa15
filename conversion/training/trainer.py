"""The stock Trainer, following a curriculum."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from ..adapters import parameter_groups
from ..checkpoints import armt_model
from .curriculum import Curriculum
from .scoring import totals


class CurriculumTrainer(Trainer):
    """
    What a curriculum adds to the Trainer: batches of the stage that the run is in, validation by teacher forcing, a
    learning rate of its own for the memory, and the loss of long texts without their logits.

    Args:
        data: makes the batches of a stage, see [`StageData`].
        curriculum: also a callback of this Trainer.
        kwargs: of the Trainer.
    """

    def __init__(self, data, curriculum: Curriculum, **kwargs):
        self.data, self.curriculum, self.recipe = data, curriculum, curriculum.recipe
        super().__init__(callbacks=[curriculum], **kwargs)

    # Data

    def get_train_dataloader(self) -> Iterator[dict[str, Any]]:
        return self.stage_batches()

    def stage_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of the current stage, whichever it is when the next one is asked for."""
        curriculum, batches, of_stage = self.curriculum, None, None
        while True:
            if of_stage != curriculum.number:
                of_stage, batches = curriculum.number, None  # ends the workers of the stage before
                armt_model(self.model).config.segment_size = self.data.segment_size(of_stage)
                done = self.state.global_step - curriculum.started
                batches = self.data.train(of_stage, done, self.args.device)
            batch = next(batches)
            curriculum.tokens += batch.pop("tokens")
            yield batch

    # Optimization

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            recipe = self.recipe
            groups = parameter_groups(self.model, recipe.lr, recipe.memory_lr, recipe.weight_decay)
            fused = self.args.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: self.curriculum.rate(step))
        return self.lr_scheduler

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        stage = self.curriculum.stage
        passes = stage.gradient_accumulation or self.recipe.gradient_accumulation
        chunks = {name: tensor.chunk(passes) for name, tensor in inputs.items()}
        parts = [{name: of[i] for name, of in chunks.items()} for i in range(passes)]
        loss = 0.0
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        how = {"bptt_segments": self.recipe.bptt_segments, "schedule": self.recipe.schedule, "return_logits": False}
        return super().compute_loss(model, inputs | how, return_outputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the stock estimate knows nothing of segments, and counts parameters in every step

    # Validation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores the model on the validation samples of the current stage."""
        batches = self.data.validation(self.curriculum.number, self.args.device)
        self.model.eval()
        right, samples, loss, tokens = self.accelerator.reduce(totals(self.model, batches, self.data.exact)).tolist()
        loss /= tokens
        score = right / samples if self.data.exact else loss
        metrics = {f"{metric_key_prefix}_score": score, f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def training_arguments(recipe, curriculum: Curriculum, folder) -> TrainingArguments:
    """The Trainer's arguments for a recipe; `folder` is where its checkpoints go."""
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=curriculum.max_steps,
        per_device_train_batch_size=recipe.batch_size // PartialState().num_processes,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision != "float32",
        tf32=recipe.tf32 if cuda and torch.cuda.get_device_capability()[0] >= 8 else None,
        gradient_checkpointing=recipe.gradient_checkpointing,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # it waits for the device in every step
        save_steps=recipe.save_steps,
        save_total_limit=2,
        ignore_data_skip=True,  # batches begin where they shall by themselves
        report_to=recipe.report_to or "none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a text of one segment does not use the memory
        seed=recipe.seed,
    )
