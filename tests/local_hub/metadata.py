"""What the Hub checks of a card's metadata before it takes a README.md."""

import re
from typing import Any

import yaml


# Not all that the Hub knows: those of the backbones that the tests use, and their neighbours.
LICENSES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "gemma",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "other",
    "unknown",
}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
MODEL_ID = r"[\w.-]+/[\w.-]+"


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card."""
    match = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, flags=re.S)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    return list(_errors(data)), []


def _errors(data: dict[str, Any]):
    if data.get("license") not in {None, *LICENSES}:
        yield f'"license" must be one of {sorted(LICENSES)}'
    if data.get("license") == "other" and not data.get("license_name"):
        yield '"license_name" is required if "license" is "other"'
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not isinstance(base, str) or not re.fullmatch(MODEL_ID, base):
            yield f'"base_model" must be a model id, not {base!r}'
    if data.get("base_model_relation") not in {None, *RELATIONS}:
        yield f'"base_model_relation" must be one of {sorted(RELATIONS)}'
    for name in ("tags", "datasets"):
        values = data.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            yield f'"{name}" must be a list of texts'
    for name in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            yield f'"{name}" must be a text'
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            yield '"model-index" needs a name and results'
            continue
        for number, result in enumerate(model["results"]):
            where = f'"model-index[0].results[{number}]'
            if not isinstance(result.get("task", {}).get("type"), str):
                yield f'{where}.task.type" is required'
            if not all(isinstance(result.get("dataset", {}).get(name), str) for name in ("name", "type")):
                yield f'{where}.dataset" needs a name and a type'
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    yield f'{where}.metrics" needs a type and a value'
