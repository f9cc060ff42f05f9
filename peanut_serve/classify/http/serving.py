"""Listening, and a stop that loses nothing."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvicorn

from peanut_serve.classify.http.app import classify_app
from peanut_serve.classify.http.console import TaskConsole
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.settings.hosts import refuse_open
from peanut_serve.settings.tls import Certificate
from peanut_serve.signals.json_logs import uvicorn_logging
from peanut_serve.tenants.visits import Tenants
from peanut_serve.web.connections import BoundedProtocol, bind
from peanut_serve.web.request_body import ClientLimits

logger = logging.getLogger("peanut_serve.classify")

_FAREWELL = 0.5  # seconds in which clients of open connections learn that there will be no further answer on them
_SHOWN = 10  # names in a message
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SWITCH = 0.0005  # seconds: a run that has ended waits no longer for the thread of the event loop


class _Server(uvicorn.Server):
    """Stops in three steps: says so on every connection, accepts no more of them, answers what it has."""

    def __init__(self, config: "uvicorn.Config", tasks: TaskServer) -> None:
        super().__init__(config)
        self._tasks = tasks

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Exit with 0 after a signal; uvicorn would raise it again."""
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop. From the first step on, /ready says 503, and each answer closes its connection."""
        self._tasks.is_ready = False
        logger.info("stopping: %d inputs are waiting", self._tasks.waiting)
        await asyncio.sleep(_FAREWELL)
        await super().shutdown(sockets)


def check_host(host: str, has_keys: bool) -> None:
    """Raise `OptionError` for an address that others can reach, if no key is needed."""
    refuse_open(host, has_keys)


def check(tasks: TaskServer) -> None:
    """Open every task, and print a line with its name, digest and kind. Raises `PeanutError` if one is broken."""

    async def opened() -> None:
        async with tasks:
            for name in await tasks.names():
                version = await tasks.load(name)
                print(f"{name}\t{version.digest}\t{version.task.kind.task}", flush=True)

    asyncio.run(opened())


def serve(
    tasks: TaskServer,
    host: str,
    port: int,
    keys: list[str],
    limits: ClientLimits,
    console: TaskConsole | None = None,
    tenants: Tenants | None = None,
    certificate: Certificate | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. The first line on stdout is the address.

    Raises `OptionError` if the address cannot be used, or others can reach it and there is no key, and what
    `classify_app` raises.
    """
    check_host(host, bool(keys) or tenants is not None)
    listener = bind(host, port, "the server")
    sys.setswitchinterval(_SWITCH)
    address, own = listener.getsockname()[:2]
    if console is not None:
        console = replace(console, port=own, hosts=(host, *console.hosts))
    files = {"ssl_certfile": certificate.certfile, "ssl_keyfile": certificate.keyfile} if certificate else {}
    config = uvicorn.Config(
        classify_app(tasks, keys, limits, console, tenants),
        log_level="warning",
        access_log=False,  # uvicorn would format a line for each request before it drops it
        ws="none",
        server_header=False,
        http=BoundedProtocol,
        **uvicorn_logging(),
        timeout_graceful_shutdown=int(tasks.limits.wait_seconds) + 1,
        **files,  # type: ignore[arg-type]
    )
    shown = f"{'https' if certificate else 'http'}://{f'[{address}]' if ':' in address else address}:{own}"
    names = tasks.library.names()
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    if console is not None:
        logger.info("the console is at %s/console", shown)
    print(f"serving {', '.join(names[:_SHOWN])}{more} on {shown}", flush=True)
    _Server(config, tasks).run([listener])  # on uvloop where it is installed
