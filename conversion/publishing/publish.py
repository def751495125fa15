"""`armt publish`: one prepared folder, one commit, and the proof that a stranger gets the same model."""

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from huggingface_hub import HfApi, eval_result_entries_to_yaml

from .card import render_card
from .facts import UNKNOWN, Facts, gather
from .folders import PAGE, Checkpoint, FolderError, inspect_folder, read_json
from .hub import HubError, Repository
from .records import without_places
from .shards import MOST_BYTES, WEIGHTS, shard
from .visits import VisitError, agree, visit


@dataclass(frozen=True)
class Publication:
    """
    What was, or would be, published.

    Attributes:
        files: sizes in bytes by path in the repository.
        left: paths of the folder that stay here.
        commit: its id; None if nothing was uploaded.
        tag: of the commit.
    """

    files: dict[str, int]
    left: list[str]
    commit: str | None
    tag: str


def publish(
    folder: str | Path,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    base: str | None = None,
    license: str | None = None,
    results: str | Path | None = None,
) -> Publication:
    """
    Puts a checkpoint or an adapter on the Hub in one commit. Before the upload and after it, a fresh process without
    this package loads the model, and both must find the same logits. The folder is only read.

    Args:
        folder: of an ARMT checkpoint, or of a PEFT adapter on one.
        repository: `user/name`, made if it does not exist.
        private: whether it is private if it is made.
        revision: branch to commit to, by default `main`; made if it does not exist.
        dry_run: check and prepare everything, and upload nothing.
        base: Hub id of the backbone, where the checkpoint does not know it; for an adapter the Hub id of its ARMT
            base, `user/name` or `user/name@revision`.
        license: of the backbone, where nobody knows it, or in place of what its own card says.
        results: folder of `armt evaluate`, by default the checkpoint's own.

    Returns:
        What was published.

    Raises:
        FolderError, ResultsError, CardError: for what cannot be published; the Hub is as it was.
        HubError: for what the Hub refuses, and connections that drop; the repository is as it was.
        VisitError: if a stranger cannot load the model, or gets another one.
    """
    checkpoint = inspect_folder(folder)
    target = Repository(repository, revision, private)
    base, base_revision = find_base(checkpoint, base)
    if not dry_run:
        target.check(checkpoint.config, base if checkpoint.adapter is not None else None)
    tag = content_tag(checkpoint, base, base_revision)
    facts = gather(
        checkpoint, repository, tag, base, base_revision, license, None if results is None else Path(results)
    )
    if license is None and facts.license["license"] == UNKNOWN:
        raise FolderError(
            f"the licence of the backbone of {checkpoint.folder} is not known. Name it with --license, as the Hub "
            "writes it, such as apache-2.0."
        )
    with tempfile.TemporaryDirectory(prefix="armt-publish-") as work:
        prepared = Path(work)
        prepare(facts, prepared)
        files = {str(p.relative_to(prepared)): p.stat().st_size for p in sorted(prepared.rglob("*")) if p.is_file()}
        publication = Publication(files, checkpoint.left, None, tag)
        if dry_run:
            return publication
        adapter = checkpoint.adapter is not None
        expected = visit(prepared, checkpoint.config, adapter)
        if not agree(expected, expected):
            raise VisitError(f"the logits of {checkpoint.folder} are not all finite; nothing was uploaded.")
        if adapter and base != checkpoint.adapter.base_model_name_or_path:
            trained = visit(checkpoint.folder.resolve(), checkpoint.config, adapter)
            if not agree(trained, expected):
                raise VisitError(
                    f"the adapter gives other logits on {base} than on its own base "
                    f"{checkpoint.adapter.base_model_name_or_path}: they are different models. Publish the base that "
                    "it was trained on; nothing was uploaded."
                )
        commit = target.commit(prepared, f"Publish {facts.name}", tag)
    found = visit(repository, checkpoint.config, adapter, revision=commit, fresh_cache=True)
    if not agree(found, expected):
        raise VisitError(f"{repository} at {commit} was uploaded, but gives other logits than {checkpoint.folder}.")
    return replace(publication, commit=commit)


def prepare(facts: Facts, folder: Path, most_bytes: int = MOST_BYTES) -> None:
    """
    Fills a folder with what is to be uploaded. Files are linked, not copied, unless weights have to be split or a
    record names folders of this machine.

    Args:
        facts: of the checkpoint.
        folder: an empty folder.
        most_bytes: of a file of weights.
    """
    checkpoint = facts.checkpoint
    for name in checkpoint.files:
        source = (checkpoint.folder / name).resolve()
        if name == WEIGHTS and source.stat().st_size > most_bytes:
            shard(source, folder, most_bytes)
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(source)
    if facts.results is not None:
        for path in [facts.results_folder / "results.json", *facts.plots]:
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path.resolve())
    if facts.page is not None:
        (folder / PAGE).unlink(missing_ok=True)
        (folder / PAGE).symlink_to(facts.page.resolve())
    for name in ("results.json", "training.json", "recipe.yaml"):
        if (folder / name).exists():
            remove_places(folder / name)
    if checkpoint.adapter is not None:
        (folder / "adapter_config.json").unlink()
        fields = read_json(checkpoint.folder / "adapter_config.json")
        fields |= {"base_model_name_or_path": facts.base, "revision": facts.base_revision}
        (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    entries = facts.leaderboard_entries()
    if entries:
        (folder / ".eval_results").mkdir()
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        (folder / ".eval_results" / f"{facts.results['task']['name']}.yaml").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(render_card(facts), encoding="utf-8")


def find_base(checkpoint: Checkpoint, given: str | None) -> tuple[str | None, str | None]:
    """
    Where a checkpoint's base is on the Hub, and for an adapter at which commit.

    Raises:
        FolderError: if the base of an adapter is a folder of this machine.
        HubError: if it is not on the Hub.
    """
    if checkpoint.adapter is None:
        return (given or "").partition("@")[0] or None, None
    base, revision = checkpoint.adapter.base_model_name_or_path, checkpoint.adapter.revision
    if given is not None:
        base, _, revision = given.partition("@")
    elif Path(base).exists():
        raise FolderError(
            f"the base of the adapter {checkpoint.folder} is a folder of this machine, {base}, where nobody else "
            "finds it. Publish that first, then this with --base USER/NAME; or merge both: armt merge"
        )
    try:
        repository = Repository(base, revision)
        with repository.errors():
            return base, HfApi().repo_info(base, revision=revision or None).sha
    except HubError as error:
        raise HubError(f"the base {base} of the adapter is not on the Hub, or cannot be seen: {error}") from error


def remove_places(record: Path) -> None:
    """Replaces a link to a JSON or YAML file by a copy that names no folders of this machine, if it names any."""
    text = record.read_text(encoding="utf-8")
    values = yaml.safe_load(text) if record.suffix == ".yaml" else json.loads(text)
    kept = without_places(values)
    if kept != values:
        record.unlink()
        text = yaml.safe_dump(kept, sort_keys=False) if record.suffix == ".yaml" else json.dumps(kept, indent=1)
        record.write_text(text, encoding="utf-8")


def content_tag(checkpoint: Checkpoint, base: str | None, base_revision: str | None) -> str:
    """A name for this content, the same whenever it is published: `armt-` and 12 digits."""
    digest = hashlib.sha256(f"{base}@{base_revision}".encode())
    for name in checkpoint.files:
        digest.update(name.encode())
        with open(checkpoint.folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"armt-{digest.hexdigest()[:12]}"
