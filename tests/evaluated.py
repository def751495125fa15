"""Folders as training and evaluation leave them, for the tests of cards and of `armt publish`."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_armt import ARMTForCausalLM
from modeling_armt.conversion.convert import convert
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.evaluation.subject import hash_weights


SEEDS = (0, 1, 2)
LENGTHS = {"0k": (61.5, 2.41), "4k": (5123.25, 161.0)}  # tokens and segments of a sample


def checkpoint(folder: Path, trained: bool = True) -> ARMTForCausalLM:
    """The demonstration's backbone in segments of 32 tokens, with memories that matter if it is `trained`."""
    model = convert(BACKBONE, folder, segment_size=32, num_mem_tokens=4, d_mem=8)
    if trained:
        torch.manual_seed(0)
        for memory in model.memory.values():
            nn.init.normal_(memory.memory_value.weight, std=0.05)
        model.save_pretrained(folder)
        write(folder / "training.json", training())
    return model


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def training(seed: int = 0) -> dict[str, Any]:
    """A `training.json` as `armt train` writes it."""
    recipe = {"model": "/home/ann/armt", "task": "babilong", "task_options": {"task": "qa1"}, "lr": 3e-4, "seed": seed}
    stages = [
        {
            "segments": 1,
            "until": 0.99,
            "max_steps": 400,
            "steps": 350,
            "score": 0.992,
            "loss": 0.0314,
            "seconds": 71.5,
        },
        {
            "segments": 4,
            "until": None,
            "max_steps": 800,
            "steps": 800,
            "score": 0.953,
            "loss": 0.1207,
            "seconds": 412.25,
        },
    ]
    return {
        "recipe": recipe,
        "seed": seed,
        "stages": [stage | {"scores": [[50, 0.4, 2.0]]} for stage in stages],
        "steps": 1150,
        "loss": [[10, 3.25], [20, 2.125]],
        "tokens": 18841600,
        "seconds": 483.75,
        "tokens_per_s": 38949.0,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "device": "NVIDIA H200",
        "command": "armt train /home/ann/armt --task babilong --out qa1",
        "date": "2026-11-24T12:00:00+00:00",
    }


def score(mean: float, samples: int = 1000) -> dict[str, Any]:
    return {
        "mean": mean,
        "low": round(mean - 0.0123, 6),
        "high": round(min(1.0, mean + 0.0117), 6),
        "samples": samples,
    }


def results(folder: Path | None = None) -> dict[str, Any]:
    """A `results.json` as `armt evaluate` writes it, of three seeds with all controls; `folder` has seed 0."""
    runs = []
    for seed in SEEDS:
        entries = []
        for number, (length, (tokens, segments)) in enumerate(LENGTHS.items()):
            scores = {
                "memory": score(0.98125 - 0.0315 * number - 0.0043 * seed),
                "memory off": score(0.2134 + 0.0011 * seed),
                "memory swapped": score(0.1719 + 0.0013 * seed),
                "fact deleted": score(0.1652 + 0.0017 * seed),
            }
            if number == 0:
                scores["backbone"] = score(0.1871 + 0.0019 * seed)
            background = {"unique_tokens": 1845221, "repeated": False} if number else None
            entries.append(
                {
                    "length": length,
                    "tokens": tokens,
                    "segments": segments,
                    "samples": 1000,
                    "background": background,
                    "controls": ["off", "swapped", "deleted", "backbone"][: len(scores) - 1],
                    "scores": scores,
                    "by_distance": [{"segments": 1, **score(0.9876)}],
                    "tokens_per_s": 41234.5 + seed,
                    "peak_gib": 2.317 + 0.001 * seed,
                    "baselines": {"chance": 0.1667, "last location mentioned": 0.5271 - 0.0123 * number},
                    "stats": {"lambda_max": {"least": 0.125, "mean": 0.73, "largest": 1.4375, "layer_of_largest": 3}},
                }
            )
        weights = hash_weights(folder) if folder is not None and seed == 0 else f"{seed:016x}"
        runs.append({"checkpoint": f"seed{seed}", "seed": seed, "weights": weights, "lengths": entries})
    task = {"name": "babilong", "options": {"task": "qa1", "babi": "/home/ann/babi", "protocol": "base"}}
    return {
        "task": task,
        "request": {"task": task["name"], "options": task["options"], "samples": None},
        "environment": {
            "versions": {"torch": "2.13.0"},
            "device": "NVIDIA H200",
            "date": "2026-11-24",
            "command": "x",
        },
        "baselines": {"chance": 0.1667, "last location mentioned": 0.5271},
        "runs": runs,
    }


# The smallest picture: one white pixel.
PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f0001010100"
    "1bb6ee560000000049454e44ae426082"
)


def evaluated(folder: Path) -> None:
    """Puts results and a plot into a folder."""
    write(folder / "results.json", results(folder))
    (folder / "score_by_length.png").write_bytes(PICTURE)


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, to see whether it was left alone."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
