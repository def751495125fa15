"""
The health of a trained model's memories over a text that is far longer than what it was trained on, and that changes
half-way: does A grow without end, do reads become spikes? What is recorded is `cache.stats()`.

    python model_cards/health.py rewrite-0 --task associative_retrieval --segments 100000 --out health-rewrite
    python model_cards/health.py qa1-0 --task babilong --task-option task=qa1 --task-option background=novels.tar.xz
        --task-option cache=background-cache --segments 20000 --out health-qa1

Associative retrieval is pairs of all keys, then of two keys alone; BABILong is novels, then nothing but stories. The
result is a folder with health.json and health.png.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from modeling_armt.conversion.checkpoints import armt_model, load_checkpoint  # noqa: E402
from modeling_armt.conversion.circumstances import circumstances  # noqa: E402
from modeling_armt.conversion.files import staged_folder  # noqa: E402
from modeling_armt.conversion.tasks.associative_retrieval import AssociativeRetrieval  # noqa: E402
from modeling_armt.conversion.tasks.babi import generate_stories  # noqa: E402
from modeling_armt.conversion.tasks.babilong import Babilong  # noqa: E402
from modeling_armt.conversion.tasks.options import parse_options, task_for  # noqa: E402


TEXTS = {"associative_retrieval": ("pairs of all keys", "pairs of two keys"), "babilong": ("novels", "stories")}
Task = AssociativeRetrieval | Babilong
# What is kept of the rows of a batch: the worst.
WORST = {"min_kz_ratio": min, "min_qz": min, "min_denominator": min}
LABELS = {
    "A_norm": "norm of A",
    "lambda_last": "largest eigenvalue of a write (A grows above 2)",
    "max_read_ratio": "largest |read| / |x| so far",
    "zero_gamma_share": "share of memory tokens with gamma 0",
}


def points(segments: int) -> list[int]:
    """Segments after which is recorded: 1, 2, 5, 10, ... from the start, and from the change half-way."""
    half = segments // 2
    counts = [c * 10**power for power in range(9) for c in (1, 2, 5) if c * 10**power < half]
    return sorted({*counts, half, *(half + count for count in counts), segments})


def draw(task: Task, changed: bool, rows: int, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """`(rows, tokens)` ids of the first text, or of the one that it changes into."""
    if isinstance(task, AssociativeRetrieval):
        return task.text(rows, tokens // task.segment_size, rng, keys=2 if changed else None)
    if changed:
        text = np.fromiter(_story_tokens(task, rng), np.int32, tokens)
        return np.stack([np.roll(text, row * tokens // rows) for row in range(rows)])  # making as much again is slow
    return np.stack([task.background.draw("test", tokens, rng)[0] for _ in range(rows)])


def _story_tokens(task: Babilong, rng: np.random.Generator) -> Iterator[int]:
    sentences = chain.from_iterable(story.facts for story in generate_stories(task.task, rng))
    return chain.from_iterable(map(task.encode, sentences))


def worst_of_rows(stats: dict[int, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By layer and name, the worst row of `cache.stats()`; without what no row has met."""
    return {
        str(layer): {
            name: WORST.get(name, max)(known)
            for name, values in names.items()
            if (known := [value for value in values or () if value is not None])
        }
        for layer, names in stats.items()
    }


def measure(model: torch.nn.Module, task: Task, segments: int, rows: int, seed: int = 0) -> list[dict]:
    """
    Reads `segments` segments, of which the second half is the other text.

    Returns:
        At each of [`points`]: `segments`, `seconds` since the start, and `layers` as of [`worst_of_rows`].
    """
    rng, size = np.random.default_rng(seed), model.config.segment_size
    cache, read, records, start = None, 0, [], time.monotonic()
    with tqdm(total=segments, unit="segment", mininterval=2) as bar:
        for point in points(segments):
            text = draw(task, read >= segments // 2, rows, (point - read) * size, rng)
            cache = model.read(
                torch.from_numpy(text.astype(np.int32)), cache, progress=lambda n: bar.update(n // size)
            ).cache
            read = point
            layers = worst_of_rows(cache.stats())
            records.append({"segments": read, "seconds": round(time.monotonic() - start, 2), "layers": layers})
    return records


def plot(content: dict[str, Any]) -> "plt.Figure":
    """A panel for each of `LABELS`, a line for each layer, and where the text changes."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 6.4), sharex=True)
    records = content["points"]
    layers = sorted(records[-1]["layers"], key=int)
    colors = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, len(layers)))
    half, (first, second) = content["segments"] // 2, content["texts"]
    for axes, (name, label) in zip(panels.flat, LABELS.items(), strict=True):
        for layer, color in zip(layers, colors, strict=True):
            values = [(r["segments"], r["layers"][layer][name]) for r in records if name in r["layers"].get(layer, {})]
            if values:
                axes.plot(*zip(*values, strict=True), "-", color=color, lw=1.6, label=f"layer {layer}")
        axes.axvline(half, color="#777777", lw=1, ls=":")
        axes.set_title(label, fontsize=10)
        axes.set_xscale("log")
        axes.set_yscale("log" if name in ("A_norm", "max_read_ratio") else "linear")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "lambda_last":
            axes.axhline(2, color="#c2410c", lw=1, ls="--")
            axes.set_ylim(bottom=0, top=max(2.2, axes.get_ylim()[1]))
        if name == "zero_gamma_share":
            axes.set_ylim(-0.02, 1.02)
    for axes in panels[1]:
        axes.set_xlabel(f"segments: {first}, from the dotted line on {second}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), ncols=8, loc="lower center", fontsize=8, frameon=False)
    texts = f", the worst of {content['rows']} texts" if content["rows"] > 1 else ""
    figure.suptitle(f"{content['model']}: health of the memories{texts}", fontsize=11)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an ARMT checkpoint, or an adapter of one")
    parser.add_argument("--task", choices=list(TEXTS), required=True)
    parser.add_argument("--task-option", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    parser.add_argument("--segments", type=int, required=True)
    parser.add_argument("--rows", type=int, default=4, help="texts read side by side (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-guard", action="store_true", help="as published, without the guard of writes")
    parser.add_argument("--compile", action="store_true", help="a slow start, then faster on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args()
    with staged_folder(args.out) as folder:
        loaded, tokenizer = load_checkpoint(args.model)
        model = armt_model(loaded)
        for memory in model.memory.values():
            memory.write_guard = memory.write_guard and not args.no_guard
        if args.compile:
            model.compile_armt()
        task = task_for(args.task, parse_options(args.task_option), tokenizer)
        content = {
            "model": args.model.name,
            **circumstances("torch", "transformers"),
            "write_guard": model.config.write_guard and not args.no_guard,
            "segments": args.segments, "segment_size": model.config.segment_size, "rows": args.rows,
            "seed": args.seed, "texts": TEXTS[args.task],
            "points": measure(model, task, args.segments, args.rows, args.seed),
        }  # fmt: skip
        (folder / "health.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        plot(content).savefig(folder / "health.png", dpi=150)
    last = content["points"][-1]
    for layer, stats in last["layers"].items():
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in stats.items())
        print(f"layer {layer} after {last['segments']:,} segments: {numbers}")


if __name__ == "__main__":
    main()
