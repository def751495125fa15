"""`armt inspect`: one HTML file, with everything in it, that shows what a memory does on a text."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from ...modeling_armt import ARMTForCausalLM
from ..checkpoints import armt_model, load_checkpoint
from ..evaluation.subject import hash_weights
from ..files import write_whole
from .numbers import numbers, read_numbers
from .record import Record, record


LAYERS_SHOWN, TOKENS_SHOWN, LEANS_SHOWN = 3, 32, 3
SNIPPET = 160  # characters
HEALTH = {
    "A_norm": "|A|",
    "A_growth": "doublings of |A| per 1,000 segments",
    "mean_gamma": "mean gamma",
    "zero_gamma_share": "share of gammas 0",
    "lambda_max": "largest lambda",
    "lambda_last": "last lambda",
    "min_kz_ratio": "least k·z / |k|²",
    "min_qz": "least q·z",
    "max_read_ratio": "largest |read| / |x|",
}
HIGH = {"lambda_last": 2.0, "max_read_ratio": 1.0}


def inspect_text(
    checkpoint: str | Path,
    text: str,
    out: str | Path,
    layers: Sequence[int] | None = None,
    name: str = "a text",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Record:
    """
    Reads a text with a checkpoint and writes a page about what its memory did.

    Args:
        checkpoint: folder or Hub id of an ARMT checkpoint or an adapter on one, with a tokenizer.
        text: of more than one segment.
        out: the HTML file; a page that is there is replaced.
        layers: whose weights are shown; by default the ones whose reads are the largest beside what they are added to.
        name: what the page calls the text.
        progress: called with tokens read and tokens in all.

    Returns:
        What was seen.

    Raises:
        ValueError: for a checkpoint without tokenizer or matplotlib missing, a text that is not longer than a segment,
            layers without memory.
        FileNotFoundError, FileExistsError: if there is no folder for the page, or something else in its place.
    """
    out = Path(out)
    if out.is_dir():
        raise FileExistsError(f"{out} is a folder. Name the file to write, such as {out / 'inspect.html'}.")
    if out.exists():
        try:
            read_numbers(out)
        except ValueError as error:
            raise FileExistsError(f"{error} It stays as it is: name another file, or remove it.") from error
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write the page in.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the page is drawn with matplotlib, which is missing: pip install 'modeling-armt[plots]'")
    model, tokenizer = load_checkpoint(checkpoint)
    model = armt_model(model)
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer, so it cannot read a text. Put one beside the model.")
    known = model.config.memory_layer_indices
    layers = sorted(set(layers or ()))
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise ValueError(f"--layers names {unknown}; the layers with memory are {list(known)}.")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    done = 0

    def read(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, len(ids))

    found = record(model, ids, read)
    of = str(checkpoint).rstrip("/").rsplit("/")[-1]
    page = render(model, tokenizer, found, of, name, layers, hash_weights(checkpoint))
    write_whole(out, page)
    return found


def render(
    model: ARMTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    found: Record,
    checkpoint: str,
    text: str,
    layers: Sequence[int] | None = None,
    weights_hash: str | None = None,
) -> str:
    """
    The page as HTML; `checkpoint` and `text` are names, `weights_hash` tells the checkpoint apart from others of its
    name, the rest is as for [`inspect_text`].
    """
    from . import figures  # matplotlib is not everybody's

    shown = sorted(layers) if layers else strongest_layers(found)
    by_layer = found.layers
    norms = {"|A|": {layer: of.A_norm for layer, of in by_layer.items()}}
    has_z = all(of.z_norm for of in by_layer.values())
    if has_z:
        norms["|z|"] = {layer: of.z_norm for layer, of in by_layer.items()}
    gamma = {layer: of.gamma for layer, of in by_layer.items()}
    weights = {layer: by_layer[layer].weights.numpy() for layer in shown}
    loss, alone = found.loss.numpy(), found.loss_alone.numpy()
    words = Words(tokenizer, found)
    environment = Environment(autoescape=True)
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=f"What the memory of {checkpoint} does on {text}",
        facts=facts(model, found),
        lead=lead(loss[found.segment_size :].mean(), alone[found.segment_size :].mean()),
        untrained=not any(ratio(found, layer) > 0 for layer in by_layer),
        figures={
            "loss": figures.loss_figure(loss, alone, found.segment_size),
            "growth": figures.growth_figure(norms),
            "gamma": figures.gamma_figure(gamma),
            "weights": figures.weights_figure(weights, found.group),
        },
        has_z=has_z,
        health=health(found),
        group=found.group,
        written=found.segments,
        layers_shown=", ".join(map(str, shown)),
        tokens=tokens_table(found, words, max(shown, key=lambda layer: ratio(found, layer)), figures.scale_of),
        leans=[lean for layer in shown for lean in leans(found, words, layer)],
        foot=f"Made by armt inspect on {date.today().isoformat()}.",
        numbers=json.dumps({"weights": weights_hash, **numbers(found, shown)}),
    )


def ratio(found: Record, layer: int) -> float:
    """The largest |read| / |x| of a layer; 0 if it read nothing."""
    return found.stats[layer]["max_read_ratio"][0] or 0.0


def strongest_layers(found: Record) -> list[int]:
    """The layers whose reads are the largest beside what they are added to."""
    return sorted(sorted(found.layers, key=lambda layer: ratio(found, layer))[-LAYERS_SHOWN:])


def facts(model: ARMTForCausalLM, found: Record) -> dict[str, str]:
    config = model.config
    layers = len(config.memory_layer_indices)
    return {
        "backbone": config.text_config.model_type,
        "parameters": f"{model.num_parameters():,}",
        "layers with memory": f"{layers} of {config.text_config.num_hidden_layers}",
        "segment": f"{config.segment_size:,} tokens",
        "memory tokens": str(config.num_mem_tokens),
        "d_mem": str(config.d_mem),
        "text": f"{len(found.ids):,} tokens",
        "segments written": f"{found.segments:,}",
    }


def lead(loss: float, alone: float) -> str:
    """The page in one sentence."""
    verdict = "lower" if loss < alone else "higher"
    return (
        f"From the second segment on the loss is {loss:.3f} nats a token with memory and {alone:.3f} with each "
        f"segment alone: {abs(alone - loss):.3f} {verdict}."
    )


def health(found: Record) -> dict[str, Any]:
    """The table of [`ARMTCache.stats`], whose values are marked where they are out of the ordinary."""

    def cell(name: str, values: list | None) -> tuple[str, bool]:
        value = values[0] if values else None
        return ("–" if value is None else f"{value:.3g}"), value is not None and value > HIGH.get(name, np.inf)

    rows = [(layer, [cell(name, stats[name]) for name in HEALTH]) for layer, stats in sorted(found.stats.items())]
    return {"names": list(HEALTH.values()), "rows": rows}


class Words:
    """The text in pieces that can be read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, found: Record):
        self.tokenizer, self.ids, self.width = tokenizer, found.ids.tolist(), found.group * found.segment_size
        self.group, self.written = found.group, found.segments

    def token(self, place: int) -> str:
        return self.tokenizer.decode([self.ids[place]]).replace("\n", "⏎")

    def place(self, number: int) -> str:
        """What the group with this number is called."""
        first, last = number * self.group + 1, min((number + 1) * self.group, self.written)
        return f"segment {first}" if first == last else f"segments {first} to {last}"

    def snippet(self, number: int) -> str:
        """How the group with this number begins."""
        ids = self.ids[number * self.width : (number + 1) * self.width]
        text = " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())
        return text if len(text) <= SNIPPET else f"{text[:SNIPPET].rsplit(' ', 1)[0]} …"


def tokens_table(found: Record, words: Words, layer: int, scale_of: Callable[[np.ndarray], float]) -> dict[str, Any]:
    """The last tokens of the text, and the color of each written group's weight in one layer."""
    weights = found.layers[layer].last_weights[-TOKENS_SHOWN:].numpy()
    limit, start = scale_of(weights), len(found.ids) - len(weights)
    rows = []
    for number, row in enumerate(weights):
        cells = [(color(weight / limit), f"{words.place(n)}: {weight:.3g}") for n, weight in enumerate(row)]
        rows.append((words.token(start + number), cells))
    return {"layer": layer, "rows": rows}


def color(part: float) -> str:
    """Red for 1, white for 0, blue for -1."""
    part = max(-1.0, min(1.0, float(part)))
    strong = (178, 24, 43) if part > 0 else (33, 102, 172)
    return "#" + "".join(f"{round(255 + (channel - 255) * abs(part)):02x}" for channel in strong)


def leans(found: Record, words: Words, layer: int) -> list[dict[str, str]]:
    """The segments that the last token leans on most, in one layer."""
    weights = found.layers[layer].last_weights[-1].numpy()
    order = np.argsort(-np.abs(weights))[:LEANS_SHOWN]
    return [
        {"layer": layer, "place": words.place(n), "weight": f"{weights[n]:.2f}", "text": words.snippet(n)}
        for n in order.tolist()
    ]
