"""
`armt demo`: the whole way from a pretrained backbone to a checkpoint that remembers, in minutes on two CPU cores.

Every number it prints is measured in the run.
"""

import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

from ...modeling_armt import ARMTForCausalLM
from ..adapters import lora_config, merge, parameter_groups
from ..convert import convert
from ..files import staged_folder
from . import BACKBONE
from .recall import PLACES, THINGS, RecallTask, Sample


SEGMENT_SIZE, NUM_MEM_TOKENS, D_MEM = 32, 4, 32
TRAIN_DISTANCES = [1, 2]
TEST_DISTANCES = [1, 2, 4, 8, 16]
MAX_STEPS, EVALUATE_EVERY, GOAL = 300, 25, 0.98
QUESTIONS, QUESTIONS_SHOWN = 40, 6  # to the fresh process
MIN_STEPS = 150  # after the goal at the distances of training comes recall at longer ones

# Runs in a process of its own, which knows nothing but the folder.
FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, questions = sys.argv[1], json.load(sys.stdin)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
import torch
answers = []
for ids in questions:
    output = model.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)
    answers.append(tokenizer.decode(output[0, len(ids):]).strip())
print(json.dumps({"class": type(model).__module__, "installed": "modeling_armt" in sys.modules, "answers": answers}))
"""


class StopAtGoal(TrainerCallback):
    """Scores the model on validation texts every few steps, and stops once it remembers."""

    def __init__(self, task: RecallTask, samples: list[Sample], console: Console):
        self.task, self.samples, self.console = task, samples, console

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % EVALUATE_EVERY == 0:
            score = self.task.score(model, self.samples)
            self.console.print(f"  step {state.global_step}: recall {score:.1%} on validation texts")
            control.should_training_stop = score >= GOAL and state.global_step >= MIN_STEPS


class Texts(torch.utils.data.IterableDataset):
    """Fresh training texts, as many as are asked for."""

    def __init__(self, task: RecallTask, seed: int):
        self.task, self.seed = task, seed

    def __iter__(self):
        return self.task.samples(TRAIN_DISTANCES, self.seed)


def run_demo(out: str | Path, seed: int = 0) -> dict:
    """
    Converts the embedded backbone, teaches it to remember, and shows the result in a fresh process.

    Args:
        out: folder for the finished checkpoint; must not exist, or be empty.
        seed: for training and texts.

    Returns:
        The measured numbers, as printed.
    """
    started = time.monotonic()
    console = Console(markup=False)
    set_seed(seed)
    with staged_folder(out) as folder:
        console.rule("1. Convert")
        # float32: processors without bfloat16 instructions are many times slower in it.
        model = convert(BACKBONE, folder / "converted", SEGMENT_SIZE, NUM_MEM_TOKENS, D_MEM, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder / "converted")
        console.print(
            f"A Llama of {model.model.num_parameters():,} parameters, trained on English novels, reads segments of "
            f"{SEGMENT_SIZE} tokens and carries {NUM_MEM_TOKENS} memory tokens a segment into an associative memory "
            f"({sum(p.numel() for p in model.memory.parameters()):,} parameters)."
        )
        task = RecallTask(tokenizer, tell_stories(model, tokenizer), SEGMENT_SIZE)
        show_task(console, task)
        tests = {d: take(task, [d], seed + 1000 + d, 200) for d in TEST_DISTANCES}
        before = task.score(model, tests[TRAIN_DISTANCES[-1]])

        console.rule("2. Train LoRA and memory")
        adapted = train(model, task, console, folder / "trainer", seed)
        with_memory = {distance: task.score(adapted, samples) for distance, samples in tests.items()}
        without = task.score(adapted, tests[TRAIN_DISTANCES[-1]], memory=False)

        console.rule("3. Measure")
        table = Table("", "recall of 400 answers")
        table.add_row("chance", f"{(1 / len(PLACES) + 1 / len(THINGS)) / 2:.1%}")
        table.add_row(f"before training, {plural(TRAIN_DISTANCES[-1])} later", f"{before:.1%}")
        for distance, score in with_memory.items():
            unseen = "" if distance in TRAIN_DISTANCES else ", further than in training"
            table.add_row(f"after training, {plural(distance)} later{unseen}", f"{score:.1%}")
        table.add_row("after training, memory switched off", f"{without:.1%}")
        console.print(table)

        console.rule("4. Merge, save, and load where this package is not")
        merged = merge(adapted)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(folder / "converted")
        shutil.rmtree(folder / "trainer", ignore_errors=True)
    fresh = ask_fresh_process(console, task, merged, Path(out), seed)
    seconds = time.monotonic() - started
    console.print(f"\nThe checkpoint is in {out}. All of this took {seconds:.0f} seconds.")
    return {"before": before, "after": with_memory, "memory_off": without, "fresh": fresh, "seconds": seconds}


def tell_stories(model: ARMTForCausalLM, tokenizer, rows: int = 64, length: int = 192) -> list[int]:
    """Filler text, told by the backbone itself."""
    start = torch.full((rows, 1), tokenizer.bos_token_id)
    with torch.no_grad():
        output = model.eval().model.generate(
            start, max_new_tokens=length, min_new_tokens=length, do_sample=True, pad_token_id=tokenizer.pad_token_id
        )
    return output[:, 1:].flatten().tolist()


def plural(segments: int) -> str:
    return f"{segments} segment{'s' * (segments > 1)}"


def take(task: RecallTask, distances: list[int], seed: int, count: int) -> list[Sample]:
    return list(itertools.islice(task.samples(distances, seed), count))


def show_task(console: Console, task: RecallTask) -> None:
    sample = take(task, [1], 0, 1)[0]
    pieces = [sample.input_ids[i : i + SEGMENT_SIZE] for i in range(0, len(sample.input_ids), SEGMENT_SIZE)]
    console.print("\nThe task, in an example with one segment of other text between facts and questions:")
    for number, piece in enumerate(pieces, start=1):
        text = " ".join(task.tokenizer.decode(piece).split())
        console.print(f"  segment {number}: {text}", style="dim" if number < len(pieces) else "", markup=False)


def train(model: ARMTForCausalLM, task: RecallTask, console: Console, folder: Path, seed: int) -> PeftModel:
    """LoRA and memory under the stock Trainer."""
    adapted = get_peft_model(model, lora_config(model))
    trainable, everything = adapted.get_nb_trainable_parameters()
    console.print(f"Training {trainable:,} of {everything:,} parameters, with PEFT and the Trainer of transformers.")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=MAX_STEPS,
        per_device_train_batch_size=32,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        warmup_steps=20,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    optimizer = torch.optim.AdamW(parameter_groups(adapted, lr=2e-3, memory_lr=4e-3))
    scheduler = None  # the Trainer makes the one of its arguments
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=Texts(task, seed),
        data_collator=task.collate,
        optimizers=(optimizer, scheduler),
        callbacks=[StopAtGoal(task, take(task, TRAIN_DISTANCES, seed + 1, 100), console)],
    )
    trainer.train()
    return adapted.eval()


def ask_fresh_process(console: Console, task: RecallTask, model: ARMTForCausalLM, folder: Path, seed: int) -> dict:
    """
    Lets a new Python process load the checkpoint with `trust_remote_code=True` and answer questions, beside the model
    that was saved.
    """
    questions, asked, truth = [], [], []
    for sample in take(task, [TRAIN_DISTANCES[-1]], seed + 5000, QUESTIONS):
        end = next(i for i, label in enumerate(sample.labels) if label != -100)
        questions.append(sample.input_ids[:end])
        asked.append(task.tokenizer.decode(sample.input_ids[sample.question_start : end]).strip())
        truth.append(task.tokenizer.decode(sample.labels[end]).strip())
    result = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS, str(folder)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"the fresh process could not use the checkpoint:\n{result.stderr}")
    fresh = json.loads(result.stdout.splitlines()[-1])
    console.print(f"A new process loaded {fresh['class'].split('.')[-1]}.py from the folder, and generated:")
    table = Table("the text ends with", "generated", "true")
    for row in list(zip(asked, fresh["answers"], truth, strict=True))[:QUESTIONS_SHOWN]:
        table.add_row(f"... {row[0]}", *row[1:])
    console.print(table)
    with torch.no_grad():
        here = [model.generate(torch.tensor([ids]), max_new_tokens=1, do_sample=False)[0, -1] for ids in questions]
    fresh |= {"truth": truth, "here": [task.tokenizer.decode(token).strip() for token in here]}
    right, same = (sum(map(str.__eq__, fresh["answers"], fresh[whose])) for whose in ("truth", "here"))
    console.print(f"Of {QUESTIONS} such answers {right} are right, and {same} are those of the model in this process.")
    return fresh
