"""
The control of the results on memory: the same backbone, trained by the same recipe, without the associative memory.
What goes from one segment to the next is carried in front of it, in as many positions as there are memory tokens:

- `states`: what the memory tokens at the end of the last segment became in the last layer, as in the Recurrent Memory
  Transformer (arXiv 2207.06881);
- `tokens`: the last tokens of the text, verbatim.

    python model_cards/carried.py train --carry states --recipe model_cards/babilong/qa1.yaml --out carried
    python model_cards/carried.py evaluate carried --task babilong --task-option task=qa1 --lengths 4k,32k --out res

The result is an adapter as of `armt train`. With `tokens`, what `armt evaluate --task text` says of it under the name
"carried tokens" is this control.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, set_seed

from modeling_armt import ARMTForCausalLM
from modeling_armt.compatibility_armt import CACHE, ARMTCausalLMOutput
from modeling_armt.conversion.adapters import lora_config
from modeling_armt.conversion.checkpoints import check_checkpoint
from modeling_armt.conversion.circumstances import circumstances
from modeling_armt.conversion.evaluation.evaluate import plan_lengths
from modeling_armt.conversion.evaluation.intervals import interval
from modeling_armt.conversion.evaluation.measure import default_count
from modeling_armt.conversion.evaluation.subject import compute_as_backbone
from modeling_armt.conversion.files import staged_folder
from modeling_armt.conversion.tasks.options import parse_options, task_for
from modeling_armt.conversion.training.checkpointing import last_checkpoint, partial_folder
from modeling_armt.conversion.training.collating import collate
from modeling_armt.conversion.training.curriculum import Curriculum
from modeling_armt.conversion.training.data import StageData
from modeling_armt.conversion.training.recipe import Recipe, make_recipe, read_recipe
from modeling_armt.conversion.training.scoring import exact_matches
from modeling_armt.conversion.training.train import check_out, save, start_folder, summarize
from modeling_armt.conversion.training.trainer import CurriculumTrainer, training_arguments


CARRIES = ("states", "tokens")
FEW_SEGMENTS = 1  # so many are trained without recomputing them
MANY_SEGMENTS = 16  # so many are worth a compilation, when they are only read
EVALUATED_TOKENS = 2**23  # of all rows of a batch


class Carried:
    """What is carried: `(B, m, D)` states, or the `(B, m)` last ids; None before the first segment."""

    def __init__(self, tensor: torch.Tensor | None = None):
        self.tensor = tensor

    def fork(self) -> "Carried":
        return self


class CarriedForCausalLM(ARMTForCausalLM):
    """
    An ARMT checkpoint's backbone and memory tokens, that carries instead of remembering. A text must be padded on the
    right only.

    Attributes:
        carry: one of `CARRIES`.
    """

    carry = "states"

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.get_input_embeddings()(ids)

    def segment(
        self, ids: torch.Tensor, mask: torch.Tensor | None, carried: torch.Tensor | None, write: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, S, D)` outputs for the `(B, S)` ids of a segment, and what goes on to the next one."""
        m = self.config.num_mem_tokens
        if self.carry == "tokens":
            front = None if carried is None else self.embed(carried)
        else:
            tokens = self.memory_tokens(torch.arange(m, device=ids.device)).to(self.dtype)
            front = tokens.expand(len(ids), -1, -1) if carried is None else carried.expand(len(ids), -1, -1)
        write = write and self.carry == "states"
        parts = [part for part in (front, self.embed(ids), front if write else None) if part is not None]
        if mask is not None:
            ones = mask.new_ones(len(ids), m)
            masks = [None if front is None else ones, mask, ones if write else None]
            mask = torch.cat([part for part in masks if part is not None], dim=1)
        inputs = torch.cat(parts, dim=1)
        hidden = self.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        start = 0 if front is None else m
        carried = hidden[:, -m:] if write else ids[:, -m:] if self.carry == "tokens" else None
        return hidden[:, start : start + ids.shape[1]], carried

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: Carried | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        goes_on: bool = False,
        **kwargs: Any,
    ) -> ARMTCausalLMOutput:
        """
        Arguments and result are those of [`ARMTForCausalLM.forward`] as far as training needs them; `goes_on` says
        that the last segment is not the text's, and shall be carried on.
        """
        size, length = self.config.segment_size, input_ids.shape[1]
        carried = None if cache is None else cache.tensor
        starts = range(0, length, size)
        hidden = []
        for start in starts:
            end = min(start + size, length)
            mask = None if attention_mask is None else attention_mask[:, start:end]
            arguments = (input_ids[:, start:end], mask, carried, goes_on or end < length)
            if torch.is_grad_enabled() and len(starts) > FEW_SEGMENTS:
                outputs, carried = checkpoint(self.segment, *arguments, use_reentrant=False)
            else:
                outputs, carried = self.segment(*arguments)
            hidden.append(outputs)
        past, head = Carried(carried), self.get_output_embeddings()
        if labels is None:
            kept = torch.cat(hidden, dim=1)[:, -logits_to_keep:] if logits_to_keep else torch.cat(hidden, dim=1)
            return ARMTCausalLMOutput(logits=head(kept), **{CACHE: past})
        targets = labels[:, 1:]
        there = targets != -100
        logits = head(torch.cat(hidden, dim=1)[:, :-1][there]).float()
        loss = nn.functional.cross_entropy(logits, targets[there], reduction="sum")
        count = there.sum() if num_items_in_batch is None else num_items_in_batch
        return ARMTCausalLMOutput(loss=loss / count, **{CACHE: past})

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> SimpleNamespace:
        """What a `(B, T)` text of whole segments leaves behind, as `cache`."""
        first, *others = tokens.split(self.config.segment_size, dim=1)
        segment = self.compiled_segment if tokens.is_cuda and len(others) >= MANY_SEGMENTS else self.segment
        carried = self.segment(first, None, None, True)[1]
        for ids in others:
            carried = segment(ids, None, carried, True)[1]
        return SimpleNamespace(cache=Carried(carried))

    @cached_property
    def compiled_segment(self) -> Callable:
        return torch.compile(self.segment, dynamic=False)


def load(path: str | Path, carry: str, dtype: torch.dtype | str) -> CarriedForCausalLM:
    """The ARMT checkpoint in a folder, to carry instead of remembering."""
    model = CarriedForCausalLM.from_pretrained(str(path), dtype=dtype)
    model.carry = carry
    return model


def train(recipe: Recipe, carry: str, resume: bool, command: str) -> dict[str, Any]:
    """As `armt train` with the method `lora`, for [`CarriedForCausalLM`]."""
    if recipe.out is None or recipe.method != "lora":
        raise SystemExit("the recipe must have out, and the method lora.")
    out = Path(recipe.out)
    check_out(out)
    folder, base = partial_folder(out), Path(recipe.model).resolve()
    PartialState(cpu=not torch.accelerator.is_available())
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load(base, carry, torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32)
    data = StageData(recipe, model.config.segment_size, tokenizer)
    set_seed(recipe.seed)
    options = {"lora_dropout": recipe.lora.dropout, "modules_to_save": ["memory_tokens"]}
    adapted = get_peft_model(model, lora_config(model, recipe.lora.r, recipe.lora.alpha, **options))
    start_folder(folder, recipe, resume)
    curriculum = Curriculum(recipe, data.exact)
    last = last_checkpoint(folder)
    if last is not None:
        curriculum.resume(last[1]["stateful_callbacks"]["Curriculum"])
    arguments = training_arguments(recipe, curriculum, folder)
    trainer = CurriculumTrainer(data, curriculum, model=adapted, args=arguments, processing_class=tokenizer)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in workers that are forked from now on
    trainer.train(resume_from_checkpoint=None if last is None else str(last[0]))
    summary = summarize(recipe, trainer, command) | {"carry": carry}
    save(out, trainer.model, tokenizer, recipe, summary, folder)
    return summary


@torch.no_grad()
def evaluate(
    path: Path, task_name: str, options: dict[str, Any], lengths: list[str], samples: int | None, device: str
) -> dict[str, Any]:
    """Right answers at each length by teacher forcing, which are those of greedy generation."""
    training = json.loads((path / "training.json").read_text(encoding="utf-8"))
    base, _ = check_checkpoint(path)
    model = PeftModel.from_pretrained(load(base, training["carry"], "auto"), str(path)).to(device).eval()
    compute_as_backbone(model)
    task = task_for(task_name, options, AutoTokenizer.from_pretrained(path))
    result = {"checkpoint": path.name, "seed": training["seed"], "carry": training["carry"], "lengths": []}
    for length, tokens in plan_lengths(task, lengths).items():
        scores, groups, batch = [], [], []
        count = samples or default_count(task, tokens)
        rows = max(1, min(128, EVALUATED_TOKENS // max(1, tokens)))
        for number, sample in enumerate(task.test(tokens, count), 1):
            batch.append(sample)
            if len(batch) == rows or number == count:
                inputs = collate([s["input_ids"] for s in batch], [s["labels"] for s in batch])
                scores += answers(model, {name: tensor.to(device) for name, tensor in inputs.items()})
                groups += [s["group"] for s in batch]
                batch = []
        entry = {"length": length, "tokens": tokens, "score": interval(scores, groups)}
        result["lengths"].append(entry)
        print("{length}: {score[mean]:.3f} [{score[low]:.3f}, {score[high]:.3f}]".format(**entry), flush=True)
    return result


def answers(model: PeftModel, batch: dict[str, torch.Tensor]) -> list[float]:
    """Which answers are right, all but the last segments read block by block."""
    size = model.config.segment_size
    first = int((batch["labels"] != -100).any(0).nonzero().min())
    border = (first - 1) // size * size  # rows of one length, or of less than a segment
    if "attention_mask" in batch or not border:
        return exact_matches(model, batch)[0].tolist()
    carried = model.get_base_model().read(batch["input_ids"][:, :border]).cache
    rest = {name: tensor[:, border:] for name, tensor in batch.items()}

    def go_on(**inputs: Any) -> ARMTCausalLMOutput:
        return model(**inputs, cache=carried)

    return exact_matches(go_on, rest)[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train")
    verb.add_argument("--carry", choices=CARRIES, default="states")
    verb.add_argument("--recipe", type=Path, required=True)
    verb.add_argument("--model", help="instead of the recipe's")
    verb.add_argument("--seed", type=int)
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--resume", action="store_true")
    verb = verbs.add_parser("evaluate")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("--task", required=True)
    verb.add_argument("--task-option", action="append", default=[], metavar="KEY=VALUE")
    verb.add_argument("--lengths", required=True)
    verb.add_argument("--samples", type=int)
    verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    verb.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.verb == "train":
        values = read_recipe(args.recipe) | {"out": str(args.out), "compile": False}
        values |= {name: getattr(args, name) for name in ("model", "seed") if getattr(args, name) is not None}
        train(make_recipe(values, str(args.recipe)), args.carry, args.resume, shlex.join(["python", *sys.argv]))
        return
    options = parse_options(args.task_option)
    with staged_folder(args.out) as folder:
        result = evaluate(args.checkpoint, args.task, options, args.lengths.split(","), args.samples, args.device)
        result["environment"] = circumstances("torch", "transformers", "peft", device=args.device)
        (folder / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
