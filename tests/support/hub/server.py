"""A Hub on loopback: the routes huggingface_hub needs to resolve, list, download and upload a model, and faults."""

import hashlib
import json
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

from support.commands import run
from support.hub.uploads import Uploads
from support.tiny_models import Pair

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked for.

    Attributes:
        models: id -> folder; its revisions main, v1 and COMMIT are the same.
        private: id -> the token that may read it.
        uploads: repositories that were uploaded; they can be downloaded again.
        limited: part of a path -> how many more requests to it are answered 429.
        broken: file name -> after how many bytes the next downloads of it are cut off, one each.
        dies_at: part of a path; a request to it is the last one the Hub takes, and gets no answer.
        downloads: file name -> how often it was asked for.
        sent: file name -> bytes of it that were sent.
        ranges: (file name, first byte) of each request for the rest of a file.
        on_download: called with the name of a file before it is sent whole, or from some byte on.
    """

    url: str
    models: dict[str, Path]
    uploads: Uploads
    private: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    limited: Counter[str] = field(default_factory=Counter)
    broken: dict[str, list[int]] = field(default_factory=dict)
    dies_at: str | None = None
    dead: bool = False
    downloads: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    ranges: list[tuple[str, int]] = field(default_factory=list)
    on_download: Callable[[str], None] = lambda name: None

    def knows(self, token: str) -> bool:
        return not token or token in self.uploads.writers or token in self.private.values()

    def may_read(self, repo: str, token: str) -> bool:
        if repo in self.models:
            return self.private.get(repo, token) == token
        uploaded = self.uploads.repositories.get(repo)
        return uploaded is not None and (not uploaded.private or self.uploads.may_write(token, repo))

    def find(self, repo: str, revision: str) -> tuple[Path, str] | None:
        """The folder of a revision, and its commit."""
        if repo in self.models:
            return (self.models[repo], COMMIT) if revision in ("main", "v1", COMMIT) else None
        uploaded = self.uploads.repositories[repo]
        branch = uploaded.branch_of(revision)
        return None if branch is None else (uploaded.folder(branch), uploaded.commits[branch][-1].oid)

    def is_limited(self, path: str) -> bool:
        for part in list(self.limited):
            if part in path and self.limited[part] > 0:
                self.limited[part] -= 1
                return True
        return False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer_read()

    def do_GET(self) -> None:
        self.answer_read()

    def do_POST(self) -> None:
        self.answer_write()

    def do_PUT(self) -> None:
        self.answer_write()

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def send(self, status: int, content: bytes | object, **headers: str) -> None:
        self.send_response(status)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        for name, value in {"Content_Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def is_gone(self) -> bool:
        hub = self.hub
        if hub.dies_at is not None and hub.dies_at in self.path:
            hub.dead = True
            self.server.shutdown()
            self.server.server_close()
        self.close_connection = hub.dead or self.close_connection
        return hub.dead

    def is_refused(self) -> bool:
        """Answer what has nothing to do with the thing that is asked for."""
        if self.hub.is_limited(self.path):
            self.send(429, {}, RateLimit='"api";r=0;t=55', RateLimit_Policy='"fixed window";"api";q=500;w=300')
        elif not self.hub.knows(self.token):
            self.send(401, {}, X_Error_Message="Invalid credentials in Authorization header")
        else:
            return False
        return True

    def answer_write(self) -> None:
        if self.is_gone():
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.is_refused():
            path = self.path.split("?")[0]
            status, content, headers = self.hub.uploads.answer(path, body, self.token, set(self.hub.models))
            self.send(status, content, **{name.replace("-", "_"): value for name, value in headers.items()})

    def answer_read(self) -> None:
        if self.is_gone() or self.is_refused():
            return None
        hub = self.hub
        parts = [unquote(part) for part in self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")]
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in hub.gated:
            return self.send(403, {}, X_Error_Code="GatedRepo")
        if not hub.may_read(repo, self.token):
            return self.send(404, {}, X_Error_Code="RepoNotFound")
        if rest == ["refs"]:
            branches = hub.uploads.repositories[repo].commits if repo in hub.uploads.repositories else ["main"]
            listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": COMMIT} for name in branches]
            return self.send(200, {"branches": listed, "converts": [], "tags": []})
        found = hub.find(repo, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self.send(404, {}, X_Error_Code="RevisionNotFound")
        folder, commit = found
        if rest and rest[0] == "resolve":
            return self.send_file(folder / "/".join(rest[2:]), commit)
        if rest and rest[0] == "tree":
            return self.send(200, self.tree(folder))
        siblings = [{"rfilename": entry["path"]} for entry in self.tree(folder)]
        private = repo in hub.private or (repo not in hub.models and hub.uploads.repositories[repo].private)
        facts = {"id": repo, "modelId": repo, "sha": commit, "tags": [], "private": private}
        return self.send(200, {**facts, "siblings": siblings})

    def tree(self, folder: Path) -> list[dict[str, object]]:
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        return [
            {"type": "file", "path": name, "size": p.stat().st_size, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name, p in files.items()
        ]

    def send_file(self, file: Path, commit: str) -> None:
        if not file.is_file():
            return self.send(404, {}, X_Error_Code="EntryNotFound")
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start, status, partial = 0, 200, {}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(asked[1]), 206
            self.hub.ranges.append((file.name, start))
            partial = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            part = content[int(asked[1]) : int(asked[2]) + 1]
            return self.send(206, part, ETag=etag, X_Repo_Commit=commit)
        rest = content[start:]
        if self.command == "GET":
            self.hub.downloads[file.name] += 1
            self.hub.on_download(file.name)
            cuts = self.hub.broken.get(file.name)
            sent = min(cuts.pop(0), len(rest)) if cuts else len(rest)
            self.hub.sent[file.name] += sent
            if sent < len(rest):
                return self.hang_up_after(rest[:sent], len(rest), status, ETag=etag, **partial)
        return self.send(status, rest, ETag=etag, X_Repo_Commit=commit, Accept_Ranges="bytes", **partial)

    def hang_up_after(self, content: bytes, announced: int, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True


@contextmanager
def serve_hub(models: dict[str, Path]) -> Iterator[Hub]:
    with TemporaryDirectory() as uploaded:
        hub = Hub("", models, Uploads(Path(uploaded)))
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
        hub.url = hub.uploads.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join(30)


def hub_settings(hub: Hub, pair: Pair) -> dict[str, str]:
    cache = str(pair.output.parent / "cache")
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": cache,
        "HF_ASSETS_CACHE": f"{cache}-assets",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


def merge_from(
    hub: Hub, pair: Pair, base: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    arguments = ("--base", base, "--adapter", pair.adapter, "-o", pair.output, "--json", *options)
    return run("peanut-merge", *arguments, **{**hub_settings(hub, pair), **environment})


MIB = 1 << 20
