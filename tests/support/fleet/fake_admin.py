"""The admin side of a fake engine: versions, what a state folder keeps, and changes, as those of a real one.

Files and versions are only digests. Beside the journal, `files.json` says which digest the files of a name have; by
default that is the digest of `NAMES`. While there is a file `slow`, changes take a while. In the state folder,
`refuses` has names of which this engine refuses changes.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

NAMES = {"base": "base", "prod": "v0"} | {f"v{number}": f"v{number}" for number in range(10)}  # name -> digest


def digest_of(text: str) -> str:
    """A digest in its usual form."""
    return hashlib.sha1(text.encode()).hexdigest()


class RefusalError(Exception):
    """Status and message of an error."""


class FakeAdmin:
    """The variants of an engine, by name."""

    def __init__(self, folder: Path, state: Path | None) -> None:
        self.folder, self.state = folder, state
        if state is not None:
            (state / "theta").mkdir(parents=True, exist_ok=True)
        saved = self._file("records.json")
        self.records: dict[str, dict[str, Any]] = json.loads(saved.read_text()) if saved and saved.exists() else {}
        for name in NAMES:
            self.records.setdefault(name, self.record(name))

    def record(self, source: str) -> dict[str, Any]:
        return {"source": source, "digest": None, "previous": [], "seen": None, "pinned": False, "held": False}

    def _file(self, name: str) -> Path | None:
        return self.state / name if self.state else None

    def in_files(self, source: str) -> str | None:
        changed = self.folder / "files.json"
        return (NAMES | (json.loads(changed.read_text()) if changed.exists() else {})).get(source)

    def has_theta(self, digest: str) -> bool:
        """Whether the state folder has θ of a version."""
        kept = self._file(f"theta/{digest}")
        return kept is not None and kept.is_dir()

    def current(self, name: str) -> str | None:
        """The digest that a request for a name is answered with; it moves with the files, unless it is held."""
        record = self.records.get(name)
        if record is None or record.get("hidden"):
            return None
        found = self.in_files(record["source"])
        if found is not None and not record["held"] and found != record["seen"]:
            self.move(record, found, found)
        return record["digest"]

    def move(self, record: dict[str, Any], digest: str, seen: str | None, held: bool = False) -> None:
        if digest != record["digest"]:
            record["previous"] = [one for one in (record["digest"], *record["previous"]) if one not in (None, digest)]
        record |= {"digest": digest, "seen": seen, "held": held}
        if self.state is not None:
            (self.state / "theta" / digest).mkdir(parents=True, exist_ok=True)
            (self.state / "theta" / digest / "theta").write_text(digest)
        self.save()

    def save(self) -> None:
        if (file := self._file("records.json")) is not None:
            file.write_text(json.dumps(self.records))

    def status(self, name: str) -> dict[str, Any]:
        record = self.records[name]
        counts = {"host_bytes": 10, "running": 0, "waiting": 0, "requests": 3, "swaps": 1, "last_used": None}
        return {
            **{key: record[key] for key in ("source", "previous", "pinned", "held")},
            **counts,
            "name": name,
            "kind": "base" if name == "base" else "adapter",
            "state": "ready",
            "pid": os.getpid(),
            "digest": record["digest"] or self.in_files(record["source"]),
            "last_swap_seconds": None,
            "error": None,
        }

    def refuses(self, name: str) -> bool:
        """Whether this engine refuses changes of a name."""
        file = self._file("refuses")
        return file is not None and file.exists() and name in file.read_text().split()

    def change(self, verb: str, name: str, body: dict[str, Any] | None) -> dict[str, Any] | None:
        """Make a change, and return the status. Raises `RefusalError`."""
        if self.refuses(name):
            raise RefusalError(422, f"{name} cannot be changed here")
        if verb == "register" and body is not None:
            if name in self.records:
                raise RefusalError(409, f"there is already a variant {name}")
            self.records[name] = self.record(body["source"])
        if name not in self.records:
            raise RefusalError(404, f"no {name}")
        record = self.records[name]
        if verb in ("reload", "rollback", "unregister") and (record.get("release") or {}).get("state") == "staged":
            raise RefusalError(409, f"{name} has a release")
        if verb == "unregister":
            del self.records[name]
            self.save()
            return None
        if verb in ("register", "reload"):
            found = self.in_files(record["source"])
            if found is None:
                raise RefusalError(422, f"there are no files of {record['source']}")
            self.move(record, digest_of(str(os.getpid())) if name == "v9" else found, found)
        if verb == "rollback":
            self._roll_back(name, record, (body or {}).get("digest"), (body or {}).get("hold", False))
        record["pinned"] = verb == "pin" or (record["pinned"] and verb != "unpin")
        self.save()
        return self.status(name)

    def _roll_back(self, name: str, record: dict[str, Any], digest: str | None, hold: bool) -> None:
        known = [record["digest"], *record["previous"]]
        if digest not in known and not self.has_theta(str(digest)):
            raise RefusalError(422, f"{name} has no such earlier version")
        self.move(record, str(digest), self.in_files(record["source"]), hold)

    # over HTTP

    async def list_all(self, _: Request) -> Response:
        return JSONResponse([self.status(name) for name in self.records])

    async def show(self, request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(self.status(name)) if name in self.records else self._refusal(404, f"no {name}")

    def answer(self, verb: str, name: str, body: dict[str, Any] | None) -> Response:
        """To a change."""
        return self.tell(lambda: self.change(verb, name, body))

    def tell(self, make: Callable[[], dict[str, Any] | None]) -> Response:
        """What a function returns, or the refusal that it raises."""
        try:
            found = make()
        except RefusalError as error:
            return self._refusal(*error.args)
        return Response(status_code=204) if found is None else JSONResponse(found)

    def _refusal(self, status: int, message: str) -> Response:
        kind = "UnknownVariantError" if status == 404 else "VariantError"
        return JSONResponse({"error": {"type": kind, "message": message}}, status)

    def routes(self) -> list[Route]:
        """Without those that need the engine."""
        return [
            Route("/admin/v1/variants", self.list_all),
            Route("/admin/v1/variants/{name:path}", self.show),
        ]
