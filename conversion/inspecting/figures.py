"""The figures of the page, as SVG."""

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


WITH, WITHOUT, GRAY = "#0b6e4f", "#c2410c", "#777777"
MOST_POINTS = 400
"""Segments that a line has points for; in longer texts a point is the mean of neighbours."""

Places = Sequence[float] | np.ndarray


def loss_figure(loss: np.ndarray, alone: np.ndarray, segment_size: int) -> str:
    """Loss by segment, and by place in the segment, of `(T - 1,)` losses with memory and without."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    for values, color, name in ((alone, WITHOUT, "each segment alone"), (loss, WITH, "with memory")):
        by_segment = [values[i : i + segment_size].mean() for i in range(0, len(values), segment_size)]
        draw_line(left, by_segment, color, name)
        rest = values[segment_size:]  # the first segment has no memory
        places = np.arange(len(rest)) % segment_size
        sums, counts = (np.bincount(places, weights, segment_size) for weights in (rest, None))
        met = counts > 0
        draw_line(right, sums[met] / counts[met], color, name)
    label(left, "segment", "loss, nats a token")
    label(right, "place in the segment (from segment 2 on)", "")
    left.legend(frameon=False)
    return svg(figure)


def growth_figure(norms: dict[str, dict[int, Places]]) -> str:
    """Norms after each segment by what they are the norm of (a panel each) and by layer (a line each)."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    layers = sorted(next(iter(norms.values())))
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    for axes, (name, by_layer) in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms.items(), strict=True):
        for layer, color in zip(layers, colors, strict=True):
            draw_line(axes, by_layer[layer], color, f"layer {layer}")
        label(axes, "segment", name)
        axes.set_ylim(bottom=0)
    step = max(1, -(-len(layers) // 8))  # a legend of 8 tells which color is which
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::step], names[::step], frameon=False, loc="outside right center")
    return svg(figure)


def gamma_figure(gamma: dict[int, Places]) -> str:
    """Mean gamma by layer (rows) and segment (columns)."""
    layers = sorted(gamma)
    figure = Figure(figsize=(10, 0.9 + 0.22 * len(layers)), layout="constrained")
    axes = figure.subplots()
    values = np.array([thinned(gamma[layer])[1] for layer in layers])
    last = len(gamma[layers[0]])
    image = axes.imshow(
        values, aspect="auto", cmap="magma", vmin=0, vmax=1, extent=(0.5, last + 0.5, len(layers) - 0.5, -0.5)
    )
    axes.set_yticks(range(len(layers)), layers) if len(layers) <= 40 else None
    label(axes, "segment written", "layer")
    axes.grid(False)
    figure.colorbar(image, ax=axes, label="mean gamma", fraction=0.03, pad=0.01)
    return svg(figure)


def weights_figure(weights: dict[int, np.ndarray], group: int) -> str:
    """Weight of each written segment (columns) for each reading segment (rows), a panel a layer."""
    size = max(2.6, 10 / max(len(weights), 2))
    figure = Figure(figsize=(10, size), layout="constrained")
    limit = scale_of(np.concatenate([values.ravel() for values in weights.values()]))
    for axes, (layer, values) in zip(figure.subplots(1, len(weights), squeeze=False)[0], weights.items(), strict=True):
        rows, columns = values.shape
        extent = (0.5, columns * group + 0.5, rows * group + 0.5, 0.5)
        image = axes.imshow(
            values, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, aspect="auto", interpolation="nearest"
        )
        axes.set_facecolor("#e8e8e8")
        label(axes, "segment written", "segment that reads")
        axes.set_title(f"layer {layer}", fontsize=10)
        axes.grid(False)
    figure.colorbar(image, ax=figure.axes, label="weight", fraction=0.03, pad=0.01, extend="both")
    return svg(figure)


def scale_of(weights: np.ndarray) -> float:
    """Where the colors of weights end: what all but 1% of those that are not 0 stay below."""
    sizes = np.abs(weights[np.isfinite(weights) & (weights != 0)])
    return float(np.quantile(sizes, 0.99)) if len(sizes) else 1.0


def draw_line(axes: Axes, values: Places, color, name: str) -> None:
    axes.plot(*thinned(values), color=color, label=name, linewidth=1.6, marker="." if len(values) <= 40 else None)


def thinned(values: Places) -> tuple[np.ndarray, np.ndarray]:
    """Places from 1 on and values, as means of neighbours if there are more than `MOST_POINTS`."""
    values, width = np.asarray(values, dtype=float), -(-len(values) // MOST_POINTS)
    starts = np.arange(0, len(values), width)
    ends = np.minimum(starts + width, len(values))
    return (starts + 1 + ends) / 2, np.add.reduceat(values, starts) / (ends - starts)


def label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))  # segments and places are whole
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def svg(figure: Figure) -> str:
    """The figure as a data URI, which a page can hold."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "armt", "font.size": 9}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()
