"""A recipe: everything that reproduces a training run, as a dataclass and as a YAML file."""

import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml


METHODS = ("lora", "full", "memory")
PRECISIONS = ("float32", "autocast", "bfloat16")
LR_SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class Lora:
    """
    LoRA on all attention and MLP linears of the backbone; with the method `lora` only.

    Args:
        r: rank.
        alpha: scale; the update is multiplied by `alpha / r`.
        dropout: of the input of the adapters.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0


@dataclass
class Stage:
    """
    A stage of the curriculum: how long samples are, and when the next stage begins. One of `segments`, `pairs` and
    `length` must be given.

    Args:
        segments: the most segments of a sample.
        pairs: for associative retrieval, the most pairs of a sample.
        length: tokens of every sample; 0 for the shortest form that a task has (facts of bAbI without background).
        at_least: the fewest segments or pairs.
        vary: every batch has a number of segments or pairs of its own, from `at_least` to the limit, each as often as
            another; otherwise all have the limit.
        until: the stage ends as soon as the validation score, at the limit, is at least this; for tasks without right
            answers the validation loss, at most this. None: it ends at `max_steps`.
        max_steps: optimizer steps after which the stage ends in any case.
        lr_scale: all learning rates are multiplied by it.
        segment_size: tokens of a segment; None: as in the stage before, at first as in the checkpoint.
        task_options: replace those of the recipe in this stage.
        background_segments: replaces that of the recipe's background in this stage.
        batch_size, gradient_accumulation: replace those of the recipe in this stage.
    """

    segments: int | None = None
    pairs: int | None = None
    length: int | None = None
    at_least: int = 1
    vary: bool = True
    until: float | None = None
    max_steps: int = 1000
    lr_scale: float = 1.0
    segment_size: int | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    background_segments: int | None = None
    batch_size: int | None = None
    gradient_accumulation: int | None = None


@dataclass
class Background:
    """
    Some batches do not start with an empty memory, but with the one that a long text left behind, without gradients.

    Args:
        segments: how long that text is, at most; each batch has a number of its own from 1 on.
        share: of the batches that start so.
        source: plain text, as for the task `text`; None: of the task itself, which is the background of `babilong`,
            and pairs before those of the sample for `associative_retrieval` with `rewrite`.
    """

    segments: int
    share: float = 0.5
    source: str | None = None


@dataclass
class Distillation:
    """
    Every batch is accompanied by plain text no longer than a segment, on which the model is held to what the untouched
    backbone predicts (Kullback-Leibler divergence of the next tokens), so that training does not cost ability.

    Args:
        source: the text, as for the task `text`.
        weight: of the divergence, beside the task's loss.
        batch_size: texts a step, of all processes together.
        tokens: of a text, at most a segment; None: as many as a segment of the stage has.
    """

    source: str
    weight: float = 1.0
    batch_size: int = 8
    tokens: int | None = None


@dataclass
class Recipe:
    """
    A training run.

    Args:
        model: folder or Hub id of the ARMT checkpoint to start from, or of an adapter to train further.
        task: one of the tasks of `conversion/tasks`.
        out: folder to write.
        task_options: of the task's class.
        stages: the curriculum.
        method: what is trained besides the memory and the memory tokens: `lora`, adapters on the backbone; `full`, the
            backbone itself; `memory`, nothing.
        lora: the adapters.
        lr: learning rate of adapters or backbone.
        memory_lr: learning rate of the memory and the memory tokens.
        weight_decay: of matrices; memory tokens and biases have none.
        beta2: second moment's decay of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 for no clipping.
        lr_schedule: `constant`, or falling over a stage's `max_steps`, `linear` or `cosine`.
        lr_end: what it falls to, as a share.
        warmup_steps: over which the learning rate rises at the start of the run; below 1, their share of the most
            steps that all stages can take.
        batch_size: samples of an optimizer step, of all processes together.
        gradient_accumulation: passes in which a process works through its share of the batch.
        bptt_segments: gradients flow back through so many segments at most; None: through all.
        schedule: of the samples, `sequential` or `diagonal`; None: what is faster.
        compile: compile the model; the first steps take longer.
        gradient_checkpointing: of segments: less memory, a third more work.
        precision: `float32`; `autocast`, weights in float32 and bfloat16 products; `bfloat16`, the backbone's weights
            in bfloat16 too. Memory and adapters are in float32 always.
        tf32: float32 products in TF32 on GPUs that can.
        background: see [`Background`].
        distillation: see [`Distillation`].
        seed: of samples, adapters and dropout.
        eval_steps: steps of a stage between two validations.
        validation_samples: their number.
        logging_steps: steps whose loss is averaged into one entry.
        save_steps: steps between two checkpoints to resume from.
        workers: background processes that make samples: 0, 1, 2, 4 or 8. Samples do not depend on it.
        report_to: trackers that the Trainer reports to, such as `tensorboard`.
    """

    model: str
    task: str
    out: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=lambda: [Stage(segments=2)])
    method: str = "lora"
    lora: Lora = field(default_factory=Lora)
    lr: float = 3e-4
    memory_lr: float = 1e-3
    weight_decay: float = 0.01
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    lr_schedule: str = "constant"
    lr_end: float = 0.1
    warmup_steps: float = 0.05
    batch_size: int = 64
    gradient_accumulation: int = 1
    bptt_segments: int | None = None
    schedule: str | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    precision: str = "float32"
    tf32: bool = True
    background: Background | None = None
    distillation: Distillation | None = None
    seed: int = 0
    eval_steps: int = 50
    validation_samples: int = 500
    logging_steps: int = 10
    save_steps: int = 500
    workers: int = 2
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self):
        choices = {"method": METHODS, "precision": PRECISIONS, "lr_schedule": LR_SCHEDULES}
        choices |= {"schedule": (None, "sequential", "diagonal"), "workers": (0, 1, 2, 4, 8)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(map(str, allowed))}."
                )
        least = {"batch_size": 1, "gradient_accumulation": 1, "eval_steps": 1, "validation_samples": 1}
        least |= {"logging_steps": 1, "save_steps": 1, "warmup_steps": 0, "lr": 0, "memory_lr": 0, "seed": 0}
        least |= {"weight_decay": 0, "max_grad_norm": 0, "lr_end": 0, "bptt_segments": 1}
        check_least(self, "", least)
        check_least(self.lora, "lora.", {"r": 1})
        if self.background is not None:
            check_least(self.background, "background.", {"segments": 1, "share": 0})
            if self.background.share > 1:
                raise ValueError(f"background.share is {self.background.share}; it must be at most 1.")
        if self.distillation is not None:
            check_least(self.distillation, "distillation.", {"weight": 0, "batch_size": 1, "tokens": 2})
        if not self.stages:
            raise ValueError("stages is empty; a recipe needs at least one stage.")
        for number, stage in enumerate(self.stages, start=1):
            where = f"stages, number {number}: "
            given = [name for name in ("segments", "pairs", "length") if getattr(stage, name) is not None]
            if len(given) != 1:
                found = " and ".join(given) or "none"
                raise ValueError(f"{where}give one of segments, pairs and length, not {found}.")
            least = {"max_steps": 1, "at_least": 1, "segment_size": 1, "batch_size": 1, "gradient_accumulation": 1}
            least |= {"length": 0, "background_segments": 0, "segments": stage.at_least, "pairs": stage.at_least}
            least |= {"lr_scale": 0}
            check_least(stage, where, least)
        if self.method == "memory" and self.distillation is not None:
            raise ValueError(
                "distillation holds a backbone to what it was; with the method memory it does not change."
            )
        if self.background is None and any(stage.background_segments for stage in self.stages):
            raise ValueError("a stage has background_segments, but the recipe has no background.")

    def to_yaml(self) -> str:
        """The recipe as a YAML document, every field named."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True, width=110)


def check_least(values: Any, where: str, least: dict[str, float]) -> None:
    for name, bound in least.items():
        value = getattr(values, name)
        if value is not None and not value >= bound:  # nor anything that is no number
            raise ValueError(f"{where}{name} is {value}; it must be at least {bound}.")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    The fields that a recipe file sets, to be changed and made a recipe by [`make_recipe`].

    Raises:
        ValueError: if it is not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {path} must be a mapping of fields, such as 'task: text'.")
    return values


def make_recipe(values: dict[str, Any], where: str = "the recipe") -> Recipe:
    """
    A recipe from plain values.

    Args:
        values: by field, nested as in YAML.
        where: they come from, for error messages.

    Raises:
        ValueError: naming an unknown or missing key, or a value of the wrong type.
    """
    try:
        return build(Recipe, values, "")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def build(kind: Any, value: Any, place: str) -> Any:
    """`value` as `kind`, a type as in the annotations above; `place` is the key it stands at."""
    if is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"{place} is {value!r}; it must be a mapping with keys of: {', '.join(names_of(kind))}.")
        unknown = [str(key) for key in value if key not in names_of(kind)]
        if unknown:
            of = f" in {place}" if place else ""
            raise ValueError(f"unknown key {', '.join(unknown)}{of}; the keys are: {', '.join(names_of(kind))}.")
        missing = [
            f.name for f in fields(kind) if f.default is f.default_factory is MISSING and value.get(f.name) is None
        ]
        if missing:
            raise ValueError(f"{place + ' ' if place else ''}needs {', '.join(missing)}.")
        hints = typing.get_type_hints(kind)
        return kind(**{key: build(hints[key], v, f"{place}.{key}".lstrip(".")) for key, v in value.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else build(arguments[0], value, place)
    if origin is list and isinstance(value, (list, tuple)):
        return [build(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return dict(value)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 3e-4 for a text
        except (TypeError, ValueError):
            pass
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if kind is str and isinstance(value, Path):
        return str(value)
    expected = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    expected |= {kind: "a list" if origin is list else "a mapping"} if origin else {}
    raise ValueError(f"{place} is {value!r}; it must be {expected[kind]}.")


def names_of(kind: Any) -> list[str]:
    return [f.name for f in fields(kind)]
