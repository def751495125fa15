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

from .folders import FolderError, published


# What a fresh repository has, or what somebody may add to one by hand without making it another's.
NEUTRAL = (".gitattributes", "README.md", "LICENSE*", ".gitignore")


class HubError(OSError):
    """What the Hub did not do, with the reason."""


class Repository:
    """
    A model repository on the Hub that is to be written to.

    Args:
        name: `user/name`.
        revision: branch; made from `main` if it is not there.
        private: whether the repository is private if it has to be made.
    """

    def __init__(self, name: str, revision: str | None = None, private: bool = False):
        self.name, self.branch, self.private = name, revision or "main", private
        self.api = HfApi(library_name="modeling_armt")

    def check(self, adapter: bool) -> None:
        """
        Sees, without changing anything, whether the repository can be written to.

        Raises:
            HubError: if there is no token, it is not valid, or the Hub is out of reach.
            FolderError: if something else than a model of this kind is in the repository.
        """
        if get_token() is None:
            raise HubError(
                "there is no token for the Hub. Run `hf auth login`, or set HF_TOKEN; nothing was uploaded."
            )
        with self.errors():
            try:
                account = self.api.whoami()
            except HfHubHTTPError as error:
                if error.response.status_code == 401:
                    raise HubError(
                        "the Hub does not know this token. Run `hf auth login --force`, or set HF_TOKEN; nothing was "
                        "uploaded."
                    ) from error
                raise
            owner = self.name.partition("/")[0]
            if owner not in [account["name"], *(org["name"] for org in account.get("orgs", []))]:
                raise HubError(f"this token is {account['name']}'s, who may not write to {self.name}.")
            files = self.files()
        foreign = [name for name in files if not any(fnmatch(name, pattern) for pattern in NEUTRAL)]
        if not foreign:
            return
        marker, other = ("adapter_config.json", "config.json") if adapter else ("config.json", "adapter_config.json")
        kind = "an adapter" if adapter else "an ARMT checkpoint"
        if marker not in files or other in files or not self.is_armt(marker):
            raise FolderError(
                f"{self.name} exists and holds something else ({', '.join(foreign[:3])}, ...), not {kind}. Name "
                "another repository; nothing was uploaded."
            )

    def is_armt(self, marker: str) -> bool:
        """Whether the repository's own configuration names ARMT, or an adapter of ours."""
        from .folders import read_json

        with self.errors():
            content = read_json(Path(self.api.hf_hub_download(self.name, marker, revision=self.branch)))
        return content.get("model_type") == "armt" or "peft_type" in content

    def files(self) -> list[str]:
        """Paths on the branch; none if there is no such repository or branch yet."""
        try:
            return self.api.list_repo_files(self.name, revision=self.branch)
        except RevisionNotFoundError:
            return []
        except RepositoryNotFoundError:
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
            self.api.create_repo(self.name, private=self.private, exist_ok=True)
            if self.branch != "main":
                self.api.create_branch(self.name, branch=self.branch, exist_ok=True)
            parent = self.api.repo_info(self.name, revision=self.branch).sha
            old = [name for name in self.files() if published(name) and name not in paths]
            # Not upload_folder, which spreads a large folder over several commits.
            operations = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
            operations += [CommitOperationDelete(name) for name in old]
            oid = self.api.create_commit(
                self.name, operations, commit_message=message, revision=self.branch, parent_commit=parent
            ).oid
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
        except Exception as error:
            # The transport's own exceptions differ between versions of the client; what dropped is in the chain.
            raise HubError(
                f"the connection to the Hub failed ({_first_line(_root(error))}). {self.name} is as it was; run the "
                "command again, and what has been uploaded is not sent twice."
            ) from error

    def _reason(self, error: HfHubHTTPError) -> str:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            return f"this token may not write to {self.name}: {_first_line(error)}."
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            return f"{self.name} has no branch {self.branch}, or you may not see it."
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
