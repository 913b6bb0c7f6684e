"""The loopback Hub for those who write: accounts, repositories with branches and commits, LFS, Xet's tokens,
and faults.

As in the real one a commit is made whole or not at all, on the parent that it names, and only of objects that
the store holds.
"""

import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_server import Handler, Hub
from .xet_store import xet_hashes

FINE, LATER = 200, {"Retry-After": "7"}


@dataclass(frozen=True)
class Account:
    name: str = "ada"
    role: str = "write"
    orgs: tuple[str, ...] = ("org",)


@dataclass(frozen=True)
class Blob:
    """A file of a commit; one in LFS has the SHA-256 that the server believes it to have."""

    size: int
    oid: str
    sha256: str | None = None
    content: bytes | None = None


@dataclass
class Repo:
    private: bool = True
    owners: frozenset[str] = frozenset({"ada"})
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, Blob], parent: str | None) -> str:
        seed = f"{parent} {len(self.commits)} {sorted(files)}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.parents[oid] = files, parent
        self.branches[branch] = oid
        return oid

    def head(self, branch: str = "main") -> dict[str, Blob]:
        return self.commits[self.branches[branch]]


@dataclass
class Fault:
    """What goes wrong with the n-th request (from 0) whose "METHOD /path" the pattern is found in, and with the
    `times − 1` after it.

    "cut": the connection closes before anything happens; "lost": after it happened, without the answer; a
    number: that status, nothing happens.
    """

    pattern: str
    kind: str | int
    number: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    seen: int = 0

    def strikes(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        return self.number < self.seen <= self.number + self.times


@dataclass
class WritableHub(Hub):
    """`accounts` by token. `store` holds LFS objects, `xet` is the folder of a Xet store. `believes` replaces the
    hash of a file: a store that is wrong."""

    accounts: dict[str, Account] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    store: dict[str, bytes] = field(default_factory=dict)
    xet: Path | None = None
    faults: list[Fault] = field(default_factory=list)
    believes: dict[str, str] = field(default_factory=dict)
    keeps_in_git: bool = False
    """A `.gitattributes` that names no weights."""
    bodies: int = 0
    """Bytes of LFS objects that came in."""

    def handler(self) -> type[Handler]:
        return WritingHandler

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, **more: object) -> Repo:
        repo = Repo(**more)  # type: ignore[arg-type]
        given = {".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {})
        repo.add("main", {name: blob(name, content) for name, content in given.items()}, None)
        self.store |= {hashlib.sha256(c).hexdigest(): c for n, c in given.items() if is_large(n)}
        self.repos[repo_id] = repo
        return repo

    def holds(self, sha256: str) -> bool:
        return sha256 in self.store or (self.xet is not None and sha256 in xet_hashes(self.xet))

    def asked(self) -> list[str]:
        return [f"{method} {path}" for method, path, *_ in self.requests]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


def blob(name: str, content: bytes) -> Blob:
    if is_large(name):
        sha256 = hashlib.sha256(content).hexdigest()
        return Blob(len(content), hashlib.sha1(sha256.encode()).hexdigest(), sha256)
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return Blob(len(content), oid, None, content)


class WritingHandler(Handler):
    state: WritableHub

    def do_POST(self) -> None:  # noqa: N802
        self._answer(body=True)

    do_PUT = do_POST  # noqa: N815

    def _answer(self, *, body: bool) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{self.command} {url.path}"
        fault = next((f for f in self.state.faults if f.strikes(request)), None)
        self.is_lost = fault is not None and fault.kind == "lost"
        if fault is not None and not self.is_lost:
            self._record(url.path)
            self._fail(fault)
        elif not self._route(request, url.path):
            super()._answer(body=body)

    def _record(self, path: str) -> None:
        authorization = self.headers.get("Authorization")
        self.state.requests.append((self.command, path, None, authorization))

    def _fail(self, fault: Fault) -> None:
        if fault.kind == "cut":
            self.close_connection = True
        else:
            self._json(int(fault.kind), {"error": "fault"}, fault.headers)

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        if self.is_lost:
            self.close_connection = True
        else:
            super()._json(status, value, headers)

    def _route(self, request: str, path: str) -> bool:
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, request):
                repo_id = found[1] if found.lastindex else ""
                if repo_id in self.state.repositories and method != "auth_check":
                    return False  # one to read
                self._record(path)
                if self._is_let_in(request):
                    rest = [unquote(part) for part in found.groups()[1:] if part is not None]
                    getattr(self, method)(repo_id, *rest)
                return True
        return False

    @property
    def account(self) -> Account | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.state.accounts.get(token)

    def _is_let_in(self, request: str) -> bool:
        """Signed addresses and the check of a card need no token."""
        if self.account or " /lfs/" in request or "validate-yaml" in request:
            return True
        message = {"X-Error-Message": "Invalid credentials in Authorization header"}
        self._json(401, {"error": message["X-Error-Message"]}, message)
        return False

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo | None:
        repo = self.state.repos.get(repo_id)
        if repo is None:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        assert self.account
        allowed = self.account.role != "read" and self.account.name in repo.owners
        if write and not allowed:
            self._json(403, {"error": "You don't have write access"})
            return None
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        oid = repo.branches.get(revision, revision)
        if oid in repo.commits:
            return oid
        self._json(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def whoami(self, _: str) -> None:
        account = self.account
        assert account
        token = {"displayName": "t", "role": account.role}
        orgs = [{"name": name, "roleInOrg": "write"} for name in account.orgs]
        auth = {"type": "access_token", "accessToken": token}
        self._json(FINE, {"type": "user", "name": account.name, "orgs": orgs, "auth": auth})

    def auth_check(self, repo_id: str, write: str = "") -> None:
        if repo_id in self.state.gated:
            self._json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif repo_id in self.state.repositories or self._repo(repo_id, write=bool(write)):
            self._json(FINE, {})

    def info(self, repo_id: str, revision: str = "main") -> None:
        if (repo := self._repo(repo_id)) and (oid := self._commit_of(repo, revision)):
            files = [{"rfilename": name} for name in repo.commits[oid]]
            self._json(FINE, {"id": repo_id, "sha": oid, "private": repo.private, "gated": False,
                              "siblings": files})  # fmt: skip

    def tree(self, repo_id: str, revision: str) -> None:
        if (repo := self._repo(repo_id)) and (oid := self._commit_of(repo, revision)):
            self._json(FINE, [_entry(name, blob) for name, blob in repo.commits[oid].items()])

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        """A file's content, where it is not in a Xet store."""
        if (repo := self._repo(repo_id)) and (oid := self._commit_of(repo, revision)):
            if there := repo.commits[oid].get(name):
                content = there.content
                if there.sha256 is not None:
                    content = self.state.store[there.sha256]
                self._content(content or b"", oid, body=self.command == "GET")
            else:
                self._json(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})

    def refs(self, repo_id: str) -> None:
        if repo := self._repo(repo_id):
            pulls = [b for b in repo.branches if b.startswith("refs/pr/")]
            heads = {name: oid for name, oid in repo.branches.items() if name not in pulls}
            self._json(FINE, {
                "branches": [_ref(name, f"refs/heads/{name}", oid) for name, oid in heads.items()],
                "converts": [], "tags": [],
                "pullRequests": [_ref(name, name, repo.branches[name]) for name in pulls],
            })  # fmt: skip

    def create(self, _: str) -> None:
        asked = json.loads(self.content)
        assert self.account
        space = asked.get("organization") or self.account.name
        repo_id = f"{space}/{asked['name']}"
        if self.account.role == "read" or space not in (self.account.name, *self.account.orgs):
            self._json(403, {"error": "You don't have the rights to create a model"})
        elif repo_id in self.state.repos:
            self._json(409, {"error": "exists", "url": f"{self.state.url}/{repo_id}"})
        else:
            self.state.create(repo_id, private=asked.get("visibility") != "public")
            self._json(FINE, {"url": f"{self.state.url}/{repo_id}"})

    def branch(self, repo_id: str, name: str) -> None:
        if repo := self._repo(repo_id, write=True):
            repo.branches.setdefault(name, repo.branches["main"])
            self._json(FINE, {})

    def validate(self, _: str) -> None:
        text = json.loads(self.content)["content"]
        wrong = "license: nonsense" in text
        errors = [{"message": '"license" must be one of […]'}] if wrong else []
        self._json(400 if wrong else FINE, {"errors": errors, "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        if not (repo := self._repo(repo_id, write="create_pr" not in self.query)):
            return
        asked = json.loads(self.content)
        there = repo.head(revision)
        kept = there[".gitignore"].content if ".gitignore" in there else b""
        ignored = asked.get("gitIgnore", (kept or b"").decode()).split()
        self._json(FINE, {"files": [
            {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) and not self.state.keeps_in_git else "regular",
             "shouldIgnore": any(fnmatch(f["path"], line) for line in ignored),
             "oid": _known(there.get(f["path"]))}
            for f in asked["files"]
        ]})  # fmt: skip

    def lfs_batch(self, repo_id: str) -> None:
        if self._repo(repo_id):
            asked = json.loads(self.content)["objects"]
            self._json(FINE, {"transfer": "basic", "objects": [self._actions(o) for o in asked]})

    def _actions(self, wanted: dict) -> dict:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if self.state.holds(wanted["oid"]):
            return known
        put = {"href": f"{self.state.url}/lfs/{wanted['oid']}?X-Amz-Signature={SIGNATURE}"}
        return known | {"actions": {"upload": put, "verify": {"href": f"{self.state.url}/verify"}}}

    def put(self, _: str, sha256: str) -> None:
        self.state.store[sha256] = self.content
        self.state.bodies += len(self.content)
        self._json(FINE, {})

    def verify(self, _: str) -> None:
        oid = json.loads(self.content)["oid"]
        fits = hashlib.sha256(self.state.store.get(oid, b"")).hexdigest() == oid
        if not fits:
            self.state.store.pop(oid, None)
        self._json(FINE if fits else 422, {})

    def xet_token(self, repo_id: str, _: str) -> None:
        if self._repo(repo_id):
            assert self.state.xet
            self._json(FINE, {"casUrl": f"local://{self.state.xet}", "accessToken": "xet",
                              "exp": int(time.time()) + 3600})  # fmt: skip

    def commit(self, repo_id: str, revision: str) -> None:
        is_pr = "create_pr" in self.query
        if not (repo := self._repo(repo_id, write=not is_pr)):
            return
        lines = [json.loads(line) for line in self.content.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if not is_pr and parent != repo.branches[revision]:
            self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            if not self._apply(files, line["key"], line["value"]):
                self._json(400, {"error": f"{line['value']['path']}: no such object"})
                return
        numbers = (n for n in count(1) if f"refs/pr/{n}" not in repo.branches)
        number = next(numbers)
        oid = repo.add(f"refs/pr/{number}" if is_pr else revision, files, parent)
        self._json(FINE, {"commitUrl": f"{self.state.url}/{repo_id}/commit/{oid}", "commitOid": oid,
                          "pullRequestUrl": f"{self.state.url}/{repo_id}/discussions/{number}"})  # fmt: skip

    def _apply(self, files: dict[str, Blob], key: str, value: dict) -> bool:
        path = value["path"]
        if key == "deletedFile":
            return files.pop(path, None) is not None
        if key == "file":
            files[path] = blob(path, base64.b64decode(value["content"]))
            return True
        if not self.state.holds(value["oid"]):
            return False
        sha256 = self.state.believes.get(path, value["oid"])
        files[path] = Blob(value["size"], hashlib.sha1(sha256.encode()).hexdigest(), sha256)
        return True


SIGNATURE = "signed" * 5
_REPO = r"/api/models/([^/]+/[^/]+)"
ROUTES = {
    "GET /api/whoami-v2": "whoami",
    f"GET {_REPO}/auth-check(/write)?": "auth_check",
    f"GET {_REPO}(?:/revision/([^/]+))?": "info",
    f"GET {_REPO}/tree/([^/]+)": "tree",
    f"GET {_REPO}/refs": "refs",
    r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": "resolve",
    "POST /api/repos/create": "create",
    f"POST {_REPO}/branch/([^/]+)": "branch",
    "POST /api/validate-yaml": "validate",
    f"POST {_REPO}/preupload/([^/]+)": "preupload",
    r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": "lfs_batch",
    "PUT (/lfs)/(.+)": "put",
    "POST /verify": "verify",
    f"GET {_REPO}/xet-write-token/([^/]+)": "xet_token",
    f"POST {_REPO}/commit/([^/]+)": "commit",
}


def _known(there: Blob | None) -> str | None:
    """What the client compares with: SHA-256 in LFS, else git's hash."""
    return there and (there.sha256 or there.oid)


def _entry(name: str, blob: Blob) -> dict:
    entry: dict = {"type": "file", "path": name, "size": blob.size, "oid": blob.oid}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return entry


def _ref(name: str, ref: str, oid: str) -> dict:
    return {"name": name, "ref": ref, "targetCommit": oid}
