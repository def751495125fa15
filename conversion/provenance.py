"""Where a checkpoint's backbone came from, recorded in its configuration so that a card can say it."""

from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK


LICENSE_FIELDS = ("license", "license_name", "license_link")


def describe_backbone(backbone: str | Path) -> dict[str, Any]:
    """
    Name and licence of a backbone, as far as they are known.

    Args:
        backbone: folder or Hub id.

    Returns:
        `name`, the Hub id or the folder's name (never the place on this machine), and of `license`, `license_name` and
        `license_link` what the backbone's own card says; a licence may be a list.
    """
    card = Path(backbone) / "README.md"
    if Path(backbone).is_dir():
        name = Path(backbone).resolve().name
    else:
        name = str(backbone)
        try:
            card = Path(hf_hub_download(name, "README.md"))
        except (OSError, ValueError):  # no card, or no Hub
            return {"name": name}
    metadata = read_metadata(card)
    found = {field: metadata[field] for field in LICENSE_FIELDS if metadata.get(field)}
    terms = {field: value if isinstance(value, list) else str(value) for field, value in found.items()}
    if "license_link" in terms and not Path(backbone).is_dir():  # from where the card stands, to anywhere
        terms["license_link"] = urljoin(f"https://huggingface.co/{name}/blob/main/", terms["license_link"])
    return {"name": name, **terms}


def read_metadata(card: Path) -> dict[str, Any]:
    """The YAML metadata of a model card; empty where there is none, or none that can be read."""
    if not card.is_file():
        return {}
    try:
        match = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8"))
        metadata = yaml.safe_load(match[2]) if match else None
    except (UnicodeDecodeError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
