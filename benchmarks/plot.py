"""Draws what the other commands measured: one figure to read at a glance, and one each for decoding and training."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402

from .results import RESULTS  # noqa: E402


LABELS = {
    "ours": "ARMT",
    "ours-eager": "ARMT, eager",
    "ours-sequential": "ARMT, sequential",
    "ours-sequential-eager": "ARMT, sequential, eager",
    "ours-steady": "ARMT, inside a segment",
    "ours-generate": "ARMT, generate",
    "full-attention": "full attention",
    "full-attention-flash": "full attention (flash)",
    "full-attention-cudnn": "(cuDNN)",
    "full-attention-static": "full attention, static cache",
    "full-attention-compiled": "full attention, compiled",
    "gated-deltanet": "Gated DeltaNet",
}
COLORS = {"ours": "#0b6e4f", "full-attention": "#c2410c", "gated-deltanet": "#4361ae"}


def color_of(name: str) -> str:
    return next((color for start, color in COLORS.items() if name.startswith(start)), "#555555")


def load(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def hardware(content: dict[str, Any]) -> str:
    environment = content["environment"]
    return f"{environment['device']}, torch {environment['torch']}, {content['settings']['shape']}"


def curve(rows: Iterable[dict[str, Any]], name: str, field: str) -> list[tuple[int, float]]:
    """The best value at each length."""
    best: dict[int, float] = {}
    for row in rows:
        if row["name"] == name and row.get(field) is not None:
            best[row["tokens"]] = min(row[field], best.get(row["tokens"], float("inf")))
    return sorted(best.items())


def short_count(count: float, _=None) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= size:
            return f"{count / size:g}{unit}" if count % size == 0 else f"{count / size:.1f}{unit}"
    return f"{count:g}"


def draw_curves(axes: Axes, rows: list[dict[str, Any]], field: str, names: Iterable[str]) -> None:
    """Lines that carry their names at their ends, moved apart where they would meet."""
    ends = []
    for name in names:
        points = curve(rows, name, field)
        if points:
            thick = name == "ours"
            axes.plot(*zip(*points, strict=True), "-o", color=color_of(name), lw=2.6 if thick else 1.6, ms=5)
            ends.append((*points[-1], name))
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_locator(NullLocator())
    lengths = sorted({row["tokens"] for row in rows if row["name"] in names and row.get(field) is not None})
    axes.set_xticks(lengths, [short_count(length) for length in lengths])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.05)
    values = [row[field] for row in rows if row["name"] in names and row.get(field)]
    if values:  # a small range must not look like a large one
        axes.set_ylim(min(values) / 2, max(values) * 2)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.canvas.draw()
    taken: list[tuple[float, float]] = []
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        across, up = axes.transData.transform((x, y))
        place = up
        for other_across, other in taken:
            if abs(across - other_across) < 150 and place < other + 19:
                place = other + 19
        taken.append((across, place))
        axes.annotate(
            LABELS[name],
            (x, y),
            xytext=(8, (place - up) * 72 / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            color=color_of(name),
            fontweight="bold" if name == "ours" else "normal",
            annotation_clip=False,
        )


def by_kernel(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of full attention, named by the attention kernel: a line of several would bend where they meet."""
    of_full = [row for row in rows if row["name"] == "full-attention"]
    return [{**row, "name": f"full-attention-{row.get('backend', 'flash')}"} for row in of_full]


def plot_lengths(folder: Path, out: Path) -> Path | None:
    """Seconds and GiB against tokens."""
    prefill, memory = load(folder, "prefill"), load(folder, "memory")
    content = prefill or memory
    if content is None:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    figure.subplots_adjust(left=0.06, right=0.88, wspace=0.42, bottom=0.13, top=0.86)
    rows = content["rows"]
    measured = {row["name"] for row in rows}
    others = load(folder, "prefill-alternatives") or {"rows": []}
    rows = rows + [row for row in others["rows"] if row["name"] not in measured]
    everything = rows + (memory["rows"] if memory else [])
    timed = [*(row for row in everything if row["name"] != "full-attention"), *by_kernel(everything)]
    draw_curves(left, timed, "median_s", ["ours", "full-attention-flash", "full-attention-cudnn", "gated-deltanet"])
    floor = sorted({(row["tokens"], row["floor_s"]) for row in rows if "floor_s" in row and row["name"] == "ours"})
    if floor:
        left.set_ylim(bottom=min(left.get_ylim()[0], floor[0][1] / 2))
        left.plot(*zip(*floor, strict=True), "--", color="#888888", lw=1.2, zorder=0)
        left.annotate(
            "arithmetic floor", floor[0], xytext=(6, -11), textcoords="offset points", color="#777777", fontsize=9
        )
    draw_curves(right, everything, "peak_gib", ["ours", "full-attention", "gated-deltanet"])
    left.set(title="Time to read a text", xlabel="tokens", ylabel="seconds")
    right.set(title="Peak memory", xlabel="tokens", ylabel="GiB, weights included")
    figure.suptitle(hardware(content), fontsize=11, color="#333333", y=0.985)
    return save(figure, out / "lengths.png")


def plot_bars(content: dict[str, Any] | None, title: str, group: str, note: str, path: Path) -> Path | None:
    """Tokens per second, a panel for each value of `group`, with another field written beside each bar."""
    rows = [row for row in (content or {"rows": []})["rows"] if "tokens_per_s" in row]
    if not rows:
        return None
    groups = sorted({row[group] for row in rows})
    figure, panels = plt.subplots(1, len(groups), figsize=(5.6 * len(groups), 3.4), squeeze=False)
    for axes, value in zip(panels[0], groups, strict=True):
        shown = [row for row in rows if row[group] == value][::-1]
        bars = axes.barh(
            [LABELS[row["name"]] for row in shown],
            [row["tokens_per_s"] for row in shown],
            color=[color_of(row["name"]) for row in shown],
        )
        notes = [f"{row['tokens_per_s']:,.0f}   {note.format(**row)}" for row in shown]
        axes.bar_label(bars, notes, padding=4, fontsize=9)
        axes.margins(x=0.85)
        axes.set(title=f"{group} {value}" if not isinstance(value, bool) else f"{group} {'on' if value else 'off'}")
        axes.set_xlabel("tokens per second")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        axes.xaxis.set_major_locator(plt.MaxNLocator(4))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: {hardware(content)}", fontsize=10, color="#555555")
    figure.tight_layout()
    return save(figure, path)


def save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON files")
    parser.add_argument("--out", type=Path, help="folder for the figures; default: that of the results")
    args = parser.parse_args(argv)
    out = args.out or args.results
    out.mkdir(parents=True, exist_ok=True)
    training = load(args.results, "training")
    if training:  # one batch size: the largest
        largest = max(row["batch"] for row in training["rows"])
        training["rows"] = [row for row in training["rows"] if row["batch"] == largest]
    decode = load(args.results, "decode")
    paths = [
        plot_lengths(args.results, out),
        plot_bars(decode, "Decoding", "batch", "{bandwidth_share:.0%} of bandwidth", out / "decode.png"),
        plot_bars(training, "Training step", "checkpointing", "{peak_gib:.1f} GiB", out / "training.png"),
    ]
    paths = [path for path in paths if path is not None]
    if not paths:
        parser.error(f"there are no results in {args.results}")
    for path in paths:
        print(path)
    return paths


if __name__ == "__main__":
    main()
