"""What the test Hub does with uploads: repositories, branches, LFS objects and commits, each commit whole or not."""

import base64
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

Answer = tuple[int, dict[str, Any], dict[str, str]]  # status, JSON, headers

LFS_SUFFIXES = (".safetensors", ".bin")
GIT_ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class Commit:
    """One commit on a branch: what it says, and the files it touched."""

    oid: str
    message: str
    added: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


@dataclass
class Repository:
    """A repository made by an upload; the files of a branch lie in the folder of its name."""

    root: Path
    private: bool
    commits: dict[str, list[Commit]] = field(default_factory=dict)

    def add_branch(self, branch: str, source: str | None = None) -> None:
        if source is None:
            self.folder(branch).mkdir(parents=True)
            (self.folder(branch) / ".gitattributes").write_text(GIT_ATTRIBUTES)
            self.commits[branch] = [Commit(self.new_oid(), "initial commit", (".gitattributes",))]
        else:
            shutil.copytree(self.folder(source), self.folder(branch))
            self.commits[branch] = list(self.commits[source])

    def folder(self, branch: str) -> Path:
        return self.root / branch

    def branch_of(self, revision: str) -> str | None:
        """The branch of that name, or the one whose head has that oid."""
        heads = {commits[-1].oid: branch for branch, commits in self.commits.items()}
        return revision if revision in self.commits else heads.get(revision)

    def new_oid(self) -> str:
        made = sum(map(len, self.commits.values()))
        return hashlib.sha1(f"{self.root.name} {made}".encode()).hexdigest()

    def apply(self, branch: str, message: str, added: dict[str, bytes], deleted: list[str]) -> Commit:
        """Add a commit; the folder is exchanged for the new one."""
        fresh = self.root / f".{branch}.new"
        shutil.copytree(self.folder(branch), fresh)
        for name in deleted:
            (fresh / name).unlink()
        for name, content in added.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)
        shutil.rmtree(self.folder(branch))
        fresh.rename(self.folder(branch))
        commit = Commit(self.new_oid(), message, tuple(added), tuple(deleted))
        self.commits[branch].append(commit)
        return commit


@dataclass
class Uploads:
    """All that was uploaded, below `root`.

    Attributes:
        writers: token -> the namespaces it may write to.
    """

    root: Path
    url: str = ""
    writers: dict[str, set[str]] = field(default_factory=lambda: {"hf_writer": {"user"}})
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS oid -> content
    received: list[str] = field(default_factory=list)  # LFS oids in the order they came

    def may_write(self, token: str, repo: str) -> bool:
        return repo.split("/")[0] in self.writers.get(token, ())

    def answer(self, path: str, body: bytes, token: str, taken: set[str]) -> Answer:
        """Answer a POST or PUT; `taken` are repositories that nobody can create."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "store":  # a signed URL: no token
            return self.store(parts[1], body)
        if not token:
            return 401, {"error": "Invalid username or password."}, {}
        if parts == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}, {}
        if parts == ["api", "repos", "create"]:
            return self.create(json.loads(body), token, taken)
        repo, rest = (parts[2:4], parts[4:]) if parts[0] == "api" else (parts[:2], parts[2:])
        name = "/".join(repo).removesuffix(".git")
        if not self.may_write(token, name):
            message = f"Authorization error: you have no write access to {name}"
            return 403, {"error": message}, {"X-Error-Message": message}
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return self.answer_repository(self.repositories[name], name, rest, body)

    def answer_repository(self, repository: Repository, name: str, rest: list[str], body: bytes) -> Answer:
        if rest[0] == "branch":
            if rest[1] in repository.commits:
                return 409, {"error": "Reference already exists"}, {}
            repository.add_branch(rest[1], source="main")
            return 200, {}, {}
        if rest == ["info", "lfs", "objects", "batch"]:
            return 200, {"objects": [self.batch_action(name, entry) for entry in json.loads(body)["objects"]]}, {}
        if rest == ["info", "lfs", "verify"]:
            asked = json.loads(body)
            return (200 if len(self.objects.get(asked["oid"], b"")) == asked["size"] else 404), {}, {}
        branch = repository.branch_of(rest[1])
        if branch is None:
            return 404, {"error": f"Invalid rev id: {rest[1]}"}, {"X-Error-Code": "RevisionNotFound"}
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [self.upload_mode(repository.folder(branch), entry) for entry in asked]}, {}
        return self.commit(repository, name, branch, body)

    def create(self, asked: dict[str, Any], token: str, taken: set[str]) -> Answer:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.url}/{name}"}
        if not self.may_write(token, name):
            message = f'You don\'t have the rights to create a model under the namespace "{asked["organization"]}"'
            return 403, {"error": message}, {"X-Error-Message": message}
        if name in taken or name in self.repositories:
            return 409, {"error": "You already created this model repo", **url}, {}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.repositories[name] = Repository(self.root / name, private)
        self.repositories[name].add_branch("main")
        return 200, url, {}

    def upload_mode(self, folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular"
        there = folder / entry["path"]
        oid = None
        if there.is_file():
            content = there.read_bytes()
            git_blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            oid = hashlib.sha256(content).hexdigest() if mode == "lfs" else git_blob
        return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch_action(self, name: str, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["oid"] in self.objects:
            return entry
        actions = {
            "upload": {"href": f"{self.url}/store/{entry['oid']}"},
            "verify": {"href": f"{self.url}/{name}.git/info/lfs/verify"},
        }
        return {**entry, "actions": actions}

    def store(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, {"error": "content does not have this oid"}, {}
        self.objects[oid] = content
        self.received.append(oid)
        return 200, {}, {}

    def commit(self, repository: Repository, name: str, branch: str, body: bytes) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repository.commits[branch][-1].oid) != repository.commits[branch][-1].oid:
            return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
        added, deleted = {}, []
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "deletedFile":
                if not (repository.folder(branch) / path).is_file():
                    message = "A file with this name doesn't exist"
                    return 404, {"error": message}, {"X-Error-Code": "EntryNotFound"}
                deleted.append(path)
            elif line["key"] == "file":
                added[path] = base64.b64decode(line["value"]["content"])
            elif line["value"]["oid"] in self.objects:
                added[path] = self.objects[line["value"]["oid"]]
            else:
                return 400, {"error": f"{path} was not uploaded"}, {}
        made = repository.apply(branch, header["summary"], added, deleted)
        return 200, {"success": True, "commitOid": made.oid, "commitUrl": f"{self.url}/{name}/commit/{made.oid}"}, {}
