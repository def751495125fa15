"""What the figures of a page show, for programs: JSON in the page itself."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .record import Record


def numbers(found: Record, shown: Sequence[int]) -> dict[str, Any]:
    """What the figures show, for programs."""
    size = found.segment_size
    losses = {"memory": found.loss, "alone": found.loss_alone}

    def rounded(values: Sequence[float | None] | None) -> list | None:  # JSON has no nan and no infinity
        if values is None:
            return None
        return [None if value is None or not np.isfinite(value) else float(f"{value:.5g}") for value in values]

    layers = {
        str(layer): {"A_norm": rounded(of.A_norm), "z_norm": rounded(of.z_norm), "gamma": rounded(of.gamma)}
        for layer, of in found.layers.items()
    }
    for layer in shown:
        layers[str(layer)]["weights"] = [rounded(row) for row in found.layers[layer].weights.tolist()]
    return {
        "segments": found.segments,
        "segments_in_a_group": found.group,
        "loss_by_segment": {
            name: rounded([piece.mean().item() for piece in loss.split(size)]) for name, loss in losses.items()
        },
        "layers": layers,
        "stats": {
            str(layer): {name: rounded(values) for name, values in stats.items()}
            for layer, stats in found.stats.items()
        },
    }


def read_numbers(page: Path) -> dict[str, Any]:
    """
    What a page shows, for programs.

    Raises:
        ValueError: if it is not a page of `armt inspect`.
    """
    text = page.read_text(encoding="utf-8", errors="replace")
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, flags=re.S)
    try:
        content = json.loads(found[1]) if found else None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{page} is not a page of `armt inspect`.")
    return content
