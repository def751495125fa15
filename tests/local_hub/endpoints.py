"""
The endpoints of the Hub that a model passes through: create, upload in one commit, list, resolve, download.

Checked as on the Hub: tokens and whose repository it is, sha256 and size of every upload, that a commit's large files
have arrived, its parent, the card's metadata. Files go through the LFS protocol; clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
from typing import Any
from urllib.parse import parse_qs

from .metadata import check_card
from .repository import Blob, Refused, Repository
from .transport import Transport


class Endpoints(Transport):
    # Who asks, and for what

    def user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.hub.users:
            raise Refused(401, "InvalidToken", "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def only_reads(self) -> bool:
        return self.headers.get("Authorization", "").partition(" ")[2] in self.hub.readers

    def readable(self, name: str) -> Repository:
        user, found = self.user(), self.hub.repositories.get(name)
        if found is None or (found.private and name.split("/")[0] != user):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def writable(self, name: str) -> Repository:
        found = self.readable(name)
        self.check_owner(name.split("/")[0])
        return found

    def check_owner(self, owner: str) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        if user != owner or self.only_reads():
            raise Refused(403, "Forbidden", f"You don't have the rights to write to {owner}")

    # Accounts and repositories

    def whoami(self):
        user = self.user()
        if user is None:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        auth = {"accessToken": {"role": "read" if self.only_reads() else "write"}}
        self.send(200, {"type": "user", "name": user, "orgs": [], "auth": auth})

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user()
        self.check_owner(owner)
        name = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo", **url})
        private = wanted.get("private", self.hub.private_by_default)
        private = wanted.get("visibility", "private" if private else "public") == "private"
        self.hub.repositories[name] = Repository(name, private)
        self.send(200, url)

    def may_write(self, name: str):
        self.writable(name)
        self.send(200, {})

    def info(self, name: str, revision: str = "main"):
        found = self.readable(name)
        oid = found.resolve(revision)
        siblings = [{"rfilename": path} for path in found.commits[oid].files]
        self.send(200, {"id": name, "modelId": name, "sha": oid, "private": found.private, "siblings": siblings})

    def refs(self, name: str):
        found = self.readable(name)
        kinds = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        refs = {
            kind: [{"name": key, "ref": f"refs/{folder}/{key}", "targetCommit": oid} for key, oid in known.items()]
            for kind, (folder, known) in kinds.items()
        }
        self.send(200, {**refs, "converts": []})

    def commits(self, name: str, revision: str):
        user = [{"user": name.split("/")[0]}]
        history = self.readable(name).history(revision)
        self.send(
            200,
            [{"id": oid, "title": c.title, "message": "", "date": c.date, "authors": user} for oid, c in history],
        )

    def branch(self, name: str, branch: str):
        found = self.writable(name)
        if branch in found.branches:
            raise Refused(409, "Conflict", f"Reference already exists: {branch}")
        found.branches[branch] = found.resolve(json.loads(self.body).get("startingPoint", "main"))
        self.send(200, {})

    def tag(self, name: str, revision: str):
        found, tag = self.writable(name), json.loads(self.body)["tag"]
        if tag in found.tags:
            raise Refused(409, "Conflict", f"Reference already exists: {tag}")
        found.tags[tag] = found.resolve(revision)
        self.send(200, {})

    # Files

    def entry(self, path: str, blob: Blob) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
        return (
            {**entry, "lfs": {"oid": blob.sha256, "size": entry["size"], "pointerSize": 134}} if blob.large else entry
        )

    def tree(self, name: str, revision: str):
        files = self.readable(name).files(revision)
        folders = sorted({path.split("/")[0] for path in files if "/" in path})
        entries = [self.entry(path, blob) for path, blob in files.items()]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"]]
        self.send(200, entries + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])

    def paths_info(self, name: str, revision: str):
        files = self.readable(name).files(revision)
        wanted = parse_qs(self.body.decode())["paths"]
        self.send(200, [self.entry(path, files[path]) for path in wanted if path in files])

    def resolve(self, name: str, revision: str, path: str):
        found = self.readable(name)
        oid = found.resolve(revision)
        blob = found.commits[oid].files.get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", f"Entry not found: {path}")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"', "Content-Type": "application/octet-stream"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        self.send(200, blob.content, headers)

    # Uploading

    def validate(self):
        card = json.loads(self.body)
        errors, warnings = check_card(card["content"])
        messages = {"errors": errors, "warnings": warnings}
        self.send(400 if errors else 200, {kind: [{"message": m} for m in found] for kind, found in messages.items()})

    def preupload(self, name: str, revision: str):
        found = self.writable(name)
        files = found.files(revision)
        modes = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if found.is_large(path, file["size"]) else "regular"
            oid = files[path].etag if path in files else None
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": modes})

    def batch(self, name: str):
        self.writable(name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            actions = {
                "upload": {"href": f"{self.hub.endpoint}/large-files/{oid}/{size}"},
                "verify": {"href": f"{self.hub.endpoint}/large-files/verify"},
            }
            there = oid in self.hub.large_files
            objects.append({"oid": oid, "size": size} if there else {"oid": oid, "size": size, "actions": actions})
        self.send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def upload(self, oid: str, size: str):
        if len(self.body) != int(size) or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "BadRequest", "the content has another size or sha256 than was announced")
        self.hub.large_files[oid] = self.body
        self.send(200)

    def verify(self):
        wanted = json.loads(self.body)
        content = self.hub.large_files.get(wanted["oid"])
        if content is None or len(content) != wanted["size"]:
            raise Refused(404, "NotFound", "the file has not arrived")
        self.send(200)

    def commit(self, name: str, revision: str):
        found = self.writable(name)
        if revision not in found.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(found.files(revision))
        parent = header.get("parentCommit")
        if parent and parent != found.branches[revision]:
            raise Refused(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                content = self.hub.large_files.get(value["oid"])
                if content is None or len(content) != value["size"]:
                    raise Refused(400, "BadRequest", f"{path}: its content was never uploaded")
                files[path] = Blob(content, True)
            elif line["key"] == "deletedFile" and path in files:
                del files[path]
            else:
                raise Refused(400, "BadRequest", f"cannot do {line['key']} {path}")
        oid = found.append(revision, header["summary"], files)
        self.send(200, {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})


NAME = r"([\w.-]+/[\w.-]+)"
Endpoints.routes = [
    (r"GET /api/whoami-v2", Endpoints.whoami),
    (r"POST /api/repos/create", Endpoints.create),
    (r"POST /api/validate-yaml", Endpoints.validate),
    (rf"GET /api/models/{NAME}/auth-check/write", Endpoints.may_write),
    (rf"GET /api/models/{NAME}", Endpoints.info),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", Endpoints.info),
    (rf"GET /api/models/{NAME}/refs", Endpoints.refs),
    (rf"GET /api/models/{NAME}/commits/([^/]+)", Endpoints.commits),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Endpoints.tree),
    (rf"POST /api/models/{NAME}/paths-info/([^/]+)", Endpoints.paths_info),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", Endpoints.branch),
    (rf"POST /api/models/{NAME}/tag/([^/]+)", Endpoints.tag),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Endpoints.preupload),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Endpoints.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Endpoints.batch),
    (r"PUT /large-files/(\w{64})/(\d+)", Endpoints.upload),
    (r"POST /large-files/verify", Endpoints.verify),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Endpoints.resolve),
]
