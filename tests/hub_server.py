"""A Hub on loopback: the routes huggingface_hub needs to resolve, list and download a model."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, and what was asked for."""

    url: str
    models: dict[str, Path]
    private: dict[str, str] = field(default_factory=dict)  # id -> token
    gated: set[str] = field(default_factory=set)
    downloads: Counter[str] = field(default_factory=Counter)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def send(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/")
        parts = path.split("/")
        repo = "/".join(parts[:2])
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo in self.hub.gated:
            return self.send(403, b"{}", body, X_Error_Code="GatedRepo")
        if repo not in self.hub.models or self.hub.private.get(repo, token) != token:
            return self.send(404, b"{}", body, X_Error_Code="RepoNotFound")
        folder, rest = self.hub.models[repo], parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "v1", COMMIT):
            return self.send(404, b"{}", body, X_Error_Code="RevisionNotFound")
        if rest and rest[0] == "resolve":
            return self.send_file(folder / "/".join(rest[2:]), body)
        if rest and rest[0] == "tree":
            return self.send(200, json.dumps(self.tree(folder)).encode(), body, Content_Type="application/json")
        siblings = [{"rfilename": entry["path"]} for entry in self.tree(folder)]
        info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return self.send(200, json.dumps(info).encode(), body, Content_Type="application/json")

    def tree(self, folder: Path) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": p.name,
                "size": p.stat().st_size,
                "oid": hashlib.sha1(p.name.encode()).hexdigest(),
            }
            for p in sorted(folder.iterdir())
        ]

    def send_file(self, file: Path, body: bool) -> None:
        if not file.is_file():
            return self.send(404, b"{}", body, X_Error_Code="EntryNotFound")
        content = file.read_bytes()
        if body:
            self.hub.downloads[file.name] += 1
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.send(200, content, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")


@contextmanager
def serve_hub(models: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub("", models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
