"""What a Hub stores: large files by their sha256, and repositories of commits, branches and tags."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime


GIT_ATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in ("safetensors", "bin", "pt", "model", "png")
).encode()
LARGEST_REGULAR = 10 * 2**20  # bytes of a file that git keeps itself


class Refused(Exception):
    """What the server answers with an error: the status, the Hub's code for it, and a message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    """A file. Large ones are known by their sha256, others by git's own hash."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's hash, of the pointer if the file is large."""
        kept = self.content
        if self.large:
            kept = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize %d\n" % (
                self.sha256.encode(),
                len(self.content),
            )
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    date: str
    files: dict[str, Blob]

    @property
    def oid(self) -> str:
        tree = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(json.dumps([self.parent, self.title, self.date, tree]).encode()).hexdigest()


@dataclass
class Repository:
    """One model repository. It starts, as on the Hub, with a commit of `.gitattributes`."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.append("main", "initial commit", {".gitattributes": Blob(GIT_ATTRIBUTES, False)})

    def append(self, branch: str, title: str, files: dict[str, Blob]) -> str:
        """Commits `files` as the whole tree of `branch`; returns the commit's id."""
        commit = Commit(self.branches.get(branch), title, datetime.now(UTC).isoformat(), files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag or a commit id."""
        for known in (self.branches, self.tags):
            if revision in known:
                return known[revision]
        if revision in self.commits:
            return revision
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def files(self, revision: str = "main") -> dict[str, Blob]:
        return self.commits[self.resolve(revision)].files

    def history(self, revision: str = "main") -> list[tuple[str, Commit]]:
        """Commits from the newest to the first."""
        oid, found = self.resolve(revision), []
        while oid is not None:
            found.append((oid, self.commits[oid]))
            oid = self.commits[oid].parent
        return found

    def is_large(self, path: str, size: int) -> bool:
        attributes = self.files().get(".gitattributes", Blob(b"", False)).content.decode()
        endings = re.findall(r"^\*(\.\w+) filter=lfs", attributes, flags=re.M)
        return size > LARGEST_REGULAR or path.endswith(tuple(endings))
