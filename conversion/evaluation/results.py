"""results.json: what was measured so far, whole at any time, and where a run that was cut off goes on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .capacity import capacity


class Results:
    """
    The results in a folder, written anew after every length.

    Args:
        folder: made if needed.
        request: what makes results comparable: task, options, numbers of samples. Checkpoints, lengths and controls
            may be added by later runs.
        environment: of this run; its command comes after those of earlier runs.

    Attributes:
        content: of the file.

    Raises:
        ValueError: if the file there is not readable, or of another request.
    """

    def __init__(self, folder: str | Path, request: dict[str, Any], environment: dict[str, Any]):
        self.folder = Path(folder)
        self.path = self.folder / "results.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the results.")
        if self.path.exists():
            self.content = self._read()
            found = self.content["request"]
            different = [name for name in {**found, **request} if found.get(name) != request.get(name)]
            if different:
                raise ValueError(
                    f"{self.path} has results of another command, with "
                    + " and ".join(
                        f"{name} {found.get(name)!r} instead of {request.get(name)!r}" for name in different
                    )
                    + ". Name another folder, or remove it."
                )
            earlier = (self.content["environment"].get("command") or "").split(" && ")
            commands = dict.fromkeys(filter(None, [*earlier, environment["command"]]))
            self.content["environment"] = environment | {"command": " && ".join(commands) or None}
        else:
            self.content = {
                "task": {"name": request["task"], "options": request["options"]},
                "request": request,
                "environment": environment,
                "baselines": {},
                "runs": [],
            }
        self.folder.mkdir(parents=True, exist_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            for name, kind in {"request": dict, "environment": dict, "runs": list}.items():
                if not isinstance(content[name], kind):
                    raise KeyError(name)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"{self.path} is not a file of results, or a damaged one ({type(error).__name__}: {error}). Name "
                "another folder, or remove it."
            ) from error
        return content

    def run(self, checkpoint: str, seed: int | None, weights: str | None) -> dict[str, Any]:
        """
        The entry of a checkpoint, new or as an earlier run left it.

        Raises:
            ValueError: if the entry of this name is of other weights.
        """
        for run in self.content["runs"]:
            if run["checkpoint"] == checkpoint:
                if run.get("weights") != weights:
                    raise ValueError(
                        f"{self.path} has results of other weights under the name {checkpoint}. Name another folder, "
                        "or remove it."
                    )
                return run
        run = {"checkpoint": checkpoint, "seed": seed, "weights": weights, "lengths": []}
        self.content["runs"].append(run)
        return run

    def entry(self, run: dict[str, Any], length: str) -> dict[str, Any] | None:
        """What is known of a length, if anything."""
        return next((entry for entry in run["lengths"] if entry["length"] == length), None)

    def answers(self, run: dict[str, Any], length: str) -> list[dict[str, Any]]:
        """
        The answers that came with a length; none if they are not there any more.

        Raises:
            ValueError: if their file is damaged.
        """
        file = self.answers_file(run, length)
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            for line in lines:
                for name, kind in {"answers": dict, "scores": dict, "distances": list}.items():
                    if not isinstance(line[name], kind):
                        raise KeyError(name)
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is damaged ({type(error).__name__}: {error}). Remove it, and its length is measured again."
            ) from error
        return lines

    def answers_file(self, run: dict[str, Any], length: str) -> Path:
        return self.folder / "answers" / f"{run['checkpoint'].replace('/', '-')}-{length}.jsonl"

    def add(self, run: dict[str, Any], entry: dict[str, Any], answers: Sequence[dict[str, Any]] = ()) -> None:
        """
        Adds a length to a run, in order of tokens, in place of what there was of it, and the answers in a file of
        their own. The baselines of the whole are those of the longest length, and the capacity of a run is the largest
        estimate among its lengths.
        """
        if answers:
            file = self.answers_file(run, entry["length"])
            file.parent.mkdir(exist_ok=True)
            write_whole(file, "".join(json.dumps(finite(line)) + "\n" for line in answers))
        run["lengths"] = [other for other in run["lengths"] if other["length"] != entry["length"]] + [entry]
        run["lengths"].sort(key=lambda entry: entry["tokens"])
        best = capacity(run["lengths"])
        if best:
            run["capacity"] = best
        entries = [entry for run in self.content["runs"] for entry in run["lengths"]]
        self.content["baselines"] = max(entries, key=lambda entry: entry["tokens"]).get("baselines", {})
        self.write()

    def write(self) -> None:
        write_whole(self.path, json.dumps(finite(self.content), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A nested value in plain types, with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):  # numpy
        return finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
