"""
How fast a recipe trains: tokens a second of whole steps at some numbers of segments, with the recipe's own model,
adapters, precision and compilation, on random ids with the loss of an answer.

    python model_cards/speed.py --recipe model_cards/babilong/qa1.yaml --segments 1 8 32 --out speed.json
"""

import argparse
import json
import time
from pathlib import Path

import torch

from modeling_armt.conversion.adapters import parameter_groups
from modeling_armt.conversion.checkpoints import armt_model
from modeling_armt.conversion.circumstances import circumstances
from modeling_armt.conversion.training.recipe import Recipe, make_recipe, read_recipe
from modeling_armt.conversion.training.train import load_model, make_trainable


POSITIONS = 1024  # segments of all rows of a pass, as in the recipe's stages


def measure(recipe: Recipe, segments: int, rows: int, passes: int, device: str) -> dict:
    """Seconds of an optimizer step of `passes` passes, warm, and of the first pass, which compiles."""
    model, _ = load_model(recipe)
    size = model.config.segment_size
    model = make_trainable(recipe, model, [size]).to(device).train()
    groups = parameter_groups(model, recipe.lr, recipe.memory_lr, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=device == "cuda")
    vocabulary = armt_model(model).num_embeddings
    ids = torch.randint(vocabulary, (rows, segments * size), device=device)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    inputs = {"input_ids": ids, "labels": labels, "return_logits": False, "schedule": recipe.schedule}

    def step(passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            with torch.autocast(device, torch.bfloat16, enabled=recipe.precision != "float32"):
                loss = model(**inputs).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        return time.perf_counter() - start

    first = step(1)
    step(1)
    seconds = min(step(passes) for _ in range(3))
    result = {"segments": segments, "rows": rows, "passes": passes, "first_pass_s": first, "step_s": seconds}
    result["tokens_per_s"] = ids.numel() * passes / seconds
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--model", help="instead of the recipe's")
    parser.add_argument("--segments", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = read_recipe(args.recipe) | ({} if args.model is None else {"model": args.model})
    recipe = make_recipe(values, str(args.recipe))
    facts = circumstances("torch", "transformers", "peft")
    results = []
    for segments in args.segments:
        rows = max(1, min(256, POSITIONS // segments)) if device == "cuda" else 2
        results.append(measure(recipe, segments, rows, 2, device))
        print("{segments} segments, {rows} rows: {tokens_per_s:,.0f} tokens/s, first pass {first_pass_s:.0f} s".format(
            **results[-1]), flush=True)  # fmt: skip
        args.out.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
