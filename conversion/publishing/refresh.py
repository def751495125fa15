"""`armt refresh`: this version's code in a checkpoint that came with another's; its weights stay as they are."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from ...configuration_armt import ARMTConfig
from ...modeling_armt import AUTO_MAP
from ...version_armt import code_files, code_version
from ..files import remove, staged
from ..hub_names import check_exists
from .folders import FolderError, read_config, read_json
from .hub import Repository
from .releases import is_ours
from .visits import VisitError, agree, visit


TAG = re.compile(r"\barmt-[0-9a-f]{12}\b")  # of a commit, as cards pin it


@dataclass(frozen=True)
class Refreshment:
    """
    What was done.

    Attributes:
        before, after: versions of the code; equal where nothing had to be done.
        commit: its id on the Hub, if there is one.
    """

    before: str
    after: str
    commit: str | None = None


def refresh(checkpoint: str | Path, force: bool = False) -> Refreshment:
    """
    Puts the installed code into a checkpoint. Before anything changes a fresh process without this package loads it
    with that code, and must find the logits that the code before gives, if that still runs.

    Args:
        checkpoint: folder, which is replaced as a whole, or Hub id, which gets one commit on `main`.
        force: also where somebody has changed the code, or where the code before gives other logits.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FolderError: if it is an adapter, or no ARMT checkpoint, or its code is none of ours.
        HubError: for what the Hub refuses; the repository is as it was.
        VisitError: if it does not load with the new code, or is another model with it.
    """
    name = str(checkpoint)
    folder, before = Path(name).resolve(), Path(name).resolve().with_name(f".{Path(name).resolve().name}.before")
    if before.is_dir():  # a run was killed while it exchanged the two
        remove(before) if folder.exists() else before.rename(folder)
    check_exists(name, "checkpoint")
    return _refresh_folder(folder, before, force) if folder.exists() else _refresh_repository(name, force)


def _refresh_folder(folder: Path, before: Path, force: bool) -> Refreshment:
    config, version = check(folder, str(folder), force), version_in(folder)
    if is_fresh(folder):
        return Refreshment(version, version)
    if Path.cwd().is_relative_to(folder):
        raise FolderError(f"{folder} is going to be replaced as a whole, and you are in it: change to another folder.")
    with staged(folder, folder=True) as new:
        # Linked, so that weights take neither time nor space.
        shutil.copytree(folder, new, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        put_code(new)
        compare(folder, new, config, force)
        folder.rename(before)
        try:
            new.rename(folder)
        except BaseException:
            before.rename(folder)
            raise
    remove(before)
    return Refreshment(version, code_version())


def _refresh_repository(name: str, force: bool) -> Refreshment:
    target = Repository(name)
    with target.errors():
        parent = target.api.repo_info(name, revision=target.branch).sha
        folder = Path(snapshot_download(name, revision=parent, allow_patterns=["*.json", "*.py", "README.md"]))
    config, version = check(folder, name, force), version_in(folder)
    if is_fresh(folder):
        return Refreshment(version, version)
    target.check(config, None)
    with target.errors():
        snapshot_download(name, revision=parent)
        tags = [ref.name for ref in target.api.list_repo_refs(name).tags]
    with tempfile.TemporaryDirectory(prefix="armt-refresh-") as work:
        new = Path(work)
        shutil.copytree(folder, new, copy_function=_symbolic_link, dirs_exist_ok=True)
        put_code(new)
        tag = pin_card(new / "README.md", tags)
        expected = compare(folder, new, config, force)
        paths = {path.name: path for path in new.iterdir() if path.is_file() and not path.is_symlink()}
        gone = sorted({path.name for path in folder.iterdir()} - {path.name for path in new.iterdir()})
        commit = target.commit_files(paths, gone, f"Code of version {code_version()}", parent, tag)
    if not agree(visit(name, config, adapter=False, revision=commit, fresh_cache=True), expected):
        raise VisitError(f"{name} at {commit} has the new code, but gives other logits than before it was uploaded.")
    return Refreshment(version, code_version(), commit)


def check(folder: Path, name: str, force: bool) -> ARMTConfig:
    """The configuration of a checkpoint, if its code may be replaced; see [`refresh`]."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        fields = read_json(folder / "adapter_config.json")
        base, revision = fields.get("base_model_name_or_path"), fields.get("revision")
        pinned = f", and publish the adapter again: it pins the base at {revision}" if revision else ""
        raise FolderError(
            f"{name} is an adapter, which has no code: it runs that of its base. Refresh that: armt refresh "
            f"{base}{pinned}."
        )
    if not (folder / "config.json").is_file():
        raise FolderError(f"{name} has no config.json: it is not a checkpoint.")
    config = read_config(folder)
    auto_map = getattr(config, "auto_map", None) or {}
    changed = any(auto_map.get(key, value) != value for key, value in AUTO_MAP.items())
    version = version_in(folder)
    if not force and (changed or not (version == "none" or is_ours(version))):
        raise FolderError(
            f"the code in {name} ({version}) equals no released version of ours: somebody has changed it, and that "
            "would be lost. To replace it all the same: --force"
        )
    return config


def version_in(folder: Path) -> str:
    """The version of the code in a folder; `none` if it has none."""
    return "none" if not any(folder.glob("modeling_armt.py")) else code_version(folder)


def is_fresh(folder: Path) -> bool:
    """Whether a checkpoint has this code, and its configuration says so."""
    fields = read_json(folder / "config.json")
    named = (fields.get("auto_map") or {}).items() >= AUTO_MAP.items()
    return named and version_in(folder) == fields.get("code_version") == code_version()


def put_code(folder: Path) -> None:
    """Replaces the code in a folder of links, and what the configuration says of it."""
    try:
        old = code_files(folder)
    except FileNotFoundError:  # incomplete
        old = []
    for path in old:
        path.unlink()
    for path in code_files():
        (folder / path.name).unlink(missing_ok=True)
        shutil.copyfile(path, folder / path.name)
    fields = read_json(folder / "config.json")
    fields |= {"auto_map": (fields.get("auto_map") or {}) | AUTO_MAP, "code_version": code_version()}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pin_card(card: Path, tags: list[str]) -> str | None:
    """Makes a card that pins one of its repository's tags pin the commit to come; returns the tag for that."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    pinned = next((tag for tag in TAG.findall(text) if tag in tags), None)
    if pinned is None:
        return None
    tag = f"armt-{hashlib.sha256(f'{pinned} {code_version()}'.encode()).hexdigest()[:12]}"
    card.unlink()
    card.write_text(text.replace(pinned, tag), encoding="utf-8")
    return tag


def compare(old: Path, new: Path, config: ARMTConfig, force: bool) -> torch.Tensor:
    """`(1, T, vocabulary)` logits of a checkpoint with its new code, held against those with its old code."""
    logits = visit(new, config, adapter=False)
    if not agree(logits, logits):
        raise VisitError(f"the logits of {old} with the new code are not all finite; nothing was changed.")
    try:
        before = visit(old, config, adapter=False)
    except VisitError:  # what refresh is for
        return logits
    if not force and not agree(logits, before):
        raise VisitError(
            f"{old} gives other logits with this version of the code than with its own; nothing was changed. To "
            "replace the code all the same: --force"
        )
    return logits


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _symbolic_link(source: str, target: str) -> None:
    os.symlink(Path(source).resolve(), target)
