"""`armt train`."""

import argparse
from pathlib import Path
from typing import Any

from . import COMMAND_LINE


HELP = "teach an ARMT checkpoint to remember, by a recipe"

# Options that set the field of the recipe of the same name.
FIELDS = {
    "task": (str, "T", "what to train on: associative_retrieval, babilong, chat, needle, passkey, text"),
    "out": (Path, "DIR", "folder to write; until training is over, DIR.partial has what --resume needs"),
    "method": (str, "M", "lora (default), full or memory: what is trained beside the memory"),
    "batch_size": (int, "N", "samples of a step, of all processes together (default 64)"),
    "gradient_accumulation": (int, "N", "passes in which a batch is worked through (default 1)"),
    "lr": (float, "R", "learning rate of adapters or backbone (default 3e-4)"),
    "memory_lr": (float, "R", "learning rate of the memory (default 1e-3)"),
    "warmup_steps": (float, "N", "steps over which the rates rise; below 1, a share of all steps (default 0.05)"),
    "bptt_segments": (int, "N", "gradients flow back through so many segments (default: all)"),
    "schedule": (str, "S", "sequential or diagonal (default: what is faster)"),
    "precision": (str, "P", "float32 (default), autocast or bfloat16"),
    "seed": (int, "N", "of samples and adapters (default 0)"),
    "eval_steps": (int, "N", "steps between validations (default 50)"),
    "validation_samples": (int, "N", "samples to validate on (default 500)"),
    "save_steps": (int, "N", "steps between checkpoints (default 500)"),
    "workers": (int, "N", "background processes that make samples (default 2)"),
}
FLAGS = {
    "compile": "compile the model: a slow start, then faster on a GPU",
    "gradient_checkpointing": "of segments: less memory, a third more work",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="folder or Hub id of an ARMT checkpoint, or of an adapter to train further"
    )
    parser.add_argument("--recipe", type=Path, metavar="F", help="YAML file with everything; options override it")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a run that was ended")
    parser.add_argument(
        "--task-option", action="append", default=[], metavar="KEY=VALUE", help="of the task; may be repeated"
    )
    parser.add_argument(
        "--stages", type=int, nargs="+", metavar="N", help="the most segments of a sample, or pairs, by stage"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="the most steps of every stage")
    parser.add_argument("--until", type=float, metavar="S", help="validation score that ends a stage")
    parser.add_argument("--report-to", nargs="+", metavar="TRACKER", help="such as tensorboard")
    for name, (kind, metavar, text) in FIELDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", default=None, help=text)


def run(args: argparse.Namespace) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from ..tasks import task_class
    from ..training.checkpointing import partial_folder
    from ..training.recipe import make_recipe, read_recipe
    from ..training.train import train

    options, file = vars(args), args.recipe
    if file is None and args.resume and args.out is not None and args.model is None:
        file = partial_folder(args.out) / "recipe.yaml"
        if not file.exists():
            raise ValueError(f"there is no unfinished run of {args.out} to resume.")
    values = {} if file is None else read_recipe(file)
    values |= {name: options[name] for name in ("model", "report_to", *FIELDS, *FLAGS) if options[name] is not None}
    if args.task_option:
        values["task_options"] = (values.get("task_options") or {}) | dict(map(key_and_value, args.task_option))
    change_stages(values, args.stages, args.steps, args.until)
    recipe = make_recipe(values, "the options" if file is None else str(file))
    summary = train(recipe, resume=args.resume, command=COMMAND_LINE.get())
    if not PartialState().is_main_process:
        return
    stage = summary["stages"][-1]
    score = f"score {stage['score']:.3f}, " if task_class(recipe.task).exact else ""
    Console(stderr=True, markup=False).print(
        f"{recipe.out} is ready after {summary['steps']} steps: validation {score}loss {stage['loss']:.4f}.",
        soft_wrap=True,
    )


def key_and_value(text: str) -> tuple[str, Any]:
    """`("pairs", 3)` of `"pairs=3"`; values are YAML."""
    import yaml

    key, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--task-option {text} must be KEY=VALUE.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--task-option {text}: the value is not YAML: {error}") from error


def change_stages(values: dict[str, Any], sizes: list[int] | None, steps: int | None, until: float | None) -> None:
    """Puts the options for the curriculum into the values of a recipe."""
    if sizes is not None:
        unit = "pairs" if values.get("task") == "associative_retrieval" else "segments"
        values["stages"] = [{unit: size} for size in sizes]
    if steps is None and until is None:
        return
    if not values.get("stages"):
        raise ValueError("--steps and --until are for the stages: give --stages too.")
    changes = {"max_steps": steps, "until": until}
    changes = {name: value for name, value in changes.items() if value is not None}
    values["stages"] = [{**stage, **changes} for stage in values["stages"]]
