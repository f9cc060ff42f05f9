"""One engine of the fleet: forwards requests to its `peanut-serve` process, and tells which variants are resident."""

import asyncio
import os
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from ray import serve

from peanut_serve.ray.child import Child, free_port
from peanut_serve.ray.settings import EngineSettings, own_folder
from peanut_serve.ray.state import StateFolder

Headers = list[tuple[bytes, bytes]]
Request = tuple[str, str, Headers, bytes]  # method, path with query, headers, body
Head = tuple[int, Headers, bytes | None]  # status, headers, the body if it is short

# of one connection (RFC 9110, 7.6.1), or set anew on the next
_CONNECTION = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"}
_CONNECTION |= {b"date", b"server"}
_OWN = {b"authorization", b"content-length"}  # of a request to the engine
_SHORT = 1 << 20  # bytes of a body that is passed on whole, with its headers
_LOOK = 0.25  # seconds between two looks at what is resident
_PATIENCE = 5.0  # seconds for an answer of the admin API
_FOREVER = httpx.Timeout(_PATIENCE, read=None)  # an answer takes as long as it takes


class EngineReplica:
    """The callable of the Serve deployment `Engine`."""

    async def __init__(  # type: ignore[misc]  # awaited by Ray
        self, settings: dict[str, Any], logs: str | None, state: str | None
    ) -> None:
        self._settings = EngineSettings.model_validate(settings)
        self.name = serve.get_replica_context().replica_id.unique_id
        self._watching: asyncio.Task[None] | None = None
        self._recent: OrderedDict[str, None] = OrderedDict()  # the variants asked for last, the latest at the end
        self._resident: tuple[str, ...] = ()
        port, admin_port = free_port(), free_port()
        key, admin_key = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        folder = Path(logs) if logs else own_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self._state = StateFolder.take(Path(state) if state else folder / "state")
        own = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin_port), "--no-console"]
        own += ["--state", str(self._state.path)]
        keys = {"VLLM_API_KEY": key, "PEANUT_ADMIN_KEY": admin_key}
        self._child = Child.start(
            [*self._settings.command, *self._settings.options, *own],
            {**self._settings.variables, **keys},
            folder / f"{self.name}.log",
            port=port,
            grace=self._settings.stop_seconds,
        )
        await self._child.wait_until_ready(within=self._settings.start_seconds)
        self._key = f"Bearer {key}".encode()
        self._client = httpx.AsyncClient(base_url=self._child.address, timeout=_FOREVER, limits=httpx.Limits())
        self._admin = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{admin_port}/admin/v1",
            headers={"Authorization": f"Bearer {admin_key}"},
            timeout=_PATIENCE,
        )
        self._watching = asyncio.create_task(self._watch())

    async def handle(self, variant: str, request: Request) -> AsyncIterator[Head | bytes]:
        """The head; if the body is not in it, then the parts of the body as they come.

        A short body is not divided, so that its request can be tried again elsewhere until the answer is there.
        """
        self._note(variant)
        method, path, headers, body = request
        kept = [(key, value) for key, value in end_to_end(headers) if key not in _OWN]
        kept.append((b"authorization", self._key))
        async with self._client.stream(method, path, headers=kept, content=body) as answer:
            kept = end_to_end([(key.lower(), value) for key, value in answer.headers.raw])
            short = int(answer.headers.get("content-length", _SHORT + 1)) <= _SHORT
            yield answer.status_code, kept, await _whole(answer) if short else None
            if not short:
                async for part in answer.aiter_raw():
                    yield part

    def _note(self, variant: str) -> None:
        self._recent[variant] = None
        self._recent.move_to_end(variant)
        while len(self._recent) > self._settings.slots:
            self._recent.popitem(last=False)

    async def call_admin(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The name of this replica, and status and JSON of an answer of the engine's admin API."""
        try:
            answer = await self._admin.request(method, path, json=body, timeout=_FOREVER)
        except httpx.HTTPError as error:
            return {"replica": self.name, "status": 503, "error": f"the engine did not answer: {error!r}"}
        found = answer.json() if answer.content else None
        return {"replica": self.name, "status": answer.status_code, "answer": found}

    async def report(self) -> dict[str, Any]:
        """The name of this replica, the state of its engine, what is resident, and the digest of each name."""
        engine = await self.call_admin("GET", "/engine")
        variants = await self.call_admin("GET", "/variants")
        if (status := max(engine["status"], variants["status"])) != httpx.codes.OK:
            return {"replica": self.name, "status": status, "engine": engine.get("answer")}
        digests = {one["name"]: one["digest"] for one in variants["answer"]}
        resident = list(self._resident)
        return {
            "replica": self.name,
            "status": status,
            "engine": engine["answer"],
            "resident": resident,
            "digests": digests,
        }

    def record_routing_stats(self) -> dict[str, Any]:
        """For the router: the variants that are resident. Ray sends this to the front when it has changed."""
        return {"resident": list(self._resident), "slots": self._settings.slots}

    async def check_health(self) -> None:
        """Ray replaces this replica if this raises."""
        (await self._client.get("/health", timeout=_PATIENCE)).raise_for_status()

    async def _watch(self) -> None:
        digest = None
        while True:
            if self._child.exit_status is not None:
                os._exit(1)  # at once, so that Ray sends no request here any more; the watchdog cleans up
            if self._settings.slots > 1:
                self._resident = tuple(sorted(self._recent))
            else:
                try:
                    digest = await self._look_at_engine(digest)
                except (httpx.HTTPError, ValueError, KeyError):
                    digest = None  # what was known last may still be right
            await asyncio.sleep(_LOOK)

    async def _look_at_engine(self, known: str | None) -> str:
        """The digest that the engine has now; if it is not the known one, all its names are resident."""
        engine = (await self._admin.get("/engine")).raise_for_status().json()
        digest: str = engine["digest"]
        if digest != known:
            variants = (await self._admin.get("/variants")).raise_for_status().json()
            self._resident = tuple(sorted(one["name"] for one in variants if one["digest"] == digest))
        return digest

    async def __del__(self) -> None:
        """Awaited by Ray when the replica is removed: ends the engine, which first answers what it runs."""
        if self._watching is not None:
            self._watching.cancel()
        await self._child.stop()
        self._state.close()


async def _whole(answer: httpx.Response) -> bytes:
    return b"".join([part async for part in answer.aiter_raw()])


def end_to_end(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """The headers that a proxy passes on."""
    return [(key, value) for key, value in headers if key.lower() not in _CONNECTION]
