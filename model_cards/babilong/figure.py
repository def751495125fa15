"""
The figure of the card: right answers from 0k to 1M, of the three seeds, under the controls, and of what was trained by
the same recipe with correction off and with states carried instead of remembered.

    python model_cards/babilong/figure.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from modeling_armt.conversion.evaluation.controls import CONTROLS, MEMORY
from modeling_armt.conversion.evaluation.plots import COLORS, GRAY, draw_line


HERE = Path(__file__).parent
TRAINED = 32 * 512  # tokens of the longest samples of the recipe
UNCORRECTED, CARRIED = "correction off", "states carried"
OTHERS = {UNCORRECTED: "#1d4e89", CARRIED: "#4a4a4a"}  # trained anew, with their colors
PAPER = {"64k": 1.0, "128k": 0.999, "500k": 0.993, "1M": 0.985}  # arXiv 2407.04841, GPT-2 of 137 million parameters


def lengths_by_seed(*folders: str) -> dict[int, list[dict[str, Any]]]:
    """The entries of several results, by seed."""
    found: dict[int, list[dict[str, Any]]] = {}
    for folder in folders:
        for run in json.loads((HERE / folder / "results.json").read_text(encoding="utf-8"))["runs"]:
            found.setdefault(run["seed"], []).extend(run["lengths"])
    return found


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9.2, 4.8), layout="constrained")
    seeds = lengths_by_seed("results", "results-long")
    place = {entry["length"]: max(entry["tokens"], 300) for entry in seeds[0]}  # 0k has no place on this axis

    def draw_seed(name: str, seed: int, scores: dict[str, Any]) -> None:
        draw_line(axes, [place[length] for length in scores], list(scores.values()), name, seed, OTHERS.get(name))

    for name in reversed([MEMORY, *CONTROLS.values()][:4]):
        for seed, entries in seeds.items():
            draw_seed(name, seed, {e["length"]: e["scores"][name] for e in entries if name in e["scores"]})
    for seed, entries in lengths_by_seed("results-uncorrected").items():
        draw_seed(UNCORRECTED, seed, {e["length"]: e["scores"][MEMORY] for e in entries})
    for path in sorted((HERE / "results-carried").glob("results-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        draw_seed(CARRIED, run["seed"], {e["length"]: e["score"] for e in run["lengths"]})
    axes.plot([place[length] for length in PAPER], list(PAPER.values()), ":", color=GRAY, lw=1.5)
    axes.axvline(TRAINED, color=GRAY, lw=1, ls="--")
    axes.text(TRAINED * 1.04, 0.36, "trained to here", fontsize=8, color=GRAY)
    axes.set(xscale="log", ylim=(-0.02, 1.04), ylabel="share of right answers", xlabel="length")
    axes.set_xticks(list(place.values()), list(place))
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    colors = {name: COLORS[name] for name in (MEMORY, *CONTROLS.values()) if name != CONTROLS["backbone"]}
    colors |= OTHERS
    handles = [plt.Line2D([], [], color=color, marker="o", ms=4, label=name) for name, color in colors.items()]
    handles.append(plt.Line2D([], [], color=GRAY, ls=":", label="the paper, GPT-2 137M"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes.set_title("BABILong qa1: right answers by length, three seeds, with 95% intervals", fontsize=11, loc="left")
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "score_by_length.png", dpi=150)
