"""What training and evaluation wrote down, as others may see it."""

import re
from pathlib import Path
from typing import Any

import yaml


# An absolute path in a command, quoted or not, alone or after `option=`.
PLACE = re.compile(r"""(?<![^\s'"=])(?:(?<=')/[^']+|(?<=")/[^"]+|/[^\s'"]+)""")


def without_places(values: Any) -> Any:
    """Values of a record, with files named but not the folders of somebody's machine."""
    if isinstance(values, dict):
        return {key: without_places(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_places(value) for value in values]
    if not isinstance(values, str):
        return values
    return Path(values).name if Path(values).is_absolute() else PLACE.sub(lambda place: Path(place[0]).name, values)


def without_defaults(values: Any) -> Any:
    """A recipe without what is None or empty, as every such field is by default."""
    if isinstance(values, dict):
        kept = {key: without_defaults(value) for key, value in values.items()}
        return {key: value for key, value in kept.items() if value not in (None, {}, [])}
    return [without_defaults(value) for value in values] if isinstance(values, list) else values


def as_yaml(values: Any) -> str:
    return yaml.safe_dump(without_places(values), sort_keys=False, allow_unicode=True, width=110).strip()


def measured(results: dict[str, Any]) -> str:
    """Where and when, of all lengths and what was added to them: `on NVIDIA H200, 2026-11-24`."""
    lengths = [entry for run in results["runs"] for entry in run["lengths"]]
    entries = [results["environment"] | part for entry in lengths for part in (entry, *entry.get("added", ()))]
    devices = dict.fromkeys(entry.get("device", "an unnamed device") for entry in entries)
    dates = sorted({str(entry["date"])[:10] for entry in entries if entry.get("date")})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "undated"
    return f"on {' and '.join(devices)}, {when}"
