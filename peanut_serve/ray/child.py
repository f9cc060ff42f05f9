"""The `peanut-serve` process of a replica: started, watched until it is ready, and ended with all that it started."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx

from peanut_serve.errors import EngineStartError

_LOOK = 0.2  # seconds between two looks at a server that starts
_LAST_LINES = 20  # of the log, in the error of a failed start
_KILLED = 10.0  # seconds that the watchdog may take after the grace


class Child:
    """A server on a loopback port, run by the watchdog (`peanut_serve.ray.watchdog`)."""

    def __init__(self, watchdog: "subprocess.Popen[bytes]", port: int, log: Path, grace: float) -> None:
        self._watchdog, self._log, self._grace = watchdog, log, grace
        self.address = f"http://127.0.0.1:{port}"

    @classmethod
    def start(
        cls, command: Sequence[str], environment: Mapping[str, str], log: Path, *, port: int, grace: float = 30.0
    ) -> Self:
        """Start a command that will serve at a port.

        Args:
            command: the program and its arguments, the port among them.
            environment: added to that of this process.
            log: file that gets the output.
            port: where it serves on loopback; see `free_port`.
            grace: seconds between SIGTERM and SIGKILL when it is stopped.
        """
        run = [sys.executable, "-m", "peanut_serve.ray.watchdog", str(grace), *command]
        with log.open("wb") as output:
            watchdog = subprocess.Popen(
                run, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **environment}
            )
        return cls(watchdog, port, log, grace)

    @property
    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._watchdog.poll()

    async def wait_until_ready(self, path: str = "/health", within: float = 1800.0) -> None:
        """Wait until a GET of the path is answered with 200.

        Raises `EngineStartError`, with the last lines of the log, if the process ends or `within` seconds pass; the
        process is ended then.
        """
        try:
            async with asyncio.timeout(within), httpx.AsyncClient(base_url=self.address, timeout=5.0) as client:
                while not await self._answers(client, path):
                    if self.exit_status is not None:
                        raise EngineStartError(
                            f"the engine ended with status {self.exit_status}:\n{self.last_lines()}"
                        )
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            await self.stop()
            raise EngineStartError(f"the engine was not ready within {within:g} s:\n{self.last_lines()}") from None

    async def _answers(self, client: httpx.AsyncClient, path: str) -> bool:
        try:
            return (await client.get(path)).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def last_lines(self) -> str:
        """The end of the log."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])

    async def stop(self) -> None:
        """End it and everything that it started. The wait is bounded."""
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.close()  # the watchdog sees that, also if this process is killed instead
        try:
            await asyncio.to_thread(self._watchdog.wait, self._grace + _KILLED)
        except subprocess.TimeoutExpired:
            self._watchdog.kill()  # the kernel then kills the server, and that its engine


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
