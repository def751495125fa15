"""
Which pairs a model that remembers gets wrong: those with another key of the same symbols in another order, those with
keys that differ in one place only, those that were told early.

    python model_cards/associative_retrieval/near_keys.py remember-0 remember-1 remember-2 --out near-keys.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from modeling_armt.conversion.circumstances import circumstances
from modeling_armt.conversion.evaluation.controls import MEMORY, answer_samples
from modeling_armt.conversion.evaluation.intervals import interval
from modeling_armt.conversion.evaluation.subject import load_subject
from modeling_armt.conversion.files import write_whole
from modeling_armt.conversion.tasks.associative_retrieval import AssociativeRetrieval


ROWS = 100  # side by side
NEAR = ("0 near keys", "1 near keys", "2 or more near keys")


def kinds(task: AssociativeRetrieval, sample: dict[str, Any]) -> list[str]:
    """What is particular about the key that a sample asks for; each sample is early or late, and near or far."""
    ids = np.asarray(sample["input_ids"])
    pairs = (sample["prompt_length"] - task.key_size) // task.segment_size
    keys = ids[: pairs * task.segment_size].reshape(pairs, -1)[:, : task.key_size]
    told = sample["fact_spans"][0][0] // task.segment_size
    others = np.delete(keys, told, axis=0)
    shuffled = (np.sort(others, axis=1) == np.sort(keys[told])).all(1).any()
    neighbours = ((others != keys[told]).sum(1) == 1).sum()
    near = "same symbols" if shuffled else NEAR[min(neighbours, 2)]
    return ["all", near, "first half" if told < pairs // 2 else "second half"]


def measure(path: Path, task: AssociativeRetrieval, pairs: int, count: int) -> dict[str, dict[str, Any]]:
    """Right answers of each kind, with their intervals."""
    subject = load_subject(path, path.name, "float32", None, compiled=False)
    samples = list(task.test(task.length(pairs), count))
    right: dict[str, list[float]] = {}
    for start in tqdm(range(0, count, ROWS), desc=path.name):
        part = samples[start : start + ROWS]
        for sample, text in zip(part, answer_samples(subject, task, part, []).texts[MEMORY], strict=True):
            for kind in kinds(task, sample):
                right.setdefault(kind, []).append(task.score(text, sample))
    return {kind: interval(scores, range(len(scores))) for kind, scores in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    task = AssociativeRetrieval(key_size=3, segment_size=6)
    result = {
        "pairs": args.pairs,
        "models": {path.name: measure(path, task, args.pairs, args.samples) for path in args.models},
        "environment": circumstances("torch", "transformers", "peft"),
    }
    write_whole(args.out, json.dumps(result, indent=1) + "\n")
    for name, found in result["models"].items():
        print(name, ", ".join(f"{kind} {score['mean']:.3f} of {score['samples']}" for kind, score in found.items()))


if __name__ == "__main__":
    main()
