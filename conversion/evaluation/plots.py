"""Results as figures: score by length with controls, by distance and by depth, and loss by segment."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import staged
from .controls import CONTROLS, MEMORY
from .losses import LOSS_CONTROLS


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = dict[str, Any]

COLORS = {
    MEMORY: "#0b6e4f",
    CONTROLS["off"]: "#c2410c",
    CONTROLS["swapped"]: "#b8860b",
    CONTROLS["deleted"]: "#8b3a8b",
    CONTROLS["backbone"]: "#4361ae",
    LOSS_CONTROLS["carried"]: "#b8860b",
    LOSS_CONTROLS["backbone"]: "#4361ae",
}
MARKERS = "osD^v<>"
GRAY = "#777777"


def plot_results(results: dict[str, Any], folder: str | Path) -> list[Path]:
    """
    Draws what there is to be seen in results, all seeds in each figure.

    Args:
        results: content of a results.json.
        folder: where the PNG files go.

    Returns:
        The files; none, with a warning, where matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(
            "there are no plots, since matplotlib is not installed: pip install 'modeling-armt[plots]', and run the "
            "command again",
            stacklevel=2,
        )
        return []
    runs = [run for run in results["runs"] if run["lengths"]]
    figures: dict[str, Callable[[dict[str, Any], Sequence[Run]], Figure | None]] = {
        "score_by_length.png": score_by_length,
        "score_by_distance.png": score_by_distance,
        "score_by_depth.png": score_by_depth,
        "loss_by_segment.png": loss_by_segment,
    }
    paths = []
    for name, draw in figures.items():
        figure = draw(results, runs) if runs else None
        if figure is not None:
            path = Path(folder) / name
            with staged(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150)
                temporary.replace(path)
            paths.append(path)
    return paths


def score_by_length(results: dict[str, Any], runs: Sequence[Run]) -> "Figure | None":
    """One line a seed and control, over the length of the text."""
    if not any("scores" in entry for run in runs for entry in run["lengths"]):
        return None
    figure, (axes,) = panels(1, width=8.6)
    names = [name for name in COLORS if any(name in e["scores"] for run in runs for e in run["lengths"])]
    for name in reversed(names):  # memory on top
        for number, run in enumerate(runs):
            entries = [entry for entry in run["lengths"] if entry["scores"].get(name, {}).get("mean") is not None]
            places = [max(entry["tokens"], 1) for entry in entries]
            draw_line(axes, places, [entry["scores"][name] for entry in entries], name, number)
    ends = [max(entry["tokens"] for entry in run["lengths"]) for run in runs]
    height = -1.0
    for name, shares in sorted(baselines_by_length(runs).items(), key=lambda item: item[1][-1][1]):
        axes.plot(*zip(*shares, strict=True), ":", color=GRAY, lw=1.2, zorder=1)
        height = max(height + 0.035, shares[-1][1])  # labels keep off each other
        place = {"xytext": (1.01, height), "textcoords": axes.get_yaxis_transform()}
        axes.annotate(name.replace("_", " "), shares[-1], **place, va="center", fontsize=8, color=GRAY)
    ticks = {max(entry["tokens"], 1): entry["length"] for run in runs for entry in run["lengths"]}
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set(ylim=(-0.02, 1.04), xlabel="length", ylabel="share of right answers")
    axes.set_xlim(min(ticks) / 1.15, max(ends) * 1.15)
    add_legend(figure, names, runs)
    return titled(figure, results, "right answers by length, with 95% intervals")


def baselines_by_length(runs: Sequence[Run]) -> dict[str, list[tuple[float, float]]]:
    """What is scored without reading, as points over all lengths."""
    points: dict[str, dict[float, float]] = {}
    for run in runs:
        for entry in run["lengths"]:
            for name, share in entry.get("baselines", {}).items():
                points.setdefault(name, {})[max(entry["tokens"], 1)] = share
    return {name: sorted(shares.items()) for name, shares in points.items()}


def score_by_distance(results: dict[str, Any], runs: Sequence[Run]) -> "Figure | None":
    """One panel a seed and one line a length, over the segments between fact and question."""
    runs = [run for run in runs if any(entry.get("by_distance") for entry in run["lengths"])]
    if not runs:
        return None
    import matplotlib

    figure, all_axes = panels(len(runs))
    for axes, run in zip(all_axes, runs, strict=True):
        entries = [entry for entry in run["lengths"] if entry.get("by_distance")]
        colors = matplotlib.colormaps["viridis_r"]
        for number, entry in enumerate(entries):
            # A bin stands at its end; 0, the same segment, has no place on a logarithmic axis.
            places = [item["to"] or 0.5 for item in entry["by_distance"]]
            color = colors(0.15 + 0.8 * number / max(1, len(entries) - 1))
            draw_line(axes, places, entry["by_distance"], entry["length"], 0, color)
        tos = sorted({item["to"] for entry in entries for item in entry["by_distance"]})
        shown = tos if len(tos) < 8 else [to for place, to in enumerate(tos) if to == 0 or place % 2]
        axes.set_xscale("log", base=2)
        axes.set_xticks([to or 0.5 for to in shown], [f"{to:,}" for to in shown])
        axes.minorticks_off()
        axes.set(ylim=(-0.02, 1.04), title=seed_name(run), xlabel="segments since the fact, at most")
        axes.legend(title="length", fontsize=8, frameon=False, loc="best")
    all_axes[0].set_ylabel("share of right answers")
    return titled(figure, results, "right answers by distance, with 95% intervals")


def score_by_depth(results: dict[str, Any], runs: Sequence[Run]) -> "Figure | None":
    """One grid of depth by length a seed."""
    runs = [run for run in runs if any(entry.get("by_depth") for entry in run["lengths"])]
    if not runs:
        return None
    figure, all_axes = panels(len(runs), width=1.2 + 0.6 * max(len(run["lengths"]) for run in runs))
    for axes, run in zip(all_axes, runs, strict=True):
        entries = [entry for entry in run["lengths"] if entry.get("by_depth")]
        depths = sorted({item["depth"] for entry in entries for item in entry["by_depth"]})
        found = [{item["depth"]: item["mean"] for item in entry["by_depth"]} for entry in entries]
        grid = [[of.get(depth, float("nan")) for of in found] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="YlGn", aspect="auto")
        for row, shares in enumerate(grid):
            for column, share in enumerate(shares):
                if share == share:
                    color = "white" if share > 0.6 else "#222222"
                    axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(entries)), [entry["length"] for entry in entries])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=seed_name(run), xlabel="length")
        axes.grid(False)
    all_axes[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=list(all_axes), label="share of right answers", shrink=0.9)
    return titled(figure, results, "right answers by depth and length")


def loss_by_segment(results: dict[str, Any], runs: Sequence[Run]) -> "Figure | None":
    """One panel a length, and one line a seed and control, over the segments of the text."""
    lengths = {e["length"]: e["tokens"] for run in runs for e in run["lengths"] if "loss_by_segment" in e}
    if not lengths:
        return None
    figure, upper, lower = panels_in_two_rows(len(lengths))
    names: dict[str, None] = {}
    for column, length in enumerate(sorted(lengths, key=lengths.get)):
        for number, run in enumerate(runs):
            for entry in run["lengths"]:
                if entry["length"] == length:
                    names |= dict.fromkeys(entry["loss_by_segment"])
                    for axes, lines in ((upper, "loss_by_segment"), (lower, "memory_minus_by_segment")):
                        for name, scores in reversed(entry[lines].items()):
                            some = [(at + 1, score) for at, score in enumerate(scores) if score["mean"] is not None]
                            # Documents differ far more than ways to read them: one band is enough above.
                            draw_line(
                                axes[column],
                                [at for at, _ in some],
                                [score for _, score in some],
                                name,
                                number,
                                band=axes is lower or name == MEMORY,
                            )
        upper[column].set(title=length)
        lower[column].axhline(0, color=GRAY, lw=1)
        lower[column].set(xlabel="segment")
        lower[column].xaxis.get_major_locator().set_params(integer=True)
    upper[0].set_ylabel("loss, nats a token")
    lower[0].set_ylabel("loss with memory minus that\nof the control, paired")
    add_legend(figure, [name for name in COLORS if name in names], runs)
    return titled(figure, results, "loss by segment, with 95% intervals over documents")


def panels(count: int, width: float = 5.2) -> "tuple[Figure, Sequence[Axes]]":
    """Panels side by side."""
    figure, (all_axes,) = grid_of_panels(1, count, width, 4.6)
    return figure, all_axes


def panels_in_two_rows(count: int) -> "tuple[Figure, Sequence[Axes], Sequence[Axes]]":
    figure, (upper, lower) = grid_of_panels(2, count, 5.2, 3.6)
    return figure, upper, lower


def grid_of_panels(rows: int, columns: int, width: float, height: float) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, width * columns), height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row")
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def draw_line(
    axes: "Axes",
    places: Sequence[float],
    scores: Sequence[dict[str, Any]],
    name: str,
    seed: int,
    color: Any = None,
    band: bool = True,
) -> None:
    """A line with the marker of its seed, and a band for its intervals."""
    color, main = color or COLORS[name], color is not None or name == MEMORY
    bounded = [(x, s["low"], s["high"]) for x, s in zip(places, scores, strict=True) if s["low"] is not None]
    if bounded and band:
        axes.fill_between(*zip(*bounded, strict=True), color=color, alpha=0.13, lw=0)
    axes.plot(
        places,
        [score["mean"] for score in scores],
        marker=MARKERS[seed % len(MARKERS)],
        color=color,
        lw=2.2 if main else 1.2,
        ms=5 if main else 3.5,
        label=name,
        zorder=3 if main else 2,
    )


def add_legend(figure: "Figure", names: Sequence[str], runs: Sequence[Run]) -> None:
    """Colors of the controls and markers of the seeds, beside the panels and what is written at their borders."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLORS[name], lw=2.2 if name == MEMORY else 1.2, label=name) for name in names]
    if len(runs) > 1:
        for number, run in enumerate(runs):
            marker = MARKERS[number % len(MARKERS)]
            handles.append(Line2D([], [], color=GRAY, marker=marker, ms=5, lw=0, label=seed_name(run)))
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside right center")


def seed_name(run: Run) -> str:
    return run["checkpoint"] if run["seed"] is None else f"seed {run['seed']}"


def titled(figure: "Figure", results: dict[str, Any], what: str) -> "Figure":
    task = results["task"]
    kind = task["options"].get("task")  # of BABILong
    if task["name"] == "associative_retrieval":
        kind = "rewrite" if task["options"].get("rewrite") else "remember"
    name = task["name"].replace("_", " ") + (f" {kind}" if kind else "")
    figure.suptitle(f"{name}: {what}", fontsize=11)
    return figure
