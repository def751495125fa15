"""The stock Trainer, following a curriculum."""

import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback

from ..adapters import parameter_groups
from ..checkpoints import armt_model, load_checkpoint
from ..evaluation.subject import peak_gib
from .curriculum import Curriculum
from .data import StageData
from .distillation import Teacher, divergence
from .recipe import Recipe
from .scoring import totals


class Progress(ProgressCallback):
    """The Trainer's bars and what it logs of training; validations and the end have lines of their own."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            self.training_bar.write(f"training {trained:,} of {model.num_parameters():,} parameters")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            super().on_log(args, state, control, logs, **kwargs)


class CurriculumTrainer(Trainer):
    """
    What a curriculum adds to the Trainer: batches of the stage that the run is in, validation by teacher forcing, a
    learning rate of its own for the memory, the loss of long texts without their logits, memories that begin with
    something in them, and distillation.

    Args:
        data: makes the batches.
        curriculum: also a callback of this Trainer.
        kwargs: of the Trainer.
    """

    def __init__(self, data: StageData, curriculum: Curriculum, **kwargs):
        self.data, self.curriculum, self.recipe = data, curriculum, curriculum.recipe
        super().__init__(callbacks=[curriculum], **kwargs)
        self.pop_callback(ProgressCallback)
        self.add_callback(Progress)
        self.teacher = None if self.recipe.distillation is None else Teacher(self.model)
        self.divergences: list[torch.Tensor] = []  # since the last entry of the log

    # Data

    def get_train_dataloader(self) -> Iterator[dict[str, Any]]:
        """Batches of the current stage, whichever it is when the next one is asked for."""
        curriculum, batches, of_stage = self.curriculum, None, None
        while True:
            if of_stage != curriculum.number:
                of_stage, batches = curriculum.number, None  # ends the workers of the stage before
                armt_model(self.model).config.segment_size = self.data.segment_sizes[of_stage]
                done = self.state.global_step - curriculum.started
                batches = self.data.train(of_stage, done, self.args.device)
            batch = next(batches)
            curriculum.tokens += batch.pop("tokens")
            yield batch

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # The stock way does not rename weights as `from_pretrained` does, and leaves out GPT-NeoX's head.
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            loaded, _ = load_checkpoint(resume_from_checkpoint, self.model.dtype, "cpu")
            self.model.load_state_dict(loaded.state_dict())

    def restore(self, checkpoint: Path) -> None:
        """Takes over the result of a run from the checkpoint at its end."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        armt_model(self.model).config.segment_size = self.data.segment_sizes[-1]

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

    def training_step(self, model, inputs: dict[str, torch.Tensor], num_items_in_batch=None) -> torch.Tensor:
        """One batch in as many passes as the stage wants; processes wait for each other only in the last one."""
        background, plain = inputs.pop("background", None), inputs.pop("plain", None)
        memory = None if background is None else self.read(background)
        if plain is not None:
            with self.accelerator.no_sync(model):
                self.distill(model, plain)
        passes = self.data.passes(self.curriculum.number)
        chunks = {name: tensor.chunk(passes) for name, tensor in inputs.items()}
        loss = 0.0
        for number in range(passes):
            part = {name: of[number] for name, of in chunks.items()}
            if memory is not None:
                part["cache"] = memory.fork()
            with nullcontext() if number == passes - 1 else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, part, num_items_in_batch)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        how = {"bptt_segments": self.recipe.bptt_segments, "schedule": self.recipe.schedule, "return_logits": False}
        return super().compute_loss(model, inputs | how, return_outputs, num_items_in_batch)

    def read(self, background: torch.Tensor):
        """
        The memory that a `(1, tokens)` text leaves behind, without gradients: in the schedule that is faster for a
        single row, whichever the recipe has for its batches.
        """
        self.model.train()
        with self.accelerator.autocast():
            return armt_model(self.model).read(background).cache

    def distill(self, model, plain: torch.Tensor) -> None:
        """Gradients of the divergence from the untouched backbone on `(B, T)` text no longer than a segment."""
        model.train()
        with self.accelerator.autocast():
            loss = divergence(model(input_ids=plain, use_cache=False).logits, self.teacher.logits(plain))
        self.accelerator.backward(self.recipe.distillation.weight * loss)
        self.divergences.append(loss.detach())

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the stock estimate knows nothing of segments, and counts parameters in every step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | {"peak_gib": peak_gib(self.args.device)}
        if "loss" in logs and self.divergences:
            mean = self.accelerator.reduce(torch.stack(self.divergences).mean(), "mean")
            logs, self.divergences = logs | {"divergence": mean.item()}, []
        super().log(logs, start_time)

    # Validation

    def shown(self, batches: list[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        """The batches, on the device, with a bar that follows them."""
        self.callback_handler.eval_dataloader = batches
        for batch in batches:
            yield {name: tensor.to(self.args.device) for name, tensor in batch.items()}
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores the model on the validation samples of the current stage."""
        batches = self.shown(self.data.validations[self.curriculum.number])
        self.model.eval()
        right, samples, loss, tokens = self.accelerator.reduce(totals(self.model, batches, self.data.exact)).tolist()
        loss /= tokens
        if not math.isfinite(loss):
            raise ValueError(
                f"the validation loss after step {self.state.global_step} is {loss}: the run has diverged. Use lower "
                "learning rates, or a longer warm-up."
            )
        score = right / samples if self.data.exact else loss
        metrics = {f"{metric_key_prefix}_score": score, f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.curriculum.started == self.state.global_step:  # for the scheduler it was still the stage before
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.curriculum.rate(self.state.global_step)
        return metrics


def training_arguments(recipe: Recipe, curriculum: Curriculum, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for a recipe; `folder` is where its checkpoints go."""
    cuda = torch.cuda.is_available()
    processes = PartialState().num_processes
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=curriculum.max_steps,
        per_device_train_batch_size=recipe.batch_size // processes,
        use_cpu=not torch.accelerator.is_available(),
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision != "float32",
        tf32=recipe.tf32 if cuda and torch.cuda.get_device_capability()[0] >= 8 else None,
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it waits for the device in every step
        save_steps=recipe.save_steps,
        save_total_limit=2,
        ignore_data_skip=True,  # batches begin where they shall by themselves
        report_to=recipe.report_to or "none",
        remove_unused_columns=False,
        seed=recipe.seed,
    )
    return one_device(arguments)


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """The same arguments, by which the Trainer uses one device of those that a process without launcher sees."""
    if arguments.n_gpu > 1:
        warnings.warn(
            f"this trains on one of {arguments.n_gpu} GPUs. To use all: accelerate launch --multi_gpu --num_processes "
            f"{arguments.n_gpu} -m modeling_armt.conversion train ...",
            stacklevel=2,
        )
        arguments._n_gpu = 1
    return arguments
