"""Clients of a server that answers POST: each sends its next request when it has the answer to the last one."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

_WAIT = 120.0  # seconds for an answer


@dataclass(frozen=True)
class Load:
    """What clients saw: answers per second, and seconds of the median and of the slowest twentieth."""

    rate: float
    p50: float
    p95: float


def percentile(seconds: Sequence[float], share: float) -> float:
    """The time that this share of the answers needed at most."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ask(url: str, bodies: Sequence[bytes], content_type: str, clients: int, seconds: float) -> Load:
    """Let so many clients ask for so long. Raises `RuntimeError` if an answer is no 200."""
    return asyncio.run(_ask(url, bodies, content_type, clients, seconds))


async def _ask(url: str, bodies: Sequence[bytes], content_type: str, clients: int, seconds: float) -> Load:
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\nContent-Length: "
    requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
    found: list[float] = []
    start = time.perf_counter()

    async def client(number: int) -> None:
        """Send one request after another until the time is over."""
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        turn = number
        while time.perf_counter() - start < seconds:
            sent = time.perf_counter()
            writer.write(requests[turn % len(requests)])
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _WAIT)
            fields = answer.lower().split(b"\r\n")
            size = next(int(field.split(b":")[1]) for field in fields if field.startswith(b"content-length"))
            body = await asyncio.wait_for(reader.readexactly(size), _WAIT)
            if b" 200 " not in fields[0]:
                raise RuntimeError(f"{fields[0].decode()}: {body[:300].decode(errors='replace')}")
            found.append(time.perf_counter() - sent)
            turn += clients
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return Load(len(found) / (time.perf_counter() - start), percentile(found, 0.5), percentile(found, 0.95))
