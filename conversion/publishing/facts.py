"""What a card says, gathered from the checkpoint's own files; nothing is known that is not written there."""

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup
from safetensors import safe_open

from ..evaluation.subject import hash_weights
from ..inspecting.numbers import read_numbers
from ..provenance import LICENSE_FIELDS, describe_backbone, read_metadata
from ..tasks import TASKS
from .folders import PAGE, Checkpoint, FolderError, read_json
from .results import check_results, find_run


# Benchmarks with a data set on the Hub, which is where scores are listed.
BENCHMARKS = {"babilong": "RMT-team/babilong"}
TITLES = {"babilong": "BABILong", "associative_retrieval": "associative retrieval"}
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Facts:
    """
    Attributes:
        name: of the model on its card.
        checkpoint: the folder.
        repository: where it will be, None for a card that stays here.
        tag: revision that the card's example pins, None without a repository.
        base: Hub id of the backbone, or of the ARMT base of an adapter; None if it is not on the Hub.
        base_revision: of an adapter's base.
        license: `license` and what belongs to it, as a card's metadata has them.
        training: of `training.json`, None if the model was not trained.
        results: of `results.json`, None if it was not evaluated.
        results_folder: where that file is.
        plots: files beside it.
    """

    name: str
    checkpoint: Checkpoint
    repository: str | None
    tag: str | None
    base: str | None
    base_revision: str | None
    license: dict[str, Any]
    training: dict[str, Any] | None
    results: dict[str, Any] | None
    results_folder: Path
    plots: list[Path]

    @property
    def origin(self) -> dict[str, Any]:
        """Of the backbone, from the configuration."""
        return getattr(self.checkpoint.config, "converted_from", None) or {}

    @property
    def task(self) -> str | None:
        """The task that the model was trained on."""
        return (self.training or {}).get("recipe", {}).get("task")

    @cached_property
    def untrained(self) -> bool:
        """Whether the memories still add exactly zero. What trained them need not have left a `training.json`."""
        if self.checkpoint.adapter is not None:
            return False
        for name in self.checkpoint.files:
            if name.endswith(".safetensors"):
                with safe_open(self.checkpoint.folder / name, framework="pt") as file:
                    values = [key for key in file.keys() if key.endswith("memory_value.weight")]  # noqa: SIM118
                    if any(file.get_tensor(key).any() for key in values):
                        return False
        return True

    def metadata(self) -> ModelCardData:
        """The YAML at the top of the card."""
        adapter = self.checkpoint.adapter is not None
        relation = {} if self.base is None else {"base_model_relation": "adapter" if adapter else "finetune"}
        scores = self.eval_results()
        if scores:
            relation |= {"model_name": self.name, "eval_results": scores}
        return ModelCardData(
            base_model=self.base,
            library_name="peft" if adapter else "transformers",
            pipeline_tag="text-generation",
            tags=["armt", "associative-memory", "long-context", "custom_code", *(["lora"] if adapter else [])],
            **self.license,
            **relation,
        )

    @cached_property
    def own_run(self) -> dict[str, Any] | None:
        """What was measured of this checkpoint.

        Raises:
            ResultsError: if the results are of others.
        """
        if self.results is None:
            return None
        return find_run(self.results, self.checkpoint.folder.name, self.weights, (self.training or {}).get("seed"))

    @cached_property
    def weights(self) -> set[str]:
        """Hashes of the weights, and of those of the adapter that they were merged from."""
        return {hash_weights(self.checkpoint.folder), (self.training or {}).get("merged_from")} - {None}

    @cached_property
    def page(self) -> Path | None:
        """
        The page of `armt inspect` of this checkpoint, beside the results or in its folder; None if there is none.

        Raises:
            FolderError: if what is in the folder is no such page, or one of other weights.
        """
        for folder in dict.fromkeys((self.results_folder, self.checkpoint.folder)):
            page = folder / PAGE
            if page.is_file():
                try:
                    seen = read_numbers(page).get("weights")
                except ValueError as error:
                    raise FolderError(f"{error} Remove it, or write it again.") from error
                if seen is None or seen in self.weights:
                    return page
                if folder == self.checkpoint.folder:
                    raise FolderError(f"{page} shows another checkpoint. Remove it, or write it again: armt inspect")
        return None

    def eval_results(self) -> list[EvalResult]:
        """The scores of this checkpoint, of no other seed, for the card's metadata."""
        run = self.own_run
        task = (self.results or {}).get("task", {}).get("name")
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=f"{title(self.results['task'])}, {entry['length']}",
                dataset_config=entry["length"],
                metric_type="accuracy",
                metric_value=entry["scores"]["memory"]["mean"],
            )
            for entry in (run or {"lengths": []})["lengths"]
            if "scores" in entry
        ]

    def leaderboard_entries(self) -> list[EvalResultEntry]:
        """The same for `.eval_results`, of benchmarks that have a data set on the Hub."""
        run = self.own_run
        if run is None or self.results["task"]["name"] not in BENCHMARKS:
            return []
        task = self.results["task"]
        subtask = task.get("options", {}).get("task")
        return [
            EvalResultEntry(
                dataset_id=BENCHMARKS[task["name"]],
                task_id="_".join(filter(None, (subtask, entry["length"]))),
                value=entry["scores"]["memory"]["mean"],
                date=entry.get("date") or self.results["environment"].get("date"),
                notes="samples of our own, made by the benchmark's recipe, not those of the data set"
                + ("; one seed" if len(self.results["runs"]) == 1 else ""),
            )
            for entry in run["lengths"]
            if "scores" in entry
        ]


def gather(
    checkpoint: Checkpoint,
    repository: str | None = None,
    tag: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    license: str | None = None,
    results: Path | None = None,
) -> Facts:
    """
    Collects what is known of a checkpoint.

    Args:
        checkpoint: see [`inspect_folder`].
        repository, tag, base_revision: see [`Facts`].
        base: Hub id, where the checkpoint's own configuration does not name one.
        license: of the backbone, in place of what its own card says.
        results: folder of `armt evaluate`; by default the checkpoint's own folder.

    Raises:
        FolderError: if `base` can be no name on the Hub, the results are not there, or a page of `armt inspect` is of
            another checkpoint.
        ResultsError: if there are results without controls or intervals, or of other checkpoints.
    """
    training = checkpoint.record("training.json")
    if training is not None:
        check_training(training, checkpoint.folder)
    folder = checkpoint.folder if results is None else Path(results)
    measured = read_json(folder / "results.json") if (folder / "results.json").is_file() else None
    if results is not None and measured is None:
        raise FolderError(f"there is no results.json in {results}; `armt evaluate --out {results}` writes it.")
    if measured is not None:
        check_results(measured)
    name = (repository or str(checkpoint.folder.resolve())).rsplit("/", 1)[-1]
    origin = getattr(checkpoint.config, "converted_from", None) or {}
    if base is not None and not is_hub_name(base):
        raise FolderError(f"{base!r} cannot be a name on the Hub, such as user/name.")
    if base is None and checkpoint.adapter is None and "/" in origin.get("name", "") and is_hub_name(origin["name"]):
        base = origin["name"]
    plots = sorted(path for path in folder.iterdir() if path.suffix == ".png") if measured else []
    terms = known_license(checkpoint, license)
    facts = Facts(name, checkpoint, repository, tag, base, base_revision, terms, training, measured, folder, plots)
    if facts.results is not None:
        _ = facts.own_run  # before anything is written
    _ = facts.page
    return facts


def check_training(training: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        FolderError: if it is not what `armt train` writes.
    """
    stages = training.get("stages", [])
    whole = all(isinstance(training.get(name, {}), dict) for name in ("recipe", "versions"))
    if not whole or not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise FolderError(f"{folder}/training.json is not what `armt train` writes. Put that back, or remove it.")


def is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def known_license(checkpoint: Checkpoint, given: str | None) -> dict[str, Any]:
    """The licence that was given, or that of the backbone; `unknown`, as the Hub has it, if nobody knows it."""
    origin = getattr(checkpoint.config, "converted_from", None) or {}
    found = origin if "license" in origin else read_metadata(checkpoint.folder / "README.md")
    if "license" not in found and "/" in origin.get("name", ""):
        found = describe_backbone(origin["name"])
    terms = {"license": UNKNOWN} | {field: found[field] for field in LICENSE_FIELDS if found.get(field)}
    return {"license": given} if given and given != terms["license"] else terms


def name_license(terms: dict[str, Any]) -> str:
    """A licence in words, of several all."""
    name = terms.get("license_name", terms["license"])
    return ", ".join(map(str, name)) if isinstance(name, list) else str(name)


def title(task: dict[str, Any]) -> str:
    """A task as a reader knows it, such as `BABILong qa1`."""
    name = TITLES.get(task["name"], task["name"])
    subtask = task.get("options", {}).get("task")
    return f"{name} {subtask}" if subtask else name


def describe_task(name: str) -> Markup | None:
    """What the task says of itself, in a sentence or two."""
    if name not in TASKS:
        return None
    module = TASKS[name].partition(":")[0]
    return Markup(importlib.import_module(f"...tasks.{module}", __name__).__doc__.strip().partition("\n\n")[0])
