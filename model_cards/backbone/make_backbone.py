"""
Trains the backbone of the results on novels and BABILong: a Llama of at most 12 million parameters, on the novels and
on new stories of bAbI with questions, some of them scattered over the novels. One command, on one GPU:

    python model_cards/backbone/make_backbone.py --novels novels.tar.xz --babi babi-v1.2.tar.xz --out backbone

Only books of the tasks' training side are seen, and no question that the tasks hold out. The result is a Hugging Face
folder: bf16 weights, tokenizer, training.json, README.md.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_armt.conversion.circumstances import circumstances
from modeling_armt.conversion.files import staged_folder
from modeling_armt.conversion.pretraining import (
    make_llama,
    pack,
    save_tokenizer,
    token_losses,
    train_for,
    train_tokenizer,
    write_facts,
)
from modeling_armt.conversion.tasks.babi import Story, generate_stories
from modeling_armt.conversion.tasks.babilong import Babilong, sample_key
from modeling_armt.conversion.tasks.documents import read_documents
from modeling_armt.conversion.training.collating import collate
from modeling_armt.conversion.training.scoring import totals


MAX_PARAMETERS = 12_000_000
# One context holds two segments of 512, so that the backbone with full attention can be measured on them.
SIZES = {"vocab": 4096, "hidden": 384, "layers": 6, "heads": 6, "kv_heads": 6, "intermediate": 960, "context": 1024}
NOISE = (0, 8, 32, 96)  # mean tokens of novels before each sentence of a story; a story has one of these
TOKENIZER_STORIES = 20_000  # so that the stories' words are tokens
README = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# A small Llama that reads novels, and stories of bAbI

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}, {heads} heads, intermediate size
{intermediate}, context {context}, tied embeddings, bf16) with a byte-level BPE vocabulary of {vocab}: the backbone of
this project's results on BABILong {task} and on language modelling.

## How it was made
`model_cards/backbone/make_backbone.py` trained the tokenizer, then the model from scratch: {steps:,} steps of {batch}
windows of {context} tokens ({tokens_seen:,} tokens) in {train_seconds:.0f} s on {device}, with AdamW, peak learning
rate {lr:g}, cosine schedule with warm-up. `training.json` holds the command and the loss curve.

{story_share:.0%} of the windows are stories of {task} with questions and answers, new ones from the project's own
generator, without any question that the task holds out; between their sentences stand 0 to {most_noise} tokens of
novels on average. A token of an answer weighs as much in the loss as {answer_weight:g} others. The other windows are
novels.

## Data
{books} of {all_books} public-domain English novels from "100 English Novels" and ELTeC-eng (whose mark-up is not in
these plain texts): those of the training side of the tasks `text` and `babilong`. Their other books were never read.
{novel_tokens:,} tokens of novels, {story_tokens:,} tokens of {stories:,} stories.

## Numbers
Of the saved bf16 weights, on books and questions of the validation side:

| measure | value |
| --- | --- |
| loss on {eval_tokens:,} tokens of novels, in windows of {context} | {nats_per_token:.4f} nats/token |
{answers}

## Use and limits
To measure memories, nothing else. It is a tiny model of old novels, with the language and the prejudices of its
period.
"""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--novels", type=Path, required=True, help="folder or tar archive of *.txt books")
    add("--babi", type=Path, required=True, help="folder or archive of bAbI v1.2, for what is held out")
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--cache", type=Path, help="folder for the tokens of the novels, as the tasks have it (default: none)")
    add("--task", default="qa1", choices=["qa1", "qa2", "qa3"], help="of the stories (default qa1)")
    for name, value in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    add("--minutes", type=float, default=4.0, help="training time, compilation included (default 4)")
    add("--batch", type=int, default=128, help="windows per step (default 128)")
    add("--lr", type=float, default=2e-3)
    add("--warmup", type=int, default=200, help="steps")
    add("--story-share", type=float, default=0.5, help="share of windows that are stories (default 0.5)")
    add("--answer-weight", type=float, default=30.0, help="of a token of an answer in the loss (default 30)")
    add("--stories", type=int, default=100_000, help="stories to make, read again and again (default 100,000)")
    add("--validation", type=int, default=500, help="questions to measure on (default 500)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-compile", action="store_true", help="do without torch.compile, for tiny or CPU runs")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def story_texts(task: str, count: int, seed: int) -> Iterator[str]:
    """Stories with their first question as plain text."""
    for story in islice(generate_stories(task, np.random.default_rng([seed, 0])), count):
        question = story.questions[0]
        yield " ".join(["", *story.facts, question.text, question.answer])


def write_story(task: Babilong, story: Story, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """
    A story as ids, and which of them are answers: either with all of its questions where they stand, or up to one of
    them, and with or without text of novels between its sentences. None if the task holds out one of its questions.
    """
    if any(sample_key(story, question) in task.held_out_keys for question in story.questions):
        return None
    asked = story.questions if rng.random() < 0.5 else [story.questions[int(rng.integers(len(story.questions)))]]
    pieces: list[tuple[list[int], int]] = []  # ids, and how many of them at the end are the answer's
    done = 0
    for question in asked:
        pieces += [(task.encode(fact), 0) for fact in story.facts[done : question.position]]
        done = question.position
        answer = [*task.encode(question.answer), task.tokenizer.eos_token_id]
        pieces.append((task.encode(question.text) + answer, len(answer)))
    noise = NOISE[int(rng.integers(len(NOISE)))] * len(pieces)
    text, borders = task.draw("train", noise, rng)
    slots = np.sort(rng.integers(0, len(borders), len(pieces)))
    ids, answers, read = [], [], 0
    for (piece, answer_length), slot in zip(pieces, slots, strict=True):
        gap, read = text[read : borders[slot]], int(borders[slot])
        ids += [gap, np.asarray(piece)]
        answers += [np.zeros(len(gap) + len(piece) - answer_length, bool), np.ones(answer_length, bool)]
    return np.concatenate(ids).astype(np.uint16), np.concatenate(answers)


def make_stories(task: Babilong, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Ids of `count` stories in a row, which of them are answers, and where each story begins."""
    rng = np.random.default_rng([seed, 1])
    stories = generate_stories(task.task, rng)
    written = islice(filter(None, (write_story(task, story, rng) for story in stories)), count)
    ids, answers = zip(*tqdm(written, "write stories", count, unit="story", mininterval=2), strict=True)
    starts = np.cumsum([0, *map(len, ids)])[:-1]
    return {
        "ids": torch.from_numpy(np.concatenate(ids)),
        "answers": torch.from_numpy(np.concatenate(answers)),
        "starts": torch.from_numpy(starts),
    }


def side_tokens(task: Babilong, side: str) -> torch.Tensor:
    """The novels of a side in the form of the task, sentence by sentence, as uint16."""
    background = task.background
    runs = [background.ids[background.offsets[a] : background.offsets[b]] for _, a, b in background.side(side)]
    return torch.from_numpy(np.concatenate(runs).astype(np.uint16))


class Windows:
    """
    Batches: windows of stories, which begin with one, and of novels as the tasks `babilong` and `text` have them.

    Args:
        novels: token ids, as uint16, in several forms that are read alike.
        stories: see [`make_stories`].
        args: with `context`, `batch`, `story_share`, `answer_weight`, `device` and `seed`.
    """

    def __init__(self, novels: list[torch.Tensor], stories: dict[str, torch.Tensor], args: argparse.Namespace):
        self.length, device = args.context + 1, args.device
        # Not as uint16, which cannot be indexed on a GPU.
        self.novels = [tokens.int().to(device) for tokens in novels]
        self.stories = {name: tensor.to(device) for name, tensor in stories.items()}
        self.stories["ids"] = stories["ids"].int().to(device)
        self.starts = self.stories["starts"][stories["starts"].to(device) <= len(stories["ids"]) - self.length]
        self.position = torch.arange(self.length, device=device)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.answer_weight = args.answer_weight
        self.rows = round(args.batch * args.story_share)
        left = args.batch - self.rows
        self.novel_rows = [left // len(novels) + (number < left % len(novels)) for number in range(len(novels))]

    def random(self, rows: int, most: int) -> torch.Tensor:
        """`(rows, 1)` numbers below `most`."""
        return torch.randint(most, (rows, 1), device=self.position.device, generator=self.generator)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(batch, context + 1)` ids, and `(batch, context)` weights of predicting all but the first."""
        places = self.starts[self.random(self.rows, len(self.starts))] + self.position
        windows, weights = [self.stories["ids"][places]], [self.stories["answers"][places[:, 1:]]]
        for tokens, rows in zip(self.novels, self.novel_rows, strict=True):
            places = self.random(rows, len(tokens) - self.length + 1) + self.position
            windows.append(tokens[places])
            weights.append(torch.zeros_like(places[:, 1:], dtype=torch.bool))
        return torch.cat(windows).long(), 1 + (self.answer_weight - 1) * torch.cat(weights)


@torch.no_grad()
def measure(model: torch.nn.Module, task: Babilong, args: argparse.Namespace) -> dict:
    """Loss on novels, and right answers without novels around the facts and at two lengths, of the validation side."""
    tokens = side_tokens(task, "validation").long()
    count = min(1024, (len(tokens) - 1) // args.context)
    starts = torch.linspace(0, len(tokens) - args.context - 1, count, dtype=torch.float64).long()
    windows = tokens[starts[:, None] + torch.arange(args.context + 1)]
    losses = [token_losses(model, part.to(args.device)).double().mean(1) for part in windows.split(32)]
    facts = {
        "eval_tokens": count * args.context,
        "nats_per_token": torch.cat(losses).mean().item(),
        "right_answers": {},
    }
    for length in (0, args.context // 2, args.context):
        samples = list(task.validation(length, args.validation))
        parts = [samples[i : i + 32] for i in range(0, len(samples), 32)]
        batches = (collate([s["input_ids"] for s in part], [s["labels"] for s in part]) for part in parts)
        on_device = ({name: tensor.to(args.device) for name, tensor in batch.items()} for batch in batches)
        right, samples, _, _ = totals(model, on_device, exact=True).tolist()
        facts["right_answers"][str(length)] = right / samples
    return facts


def make_backbone(args: argparse.Namespace, command: str) -> dict:
    """Writes the folder, and returns what its training.json has."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    with staged_folder(args.out) as folder, tempfile.TemporaryDirectory() as own_cache:
        documents = read_documents(args.novels)
        training = list(documents.side("train").texts)
        stories = list(story_texts(args.task, TOKENIZER_STORIES, args.seed))
        tokenizer = train_tokenizer([*training, *stories], args.vocab)
        model = make_llama(tokenizer, vars(args), MAX_PARAMETERS).to(args.device)
        save_tokenizer(tokenizer, folder, training[0][:10_000] + "\nZoë paid £1,234 to 東京\n")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        task = Babilong(args.task, tokenizer, args.babi, args.novels, args.cache or own_cache)
        novels = [side_tokens(task, "train"), pack(tokenizer, training)]
        made = make_stories(task, args.stories, args.seed)
        facts = train_for(model, args.minutes, Windows(novels, made, args), args.lr, args.warmup, not args.no_compile)
        model.to(torch.bfloat16).save_pretrained(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(args.device)
        facts |= measure(saved.eval(), task, args)
        packages = ("torch", "transformers", "tokenizers", "safetensors")
        facts = {
            **circumstances(*packages, device=args.device, command=command),
            "parameters": saved.num_parameters(),
            **{name: getattr(args, name) for name in SIZES},
            **{name: getattr(args, name) for name in ("task", "batch", "lr", "story_share", "answer_weight", "seed")},
            "vocab": len(tokenizer),
            "most_noise": max(NOISE),
            "all_books": len(documents),
            "books": len(training),
            "novel_tokens": len(novels[0]),
            "stories": args.stories,
            "story_tokens": len(made["ids"]),
        } | facts
        rows = [
            f"| right answers, {f'{length} tokens' if int(length) else 'facts alone'} | {score:.3f} |"
            for length, score in facts["right_answers"].items()
        ]
        (folder / "README.md").write_text(README.format(**facts, answers="\n".join(rows)), encoding="utf-8")
        write_facts(folder, facts)
    return facts


def main() -> None:
    args = parse_args()
    facts = make_backbone(args, shlex.join(["python", *sys.argv]))
    print("{steps:,} steps, {tokens_seen:,} tokens, {parameters:,} parameters".format(**facts))
    print("novels: {nats_per_token:.4f} nats/token".format(**facts))
    for length, score in facts["right_answers"].items():
        print(f"answers in {f'{length} tokens' if int(length) else 'facts alone'}: {score:.3f}")


if __name__ == "__main__":
    main()
