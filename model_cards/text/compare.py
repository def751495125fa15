"""
Does memory beat carrying tokens? The loss on the test side of novels of a model with memory, minus that of the control
of carried.py, which was trained by the same recipe to use the last tokens of the segment before; sample by sample,
with 95% intervals over books.

    python model_cards/text/compare.py novels tokens --task-option source=novels.tar.xz --length 1024 --out F.json
"""

import argparse
import json
from pathlib import Path

import torch

from modeling_armt.conversion.evaluation.batching import in_batches
from modeling_armt.conversion.evaluation.losses import LOSS_CONTROLS, losses_of, rows_with_logits, summarize_losses
from modeling_armt.conversion.evaluation.subject import load_subject
from modeling_armt.conversion.tasks.options import parse_options, task_for


CARRIED, TRAINED = LOSS_CONTROLS["carried"], "carried tokens, trained"


def losses(path: Path, samples: list[dict], controls: list[str], device: str) -> dict[str, list]:
    """By control, the losses of each sample's tokens; see [`losses_of`]."""
    subject = load_subject(path, path.name, "auto", device, compiled=False)
    found: dict[str, list] = {}
    rows = min(64, rows_with_logits(subject, len(samples)))
    for _, result in in_batches(lambda part: losses_of(subject, part, controls), samples, rows, len(samples)):
        for name, values in result.by_control.items():
            found.setdefault(name, []).extend(values)
    return found


def compare(memory: Path, carried: Path, options: dict, length: int, count: int | None, device: str) -> dict:
    """As `results.json` has the losses of a length, with what the control was trained for beside what memory was."""
    trained = json.loads((carried / "training.json").read_text(encoding="utf-8"))
    if trained.get("carry") != "tokens":
        raise SystemExit(f"{carried} is not a control of carried.py that carries tokens.")
    subject = load_subject(memory, memory.name, "auto", "cpu", compiled=False)
    size, task = subject.segment_size, task_for("text", options, subject.tokenizer)
    samples = list(task.test(length, count))
    found = losses(memory, samples, ["off", "carried"], device)
    found[TRAINED] = losses(carried, samples, ["carried"], device)[CARRIED]
    return summarize_losses(found, [sample["group"] for sample in samples], size) | {"samples": len(samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", type=Path, help="checkpoint of armt train --task text")
    parser.add_argument("carried", type=Path, help="control of carried.py train --carry tokens")
    parser.add_argument("--task-option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample (default 1024)")
    parser.add_argument("--samples", type=int, help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    options = parse_options(args.task_option)
    result = compare(args.memory, args.carried, options, args.length, args.samples, args.device)
    args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name, score in result["memory_minus"].items():
        print(f"memory minus {name}: " + "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**score))


if __name__ == "__main__":
    main()
