"""A fake engine, and the replay of a replica that has it; without Ray."""

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from support.fleet.fake_admin import FakeAdmin
from support.fleet.fake_releases import FakeReleases

from peanut_serve.ray.fleet.replay import Replay
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.wanted import WantedState
from peanut_serve.variants.kept_theta import add_theta


class Engine:
    """A fake engine, and the replay of a replica that has it."""

    def __init__(
        self, folder: Path, state: str = "0", theta: dict[str, bytes] | None = None, store: WantedStore | None = None
    ) -> None:
        self.state, self.theta, self.calls = folder / state, theta, list[str]()
        self.withheld_meanwhile = list[bool]()  # whether the name was, at each of the calls
        self.state.mkdir(exist_ok=True)
        (self.state / "theta").mkdir(exist_ok=True)
        self.admin = FakeAdmin(folder, self.state)
        self.releases = FakeReleases(self.admin)
        self.replay = Replay(store, self.call, self)  # type: ignore[arg-type]  # only `start` and `run` need it

    async def call(self, method: str, path: str, body: Any) -> dict[str, Any]:
        kind, name, verb = [*map(unquote, path.partition("?")[0].strip("/").split("/")), "", ""][:3]
        if kind == "releases":
            return self.call_release(method, name, verb, body)
        if method == "GET":
            found = self.admin.status(name) if name in self.admin.records else None
            return {"replica": "a", "status": 200 if found else 404, "answer": found}
        verb = "unregister" if method == "DELETE" else verb or "register"
        self.calls.append(verb)
        self.withheld_meanwhile.append(name in self.replay.withheld)
        answer = self.admin.answer(verb, name or body["name"], body)
        return {"replica": "a", "status": answer.status_code, "answer": json.loads(bytes(answer.body) or b"null")}

    def call_release(self, method: str, name: str, verb: str, body: Any) -> dict[str, Any]:
        if method == "GET":
            answer = self.admin.tell(lambda: self.releases.find(name) if name else self.releases.all())
        else:
            self.calls.append(f"release {verb}")
            self.withheld_meanwhile.append(name in self.replay.withheld)
            answer = self.admin.tell(lambda: self.releases.make(verb, name, body or {}))
        return {"replica": "a", "status": answer.status_code, "answer": json.loads(bytes(answer.body) or b"null")}

    async def fetch(self, digest: str) -> bool:
        if self.theta is not None:
            add_theta(self.state, digest, self.theta)
        return self.theta is not None

    def follow(self, state: WantedState, done: bool = False) -> None:
        asyncio.run(self.replay.follow(state, done))
