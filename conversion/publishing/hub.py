"""The Hub, as far as a publish needs it; its errors in one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ...configuration_armt import ARMTConfig
from .folders import FolderError, published, read_json


# What a fresh repository has, or what somebody may add to one by hand without making it another's.
NEUTRAL = (".gitattributes", "README.md", "LICENSE*", ".gitignore")
# Backbones that differ in these are different models.
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class HubError(OSError):
    """What the Hub did not do, with the reason."""


class Repository:
    """
    A model repository on the Hub that is to be written to.

    Args:
        name: `user/name`.
        revision: branch; made from `main` if it is not there.
        private: whether the repository is private if it has to be made.

    Raises:
        HubError: for what cannot be a name.
    """

    def __init__(self, name: str, revision: str | None = None, private: bool = False):
        self.name, self.branch, self.private = name, revision or "main", private
        with self.errors():
            validate_repo_id(name)
        if "/" not in name:
            raise HubError(f"{name} cannot be a repository: it takes the owner too, user/name.")
        self.api = HfApi(library_name="modeling_armt")

    def check(self, config: ARMTConfig, adapter_base: str | None) -> None:
        """
        Sees, without changing anything, whether the repository can be written to.

        Args:
            config: of the model that is to be published.
            adapter_base: for an adapter, the Hub id of its base.

        Raises:
            HubError: if there is no token, it is not valid or not the owner's, or the Hub is out of reach.
            FolderError: if the repository holds something else than an earlier state of this model.
        """
        if get_token() is None:
            raise HubError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
        with self.errors():
            try:
                account = self.api.whoami()
            except HfHubHTTPError as error:
                if error.response.status_code != 401:
                    raise
                raise HubError(
                    "the Hub does not know this token. Run `hf auth login --force`, or set HF_TOKEN."
                ) from error
            owner = self.name.partition("/")[0]
            if owner not in [account["name"], *(org["name"] for org in account.get("orgs", []))]:
                raise HubError(f"this token is {account['name']}'s, who may not write to {self.name}.")
            if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
                raise HubError(f"this token may only read. Make one that may write to {self.name}.")
            files = self.files()
            if self.private and self.is_private() is False:
                raise HubError(f"{self.name} exists and is public, so that nothing in it would be private.")
            alone = adapter_base is not None and not (self.private or self.is_private())
            if alone and Repository(adapter_base).is_private():
                raise HubError(
                    f"the base {adapter_base} is private, so that nobody could load the adapter. Make it public, or "
                    "publish the adapter with --private."
                )
        foreign = [name for name in files if not any(fnmatch(name, pattern) for pattern in NEUTRAL)]
        if foreign and not self.holds(files, config, adapter_base):
            kind = "an ARMT checkpoint of this shape" if adapter_base is None else f"an adapter on {adapter_base}"
            raise FolderError(
                f"{self.name} exists and holds something else ({', '.join(foreign[:3])}, ...) than {kind}. Name "
                "another repository; nothing was uploaded."
            )

    def holds(self, files: list[str], config: ARMTConfig, adapter_base: str | None) -> bool:
        """Whether what is there may be an earlier state of a model."""
        marker, other = "config.json", "adapter_config.json"
        if adapter_base is not None:
            marker, other = other, marker
        if marker not in files or other in files:
            return False
        with self.errors():
            there = read_json(Path(self.api.hf_hub_download(self.name, marker, revision=self.origin())))
        if adapter_base is not None:
            return there.get("base_model_name_or_path") == adapter_base
        ours, theirs = config.to_dict()["text_config"], there.get("text_config") or {}
        return there.get("model_type") == "armt" and all(ours.get(name) == theirs.get(name) for name in SHAPE)

    def is_private(self) -> bool | None:
        """None if there is no such repository yet."""
        try:
            return self.api.repo_info(self.name).private
        except RepositoryNotFoundError:
            return None

    def origin(self) -> str:
        """The branch, or `main`, which it will be made from."""
        return self.branch if self.api.revision_exists(self.name, self.branch) else "main"

    def files(self) -> list[str]:
        """Paths on the branch, or on what it will be made from; none if there is no such repository yet."""
        try:
            return self.api.list_repo_files(self.name, revision=self.origin())
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return []

    def commit(self, folder: Path, message: str, tag: str) -> str:
        """
        Makes the branch hold what is in a folder, in one commit; what `publish` once wrote and is no longer there is
        removed. Until that commit everything on the Hub is as it was, whatever happens.

        Args:
            folder: all of it is uploaded.
            message: of the commit.
            tag: name for the commit, unless there is one of that name.

        Returns:
            The commit's id.

        Raises:
            HubError: if the Hub refuses, or cannot be reached.
        """
        paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        with self.errors():
            # Where nothing is said, an organisation's own default holds.
            self.api.create_repo(self.name, private=self.private or None, exist_ok=True)
            if self.branch != "main":
                self.api.create_branch(self.name, branch=self.branch, exist_ok=True)
            parent = self.api.repo_info(self.name, revision=self.branch).sha
            old = [name for name in self.files() if published(name) and name not in paths]
        return self.commit_files(paths, old, message, parent, tag)

    def commit_files(self, paths: dict[str, Path], gone: list[str], message: str, parent: str, tag: str | None) -> str:
        """
        Adds or replaces files, and removes others, in one commit after `parent`; see [`commit`].

        Raises:
            HubError: also if there is another commit after `parent`.
        """
        with self.errors():
            # Not upload_folder, which spreads a large folder over several commits.
            operations = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
            operations += [CommitOperationDelete(name) for name in gone]
            oid = self.api.create_commit(
                self.name, operations, commit_message=message, revision=self.branch, parent_commit=parent
            ).oid
        if tag is None:
            return oid
        try:
            self.api.create_tag(self.name, tag=tag, revision=oid, exist_ok=True)
        except Exception as error:  # as below
            raise HubError(
                f"{self.name} is published at {oid}, but the tag {tag} of its card could not be made "
                f"({_first_line(error)}). Run the command again."
            ) from error
        return oid

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what the client raises into one line."""
        try:
            yield
        except HubError:
            raise
        except HFValidationError as error:
            raise HubError(f"{self.name} cannot be a repository: {error}") from error
        except OfflineModeIsEnabled as error:
            raise HubError("the Hub is switched off by HF_HUB_OFFLINE; unset it to publish.") from error
        except HfHubHTTPError as error:
            raise HubError(f"{self._reason(error)} The repository is as it was.") from error
        except ValueError as error:  # of the client, about a card or an answer
            raise HubError(f"the Hub does not take this: {' '.join(str(error).split())}") from error
        except Exception as error:
            # The transport's own exceptions differ between versions of the client; what dropped is in the chain.
            raise HubError(
                f"the connection to the Hub failed ({_first_line(_root(error))}). {self.name} shows its old revision, "
                "or all of the new one if only the answer was lost. Run the command again; what has arrived is not "
                "sent twice."
            ) from error

    def _reason(self, error: HfHubHTTPError) -> str:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return f"this token may not write to {self.name}: {_first_line(error)}."
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            return f"{self.name} has no revision {self.branch}, or you may not see it."
        if status == 412:
            return f"somebody else has committed to {self.name} meanwhile; run the command again."
        return f"the Hub refused to write {self.name}: {_first_line(error)}."


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
