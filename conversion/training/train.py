"""`armt train`: from a recipe to a folder with what was trained and how."""

import json
import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from transformers import PreTrainedTokenizerBase, set_seed

from ...modeling_armt import ARMTForCausalLM
from ..adapters import MEMORY_MODULES, lora_config
from ..checkpoints import armt_model, check_checkpoint, load_checkpoint
from ..circumstances import versions
from ..evaluation.subject import peak_gib
from ..files import staged_folder
from .checkpointing import last_checkpoint, partial_folder, remove_incomplete
from .curriculum import Curriculum
from .data import StageData
from .recipe import Lora, Recipe, make_recipe, read_recipe
from .trainer import CurriculumTrainer, training_arguments


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


def train(recipe: Recipe, resume: bool = False, command: str | None = None) -> dict[str, Any]:
    """
    Trains a model by a recipe. In several processes, under `accelerate launch`, each calls it.

    Args:
        recipe: with `out`, a folder that does not exist yet, or is empty. With the method `lora` it gets an adapter,
            otherwise a whole checkpoint; with `recipe.yaml` and `training.json` beside it. It appears when training
            is over; until then `OUT.partial` has the checkpoints.
        resume: go on from the last whole checkpoint of a run that did not come to its end.
        command: how this was called, for `training.json`.

    Returns:
        What `training.json` has.

    Raises:
        ValueError: if recipe, model and task do not go together.
        FileExistsError: if there is something in `out`, or an unfinished run that is not resumed.
        OSError: if a checkpoint cannot be written; the one before is whole.
    """
    if recipe.out is None:
        raise ValueError("the recipe has no out, the folder to write: add it, or pass --out.")
    processes = PartialState(cpu=not torch.accelerator.is_available())  # lets CPUs have several processes too
    out = Path(recipe.out)
    check_out(out)
    folder = partial_folder(out)
    model, tokenizer = load_model(recipe)
    with processes.main_process_first():  # what a task caches is made once
        data = StageData(
            recipe, armt_model(model).config.segment_size, tokenizer, processes.process_index, processes.num_processes
        )
    set_seed(recipe.seed)
    model = make_trainable(recipe, model, data.segment_sizes)
    with processes.main_process_first():
        if processes.is_main_process:
            start_folder(folder, recipe, resume)
    curriculum = Curriculum(recipe, data.exact)
    last = last_checkpoint(folder)
    if last is not None:
        curriculum.resume(last[1]["stateful_callbacks"]["Curriculum"])
    trainer = CurriculumTrainer(
        data, curriculum, model=model, args=training_arguments(recipe, curriculum, folder), processing_class=tokenizer
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in workers that are forked from now on
    try:
        if curriculum.over:  # only the finished folder was missing
            trainer.restore(last[0])
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last[0]))
    except KeyboardInterrupt:
        leave_progress_bar()
        raise
    except Exception as error:
        leave_progress_bar()
        if not remove_incomplete(folder):
            raise
        left = last_checkpoint(folder)
        raise OSError(
            f"the checkpoint of step {trainer.state.global_step} could not be written: {error}. "
            + (f"{left[0]} is whole: mend the cause and run again with --resume." if left else "There is none before.")
        ) from error
    summary = summarize(recipe, trainer, command)
    if processes.is_main_process:
        save(out, trainer.model, tokenizer, recipe, summary, folder)
    processes.wait_for_everyone()
    return summary


def leave_progress_bar() -> None:
    """So that what is said about an error begins a line of its own."""
    print(file=sys.stderr)


def check_out(out: Path) -> None:
    """Refuses to begin what could not be written at its end."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty. Name another folder, or remove it.")


def start_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Makes the folder of an unfinished run, or checks that the one that is there is of this recipe."""
    file = folder / "recipe.yaml"
    if folder.exists() and not resume:
        raise FileExistsError(f"{folder} has an unfinished run: go on with --resume, or remove it.")
    if not folder.exists():
        folder.mkdir(parents=True)
        file.write_text(recipe.to_yaml(), encoding="utf-8")
    elif make_recipe(read_recipe(file)) != recipe:
        raise ValueError(
            f"the unfinished run in {folder} has another recipe. Run --resume with {file}, or remove the folder."
        )
    remove_incomplete(folder)


def load_model(recipe: Recipe) -> tuple[ARMTForCausalLM | PeftModel, PreTrainedTokenizerBase | None]:
    """The model to start from, on the CPU, in the precision of its weights that the recipe asks for."""
    local = Path(recipe.model)
    name = str(local.resolve()) if local.is_dir() else recipe.model  # an adapter names its base for good
    _, adapter = check_checkpoint(name)
    if adapter is not None:
        check_adapter(recipe, adapter)
    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    model, tokenizer = load_checkpoint(name, dtype, "cpu", trainable=True)
    if isinstance(model, PeftModel):
        config = model.peft_config[model.active_adapter]
        base = Path(config.base_model_name_or_path)
        if base.is_dir():
            config.base_model_name_or_path = str(base.resolve())
    return model, tokenizer


def check_adapter(recipe: Recipe, adapter: PeftConfig) -> None:
    """Refuses to train an adapter further by a recipe for another one, or one that leaves the memory as it is."""
    if recipe.method != "lora":
        raise ValueError(
            f"{recipe.model} is an adapter: train it with the method lora, or merge it into its base first "
            "(armt merge), and train the result."
        )
    if adapter.peft_type != PeftType.LORA or not set(MEMORY_MODULES) <= set(adapter.modules_to_save or ()):
        raise ValueError(
            f"{recipe.model} is not an adapter of LoRA and the memory in full, as armt train writes them. Merge it "
            "into its base first (armt merge), and train the result."
        )
    lora = Lora(adapter.r, adapter.lora_alpha, adapter.lora_dropout)
    if lora != recipe.lora:
        raise ValueError(
            f"the adapter {recipe.model} has other LoRA than the recipe: give the recipe lora: {vars(lora)}."
        )


def make_trainable(
    recipe: Recipe, model: ARMTForCausalLM | PeftModel, segment_sizes: list[int]
) -> ARMTForCausalLM | PeftModel:
    """Adapters if there are none yet, or gradients where the recipe's method wants them, and how they are computed."""
    inner = armt_model(model)
    if recipe.compile:
        inner.compile_armt()
    if recipe.method == "lora":
        if segment_sizes[-1] != inner.config.segment_size:
            raise ValueError(
                f"the last stage has segments of {segment_sizes[-1]} tokens, but an adapter is read with those of its "
                f"base, {inner.config.segment_size}. End with these, or train with the method full or memory."
            )
        lora, adapted = recipe.lora, model
        if not isinstance(model, PeftModel):
            adapted = get_peft_model(model, lora_config(model, lora.r, lora.alpha, lora_dropout=lora.dropout))
    else:
        adapted = model.requires_grad_(True)
        model.model.requires_grad_(recipe.method == "full")
    if recipe.gradient_checkpointing:  # transformers renamed it on the way
        getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)()
    return adapted


def summarize(recipe: Recipe, trainer: CurriculumTrainer, command: str | None) -> dict[str, Any]:
    """What there is to say of a run, for `training.json`."""
    curriculum, history = trainer.curriculum, trainer.state.log_history
    seconds = sum(record["seconds"] for record in curriculum.records)
    stages = [vars(stage) | record for stage, record in zip(recipe.stages, curriculum.records, strict=False)]
    device = trainer.args.device
    return {
        "recipe": yaml.safe_load(recipe.to_yaml()),
        "seed": recipe.seed,
        "stages": stages,
        "steps": trainer.state.global_step,
        "loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "divergence": [[entry["step"], entry["divergence"]] for entry in history if "divergence" in entry],
        "tokens": curriculum.tokens,
        "seconds": seconds,
        "tokens_per_s": curriculum.tokens / max(seconds, 1e-9),
        "peak_gib": peak_gib(device),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "versions": versions(*PACKAGES),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "processes": trainer.args.world_size,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(
    out: Path,
    model: ARMTForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    summary: dict[str, Any],
    folder: Path,
) -> None:
    """Writes the finished folder, and removes that of the unfinished run."""
    with staged_folder(out) as finished:
        model.save_pretrained(finished)
        (finished / "README.md").unlink(missing_ok=True)  # PEFT's form, with nothing filled in
        if tokenizer is not None:
            tokenizer.save_pretrained(finished)
        (finished / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        (finished / "training.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        if (folder / "runs").is_dir():  # what trackers wrote
            shutil.copytree(folder / "runs", finished / "runs")
    shutil.rmtree(folder)
