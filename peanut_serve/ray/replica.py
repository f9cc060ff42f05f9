"""One engine of the fleet: forwards requests to its `peanut-serve` process, and tells which variants are resident."""

import asyncio
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from ray import serve

from peanut_serve.errors import EngineDownError, EngineLostError, EngineStartError
from peanut_serve.ray.child import Child, free_port
from peanut_serve.ray.fleet.metrics import labelled
from peanut_serve.ray.fleet.operated import OperatedReplica
from peanut_serve.ray.fleet.replay import Replay
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.theta import FleetTheta
from peanut_serve.ray.fleet.wanted import base_of
from peanut_serve.ray.settings import EngineSettings, own_folder, state_folders
from peanut_serve.ray.state import StateFolder
from peanut_serve.settings.versions import CURRENT
from peanut_serve.tenants.visits import FRONT

# options of an engine that a fleet decides: one in the environment of a node is not to count
_DECIDED = (
    *("PEANUT_API_KEY_FILE", "PEANUT_ADMIN_KEY_FILE", "PEANUT_ADMIN_HOST", "PEANUT_AUDIT_LOG", "PEANUT_KEYS"),
    *("PEANUT_ADMIN_SSL_CERTFILE", "PEANUT_ADMIN_SSL_KEYFILE"),
)
_PORT_TAKEN = ("ddress already in use", "cannot listen on")  # in the log of an engine that ended
Headers = list[tuple[bytes, bytes]]
Request = tuple[str, str, Headers, bytes]  # method, path with query, headers, body
Head = tuple[int, Headers, bytes | None]  # status, headers, body if short

# of one connection (RFC 9110, 7.6.1), or set anew on the next
_CONNECTION = {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"}
_CONNECTION |= {b"date", b"server"}
_OWN = {b"authorization", b"content-length"}  # of a request to the engine
_SHORT = 1 << 20  # bytes of a body that is passed on whole, with its headers
_LOOK = 0.25  # seconds between two looks at what is resident
_RENEW = 5.0  # seconds after which the names of the same weights are looked up again
_SERVES = ("serving", "swapping")  # states of an engine that answers, now or after a swap
_TOGETHER = ("base", "lora")  # kinds of variants whose requests run beside each other
_PATIENCE = 5.0  # seconds for an answer of the admin API
_LOOKS = 2  # at an engine that may have died
_GLANCE = 3.0  # seconds for the metrics
_FOREVER = httpx.Timeout(_PATIENCE, read=None)  # an answer takes as long as it takes


class EngineReplica(OperatedReplica):
    """The callable of the Serve deployment `Engine`."""

    async def __init__(  # type: ignore[misc]  # awaited by Ray
        self, settings: dict[str, Any], logs: str | None, state: str | None
    ) -> None:
        self._settings = EngineSettings.model_validate(settings)
        context = serve.get_replica_context()
        self.name = context.replica_id.unique_id
        self._watching: list[asyncio.Task[None]] = []
        self._recent: OrderedDict[str, None] = OrderedDict()  # the variants asked for last, the latest at the end
        self._resident: tuple[str, ...] = ()
        self._together: tuple[str, ...] = ()  # the variants that one set of weights answers: the base and LoRA
        self._serves = True
        folder = Path(logs) if logs else own_folder()
        folder.mkdir(parents=True, exist_ok=True)
        folders = state_folders(folder, Path(state) if state else None)
        self._state = StateFolder.take(folders)
        try:
            await self._start_engine(folder)
        except EngineStartError as error:
            if not any(sign in str(error) for sign in _PORT_TAKEN):
                raise
            await self._start_engine(folder)  # another program was given one of its ports before it was bound
        store = WantedStore(context.app_name, base_of(self._settings.options), folders)
        engines = serve.get_deployment_handle(context.deployment, context.app_name)
        self._replay = Replay(store, self.call_admin, FleetTheta(self._state.path, engines))
        await self._replay.start()
        self._watching = [asyncio.create_task(self._watch()), asyncio.create_task(self._replay.run())]

    async def _start_engine(self, logs: Path) -> None:
        """Start the engine on ports that are free now, and wait until it is ready. Raises `EngineStartError`."""
        port, admin_port = free_port(), free_port()
        key, admin_key = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        own = ["--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin_port), "--no-console"]
        own += ["--state", str(self._state.path)]
        keys = {**dict.fromkeys(_DECIDED, ""), "VLLM_API_KEY": key, "PEANUT_ADMIN_KEY": admin_key, FRONT: "1"}
        self._child = Child.start(
            [*self._settings.command, *self._settings.options, *own],
            {**self._settings.variables, **keys},
            logs / f"{self.name}.log",
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

    async def handle(self, asked: str, variant: str, request: Request) -> AsyncIterator[Head | bytes]:
        """The head; if the body is not in it, then the parts of the body as they come.

        A short body is not divided, so that its request can be tried again elsewhere until the answer is there.

        Args:
            asked: the variant in the request.
            variant: the one that answers, as far as the front knows: another one while a release is open.
            request: for the engine.

        Raises `EngineDownError` if this replica lacks the wanted version of the variant, and `EngineLostError` if its
        engine died.
        """
        self._note(asked, variant)
        method, path, headers, body = request
        kept = [(key, value) for key, value in end_to_end(headers) if key not in _OWN]
        kept.append((b"authorization", self._key))
        async with self._client.stream(method, path, headers=kept, content=body) as answer:
            if answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR and await self._has_died():
                self._serves = False
                raise EngineLostError("the engine that answered died; send the request again")
            kept = end_to_end([(key.lower(), value) for key, value in answer.headers.raw])
            short = int(answer.headers.get("content-length", _SHORT + 1)) <= _SHORT
            yield answer.status_code, kept, await _whole(answer) if short else None
            if not short:
                async for part in answer.aiter_raw():
                    yield part

    async def _has_died(self) -> bool:
        """Whether something says that the engine died, which ends what it ran with an error of the server.

        An engine that is slow to answer has not: its error is that of the request, which would fail elsewhere, too.
        """
        for _ in range(_LOOKS):
            try:
                answer = await self._client.get("/ready", timeout=_PATIENCE)
                return answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            except httpx.ConnectError:
                return True  # nobody listens any more
            except httpx.TimeoutException:
                break
            except httpx.TransportError:
                continue  # the connection was closed, maybe because it was old: another one tells more
        return self._child.exit_status is not None or not self._serves

    def _note(self, asked: str, variant: str) -> None:
        """Note that a request has come. Raises `EngineDownError` if its variant is withheld.

        One that is here without its staged version gives that no share: its engine answers with the current one.
        """
        if (reason := self._replay.withheld.get(asked.removesuffix(CURRENT))) is not None:
            raise EngineDownError(f"this replica does not have the wanted version of {asked}: {reason}", 5)
        self._recent[variant] = None
        self._recent.move_to_end(variant)
        while len(self._recent) > self._settings.slots:
            self._recent.popitem(last=False)

    async def metrics(self) -> dict[str, Any]:
        """The families of the engine's metrics, labelled; without them and with an error if it does not answer."""
        try:
            page = (await self._client.get("/metrics", timeout=_GLANCE)).raise_for_status().text
            return {"replica": self.name, "families": await asyncio.to_thread(labelled, page, self.name)}
        except (httpx.HTTPError, ValueError) as error:
            return {"replica": self.name, "error": f"{type(error).__name__}: {error}"}

    def record_routing_stats(self) -> dict[str, Any]:
        """For the router. Ray sends this to the front when it has changed.

        resident: what requests need not wait for; slots: how many variants that can be; together: those that share
        the base's weights, where weights are swapped; withheld: what is refused; serves: whether the engine is up.
        """
        return {
            "resident": list(self._resident),
            "slots": self._settings.slots,
            "together": list(self._together),
            "withheld": sorted(self._replay.withheld),
            "serves": self._serves,
        }

    async def check_health(self) -> None:
        """Ray replaces this replica if this raises."""
        (await self._client.get("/health", timeout=_PATIENCE)).raise_for_status()

    async def _watch(self) -> None:
        known, since = "", 0.0
        while True:
            if self._child.exit_status is not None:
                os._exit(1)  # at once, so that Ray sends no request here any more; the watchdog cleans up
            try:
                engine = (await self._admin.get("/engine")).raise_for_status().json()
                self._serves = engine["state"] in _SERVES
                if self._settings.slots > 1:
                    self._resident = tuple(sorted(self._recent))
                elif (digest := engine["digest"]) != known or time.monotonic() - since > _RENEW:
                    await self._look_at_variants(digest)
                    known, since = digest, time.monotonic()
            except (httpx.HTTPError, ValueError, KeyError):
                known = ""  # what was known last may still be right
            await asyncio.sleep(_LOOK)

    async def _look_at_variants(self, digest: str) -> None:
        """Note the names of the weights that the engine has now, and those that share the base's."""
        variants = (await self._admin.get("/variants")).raise_for_status().json()
        self._together = tuple(sorted(one["name"] for one in variants if one["kind"] in _TOGETHER))
        self._resident = tuple(sorted(one["name"] for one in variants if one["digest"] == digest))
        if set(self._resident) & {one["name"] for one in variants if one["kind"] == "base"}:
            self._resident = tuple(sorted({*self._resident, *self._together}))

    async def __del__(self) -> None:
        """Awaited by Ray when the replica is removed: ends the engine, which first answers what it runs."""
        for task in self._watching:
            task.cancel()
        await self._child.stop()
        self._state.close()


async def _whole(answer: httpx.Response) -> bytes:
    return b"".join([part async for part in answer.aiter_raw()])


def end_to_end(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """The headers that a proxy passes on."""
    return [(key, value) for key, value in headers if key.lower() not in _CONNECTION]
