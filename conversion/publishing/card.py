"""The model card: facts of a checkpoint in the words of the template in `model_cards/`."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import TemplateError
from markupsafe import Markup

from ...model_cards import TEMPLATE
from ..files import write_whole
from . import tables
from .facts import Facts, describe_task, gather, name_license, title
from .folders import inspect_folder
from .markdown import environment
from .records import as_yaml, measured, without_defaults
from .results import SEEDS
from .tables import number


EXPLANATIONS = {
    "memory": "the model as it is.",
    "memory off": "nothing is carried from segment to segment, so that it sees the last segment only.",
    "memory swapped": "the memory of another sample in place of its own: what stays above chance is guessing.",
    "fact deleted": "the fact that the question asks for is not in the text.",
    "backbone": "the backbone without any memory, reading the whole text at once where that fits its context.",
    "carried tokens": "the last tokens of the text before, as many as there are memory tokens, in place of a memory.",
    "full attention": "the backbone without any memory, reading the whole text at once.",
}


# Of a stage of the curriculum: what it asked for, and what came out.
STAGE = ("segments", "pairs", "length", "segment_size", "until", "steps", "score", "loss", "seconds")

# The last line of a card, by which it is known again as long as nobody has changed it.
SIGNATURE = "\n<!-- Written by armt card: {} -->\n"


class CardError(ValueError):
    """A card that cannot be written, with what is missing."""


def render_card(facts: Facts, template: Path = TEMPLATE) -> str:
    """
    Writes the card of a checkpoint.

    Args:
        facts: see [`gather`].
        template: Jinja template.

    Returns:
        Markdown with its YAML metadata.

    Raises:
        CardError: if the template asks for what there is not, or what comes out is no card.
    """
    try:
        text = environment().from_string(Path(template).read_text(encoding="utf-8")).render(fields(facts))
    except TemplateError as error:
        raise CardError(f"the card's template {template} cannot be filled: {error}.") from error
    try:
        metadata = ModelCard(text).data
    except ValueError as error:
        raise CardError(f"the card's metadata is not valid: {error}") from error
    if metadata.license is None:
        raise CardError(f"the card's template {template} wrote no metadata.")
    return sign(text)


def sign(text: str) -> str:
    return text + SIGNATURE.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def is_signed(card: str) -> bool:
    """Whether a card is as [`render_card`] wrote it."""
    text, separator, _ = card.rpartition(SIGNATURE.partition("{")[0])
    return bool(separator) and sign(text) == card


def fields(facts: Facts) -> dict[str, Any]:
    """What a template can use."""
    config, training, results = facts.checkpoint.config, facts.training or {}, facts.results
    adapter = facts.checkpoint.adapter is not None
    backbone = config.text_config
    layers = config.memory_layer_indices
    everywhere = len(layers) == backbone.num_hidden_layers
    shape = {
        "backbone": f"{backbone.model_type}, {backbone.num_hidden_layers} layers of width {backbone.hidden_size}, "
        f"vocabulary of {number(backbone.vocab_size)}",
        "tokens in a segment": number(config.segment_size),
        "memory tokens": number(config.num_mem_tokens) + (", spread" if config.spread_memory_tokens else ""),
        "layers with memory": "all" if everywhere else ", ".join(map(str, layers)),
        "width of memory queries and keys (d_mem)": number(config.d_mem),
        "feature map": f"DPFP, nu = {config.dpfp_nu}, {'' if config.normalize_features else 'not '}normalised",
        "correction of the denominator": "on" if config.correction else "off",
        "guard of writes": "on" if config.write_guard else "off",
    }
    if config.memory_norm:
        shape |= {"inputs of the memory": "RMS-normalised, with weight and bias"}
    if config.spread_memory_tokens:
        shape |= {"positions of memory tokens": "spread over their segment"}
    if config.memory_norm:
        shape |= {"norms of the memory": "on"}
    if adapter:
        lora = facts.checkpoint.adapter
        shape |= {"LoRA": f"r = {lora.r}, alpha = {lora.lora_alpha}"}
    folder = facts.checkpoint.folder
    recipe = training.get("recipe")
    found = {
        "name": facts.name,
        "metadata": Markup(facts.metadata().to_yaml()),
        "adapter": adapter,
        "base": facts.base,
        "base_revision": facts.base_revision,
        "origin": facts.origin.get("name"),
        "license": name_license(facts.license),
        "license_of_origin": name_license(facts.origin) if facts.origin.get("license") else None,
        "config": config,
        "address": facts.repository or folder.resolve().name,
        "tag": facts.tag,
        "tokenizer": facts.checkpoint.tokenizer,
        "shape": shape,
        "training": facts.training,
        "untrained": facts.untrained,
        "training_summary": summarize(training),
        "task_description": facts.task and describe_task(facts.task),
        "stages": [
            {key.replace("_", " "): plain(stage[key]) for key in STAGE if stage.get(key) is not None}
            for stage in training.get("stages", [])
        ],
        "recipe": as_yaml(without_defaults(recipe)) if recipe else None,
        "results": results,
        "seed": training.get("seed"),
        "explanations": EXPLANATIONS,
        "plots": {path.name: path.stem.replace("_", " ") for path in facts.plots},
        "page": facts.page.name if facts.page is not None else None,
    }
    return found | result_fields(facts)


def result_fields(facts: Facts) -> dict[str, Any]:
    """Of the evaluation; empty tables where there is none."""
    names = ("scores", "losses", "gains", "capacities", "baselines", "speed")
    results = facts.results
    if results is None:
        return dict.fromkeys((*names, "health"), [])
    task = results["task"]
    found = {name: getattr(tables, name)(results) for name in names}
    shown = {column for row in [*found["scores"], *found["losses"]] for column in row}
    length, health = tables.health(facts.own_run)
    seeds = {run["seed"] for run in results["runs"]} - {None}
    return found | {
        "results_title": title(task),
        "results_description": describe_task(task["name"]),
        "conditions": [name for name in EXPLANATIONS if name in shown],
        "options": as_yaml(task["options"]) if task.get("options") else None,
        "backgrounds": tables.backgrounds(results),
        "one_seed": len(results["runs"]) == 1,
        "few_seeds": len(seeds) < SEEDS,
        "health": health,
        "health_length": length,
        "measured": measured(results),
    }


def summarize(training: dict[str, Any]) -> dict[str, str]:
    """What stands alone in `training.json`: seed, steps, tokens, speed, device, versions, date."""
    alone = {key: plain(value) for key, value in training.items() if isinstance(value, (str, int, float))}
    alone.pop("command", None)  # the recipe says it without the folders of somebody's machine
    if training.get("versions"):
        alone["versions"] = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    names = {"tokens_per_s": "tokens/s", "peak_gib": "peak GiB"}
    return {names.get(key, key.replace("_", " ")): value for key, value in alone.items()}


def plain(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def card_of(
    folder: str | Path, results: str | Path | None = None, base: str | None = None, license: str | None = None
) -> str:
    """
    The card of a folder, as [`publish`] would write it, without a repository.

    Args:
        folder, results, base, license: see [`publish`].

    Raises:
        FolderError, ResultsError, CardError: if there is something that a card cannot do without.
    """
    base, _, revision = (base or "").partition("@")
    checkpoint = inspect_folder(folder)
    if checkpoint.adapter is not None and not base and not Path(checkpoint.adapter.base_model_name_or_path).exists():
        base, revision = checkpoint.adapter.base_model_name_or_path, checkpoint.adapter.revision
    where = None if results is None else Path(results)
    facts = gather(checkpoint, base=base or None, base_revision=revision or None, license=license, results=where)
    return render_card(facts)


def write_card(card: str, path: Path) -> None:
    """
    Writes a card as a whole or not at all.

    Raises:
        CardError: if there is no folder for it, or something else than a card as `armt card` wrote it in its place.
    """
    if path.is_dir():
        raise CardError(f"{path} is a folder. Name the file to write, such as {path / 'README.md'}.")
    if not path.absolute().parent.is_dir():
        raise CardError(f"there is no folder {path.parent} to write the card in.")
    if path.exists() and not is_signed(path.read_text(encoding="utf-8", errors="replace")):
        raise CardError(
            f"{path} was not written by `armt card`, or was changed since, and stays as it is. Name another file, or "
            "remove it."
        )
    write_whole(path, card)
