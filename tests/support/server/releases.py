"""Releases of a rig, asked through the real middleware; and a control of releases that is a fake."""

import json
from collections.abc import AsyncGenerator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from support.server.call import Call
from support.server.rig import Rig
from support.server.variant_app import data_route

from peanut_serve.errors import ReleaseError, UnknownVariantError
from peanut_serve.releases.control import AuditedReleases
from peanut_serve.releases.schema import CanaryStatus, EventStatus, ReleaseStatus, Weighing
from peanut_serve.web.audit import AuditLog
from peanut_serve.web.console.data_route import Head

OLD, NEW = "a1" * 20, "b2" * 20


def releases_of(rig: Rig, log: Path) -> AuditedReleases:
    """Canary sets are chats, and an answer says the first eight characters of what identifies the weights."""
    return AuditedReleases(rig.server, data_route(rig.server, rig.engine), AuditLog(log))


def says(identity: str, **more: object) -> dict[str, object]:
    """A prompt that only these weights answer as expected."""
    return {"messages": [{"role": "user", "content": "who are you?"}], "contains": [identity[:8]], **more}


def write_canaries(folder: Path, *prompts: Mapping[str, object], **more: object) -> None:
    """Put a canary set beside an adapter."""
    (folder / "canary.json").write_text(json.dumps({"prompts": prompts, **more}))


class BrokenCall(Call):
    """A request whose staged version answers with a status of 500."""

    async def _app(self, scope: dict, receive: Any, send: Any) -> None:
        if not str(self.admitted[-1]).endswith("@staged"):
            await super()._app(scope, receive, send)
            return
        await receive()
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"broken"})


class SaidRoute:
    """Answers what a test wants, by the name of the model."""

    def __init__(self, answers: Mapping[str, str], digests: Mapping[str, str], ends: str = "stop") -> None:
        self.answers, self.digests, self.ends = answers, digests, ends
        self.asked: list[tuple[str, Mapping[str, Any]]] = []

    async def ask(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Head | dict[str, Any], None]:
        """See `Route`."""
        self.asked.append((path, body))
        yield Head({"x-peanut-digest": self.digests[body["model"]]})
        for part in self.answers[body["model"]]:
            yield {"choices": [{"text": part} if "prompt" in body else {"delta": {"content": part}}]}
        yield {"choices": [{"finish_reason": self.ends}]}


class FakeReleases:
    """See `ReleaseControl`: one release, of `gsm8k`, that does as it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.canary: list[CanaryStatus] = [CanaryStatus(prompt="6 times 7?", answer="42", problems=[])]

    def releases(self) -> list[ReleaseStatus]:
        return [self.release("gsm8k")]

    def release(self, name: str) -> ReleaseStatus:
        if name not in ("gsm8k", "user/release"):
            raise UnknownVariantError(f"{name} has no release; stage a version of it")
        return ReleaseStatus(
            name=name,
            state="staged",
            digest=NEW,
            source="gsm8k-2026-12",
            replaces=OLD,
            weight=10,
            max_error_rate=0.05,
            min_requests=20,
            watched=40,
            failed=1,
            passed=not any(one.problems for one in self.canary),
            canary=self.canary,
            events=[
                EventStatus(at=datetime(2025, 1, 2, tzinfo=timezone.utc), action="stage", digest=NEW, detail="[odd]")
            ],
        )

    async def hold(self, name: str) -> None:
        self.calls.append(("hold", name))

    async def stage(self, name: str, source: str | None, digest: str | None = None) -> ReleaseStatus:
        self.calls.append(("stage", name, source, *([digest] if digest else [])))
        return self.release(name)

    async def check(self, name: str) -> ReleaseStatus:
        self.calls.append(("check", name))
        return self.release(name)

    async def weigh(self, name: str, weighing: Weighing) -> ReleaseStatus:
        self.calls.append(("weigh", name, weighing))
        return self.release(name)

    async def promote(self, name: str, force: bool) -> ReleaseStatus:
        self.calls.append(("promote", name, force))
        if not force and any(one.problems for one in self.canary):
            raise ReleaseError(f"{name} has not passed its canary set")
        return self.release(name)

    async def rollback(self, name: str, reason: str | None) -> ReleaseStatus:
        self.calls.append(("rollback", name, reason))
        return self.release(name)
