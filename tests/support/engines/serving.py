"""A real `peanut-serve` in a process of its own, and clients for it."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai
from support.engines.process_tree import command_of, descendants_of
from support.paths import ROOT

QUESTIONS = (
    "What is the capital of Italy?",
    "What color is grass?",
    "Tom has 4 apples and gets 5 more. How many apples does Tom have now?",
)


START_SECONDS = 600
PROGRAM = Path(sys.executable).parent / "peanut-serve"


@dataclass(frozen=True)
class Server:
    """A server that is up."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)


def environment(folder: Path) -> dict[str, str]:
    """For processes with vLLM in them; what is evaluated goes to `folder`."""
    own = {"PEANUT_CACHE": str(folder / "evaluated"), "PEANUT_STATE": str(folder / "state")}
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **own}


def free_port() -> int:
    """A port that nothing listens on, below those that the kernel gives to connections until it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def serving(
    base: Path,
    adapters: Path,
    folder: Path,
    *options: str,
    program: Sequence[str | Path] = (PROGRAM,),
    **variables: str,
) -> Iterator[Server]:
    """Start `peanut-serve` and wait until it answers; stop it at the end."""
    port = free_port()
    command = [*program, "--base", base, "--adapters", adapters, "--port", str(port), *options]
    log = folder / "server.log"
    with log.open("wb") as into:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=into,
            stderr=subprocess.STDOUT,
            env={**environment(folder), **variables},
            cwd=ROOT,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
    except BaseException:
        print(log.read_text()[-20_000:])  # pytest shows it beside what failed
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()


@contextmanager
def stalled_reader(server: Server, path: str, body: bytes) -> Iterator[socket.socket]:
    """A client that has sent a request, with little room for a response that it does not read."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer none\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield client


def kill(server: Server, name: str) -> None:
    """SIGKILL a process of the server's, by the name that vLLM gives it."""
    pids = descendants_of(server.process.pid)
    os.kill(next(pid for pid in pids if command_of(pid).startswith(name)), signal.SIGKILL)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=30):
                return
        except OSError:
            if server.process.poll() is not None:
                raise RuntimeError(server.log.read_text()[-4000:]) from None
            time.sleep(0.5)
    raise TimeoutError(f"the server was not up after {START_SECONDS} s: {server.log.read_text()[-4000:]}")


def status_of(server: Server, probe: str) -> int:
    """The status of an answer of `health` or `ready`."""
    try:
        with urllib.request.urlopen(f"{server.url}/{probe}", timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def answer(client: openai.OpenAI, task: str, question: str, tokens: int = 24, **more: object) -> str:
    """Greedy."""
    found = client.chat.completions.create(
        model=task, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=tokens, **more
    )
    return str(found.choices[0].message.content)
