"""
The endpoints of the Hub that a model passes through: create, upload in one commit, list, resolve, download.

Checked as on the Hub: tokens and whose repository it is, sha256 and size of every upload, that a commit's large files
have arrived, its parent, the card's metadata. Files go through the LFS protocol; clients need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .metadata import check_card
from .repository import Blob, Refused, Repository


class Dropped(Exception):
    """The connection ends without an answer."""


class LocalHub:
    """
    A Hub that lives as long as a `with` block.

    Attributes:
        users: user names by token. A user may write to repositories of its own name.
        requests: `METHOD path` of every request that arrived.
    """

    def __init__(self, **users: str):
        self.users = {token: name for name, token in users.items()}
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[tuple[str, Callable[[], None]]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> "LocalHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def on(self, request: str, fault: Callable[[], None]) -> None:
        """Calls `fault` in the middle of every request whose `METHOD path` matches; it may raise [`Dropped`]."""
        self.faults.append((request, fault))

    def drop(self, request: str, times: int) -> None:
        """Lets the connection of matching requests die, as often as that."""
        left = [times]

        def fault() -> None:
            left[0] -= 1
            if left[0] >= 0:
                raise Dropped

        self.on(request, fault)


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), parts.path
        called = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(called)
        try:
            self.body = self.read_body(called)
            for pattern, reply in ROUTES:
                match = re.fullmatch(pattern, called)
                if match:
                    with self.hub.lock:
                        return reply(self, *map(unquote, match.groups()))
            raise Refused(404, "NotFound", f"no such endpoint: {called}")
        except Refused as error:
            self.send(error.status, {"error": str(error)}, {"X-Error-Code": error.code, "X-Error-Message": str(error)})
        except (Dropped, ConnectionError):
            self.close_connection = True
            self.connection.close()

    def read_body(self, called: str) -> bytes:
        pieces = self.read_pieces()
        body = next(pieces, b"")
        for pattern, fault in self.hub.faults:
            if re.search(pattern, called):
                fault()
        return body + b"".join(pieces)

    def read_pieces(self):
        """The body in two pieces or more, so that something can happen in between."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            size = int(self.headers.get("Content-Length", 0))
            yield self.rfile.read(size // 2)
            yield self.rfile.read(size - size // 2)

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks, and for what

    def user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in self.hub.users:
            raise Refused(401, "InvalidToken", "Invalid credentials in Authorization header")
        return self.hub.users[token]

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
        if user != owner:
            raise Refused(403, "Forbidden", f"You don't have the rights to write to {owner}")

    # Accounts and repositories

    def whoami(self):
        user = self.user()
        if user is None:
            raise Refused(401, "Unauthorized", "Invalid username or password.")
        self.send(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user()
        self.check_owner(owner)
        name = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo", **url})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
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
ROUTES: list[tuple[str, Callable]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"GET /api/models/{NAME}/auth-check/write", Handler.may_write),
    (rf"GET /api/models/{NAME}", Handler.info),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", Handler.info),
    (rf"GET /api/models/{NAME}/refs", Handler.refs),
    (rf"GET /api/models/{NAME}/commits/([^/]+)", Handler.commits),
    (rf"GET /api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"POST /api/models/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    (rf"POST /api/models/{NAME}/branch/([^/]+)", Handler.branch),
    (rf"POST /api/models/{NAME}/tag/([^/]+)", Handler.tag),
    (rf"POST /api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    (rf"POST /api/models/{NAME}/commit/([^/]+)", Handler.commit),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /large-files/(\w{64})/(\d+)", Handler.upload),
    (r"POST /large-files/verify", Handler.verify),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
