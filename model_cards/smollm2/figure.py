"""
The figure of the card: exact match on the first level over samples, by run, with and without what parts memory tokens.

    python model_cards/smollm2/figure.py
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt


HERE = Path(__file__).parent
BAG = 0.56  # who knows the places that were told, but not of whom


def panel_of(recipe: dict) -> int:
    standardised = recipe.get("norm") in ("std", "slot") and "track" not in recipe
    return 2 if standardised and recipe.get("spread") else 1 if standardised else 0


def draw() -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True, layout="constrained")
    titles = ["no or fixed statistics, or RMS norm", "standardised by running statistics", "standardised and spread"]
    for run in json.loads((HERE / "search.json").read_text(encoding="utf-8"))["runs"]:
        first = [(samples, score) for samples, score, level in run["scores"] if level == [1, 0]]
        if not first or max(score for _, score in first) == 0:
            continue
        panel = axes[panel_of(run["recipe"])]
        targeted = run["recipe"].get("aux") == "state"
        label = f"{'target' if targeted else 'no target'}, {'broke' if run['broke_at'] else 'not yet'}"
        panel.plot([n / 1000 for n, _ in first], [score for _, score in first], "-" if targeted else "--", lw=1.3,
                   color="#c1440e" if run["broke_at"] else "#8a8a8a", label=label)  # fmt: skip
    for panel, title in zip(axes, titles, strict=True):
        panel.axhline(BAG, color="black", lw=0.8, ls=":")
        panel.set(title=title, xlabel="thousand samples", ylim=(0, 1.02), xlim=(0, 120))
        labels = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        panel.legend(labels.values(), labels.keys(), loc="lower right", fontsize=8, frameon=False)
    axes[0].set_ylabel("exact match, two segments")
    axes[0].text(118, BAG - 0.02, "places without persons", ha="right", va="top", fontsize=8)
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "search.png", dpi=110)
