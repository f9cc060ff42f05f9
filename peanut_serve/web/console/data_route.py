"""Asks the server's own route for completions, in this process, as a client would: with a key, through the gate."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_MOST_QUEUED = 64  # parts of an answer that have not been read
_FAREWELL_SECONDS = 5.0


class RouteError(Exception):
    """The route refused the request, or the answer broke off; the message is the server's."""


@dataclass(frozen=True)
class Head:
    """The beginning of an answer: the headers that say which weights gave it."""

    headers: Mapping[str, str]


class DataRoute:
    """The application that serves completions.

    Args:
        app: it, with all its middleware.
        key: one of the keys that it accepts; None if it needs none.
    """

    def __init__(self, app: App, key: str | None) -> None:
        self._app, self._key = app, key

    async def ask(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Head | dict[str, Any], None]:
        """The beginning of a streamed answer, then its events as they come. Raises `RouteError`."""
        status, buffer, content = 0, b"", b""
        async with aclosing(self._messages(path, json.dumps(body).encode())) as messages:
            async for message in messages:
                if message["type"] == "http.response.start":
                    status = message["status"]
                    if status == 200:
                        yield Head({key.decode(): value.decode() for key, value in message.get("headers", ())})
                elif status != 200:
                    content += message.get("body", b"")
                else:
                    *lines, buffer = (buffer + message.get("body", b"")).split(b"\n")
                    for event in map(_event, lines):
                        if event is not None:
                            yield event
        if status != 200:
            raise RouteError(_error_in(content, status))

    async def _messages(self, path: str, body: bytes) -> AsyncGenerator[Message, None]:
        """What the application sends. It is stopped if the reader does not read to the end."""
        queue: asyncio.Queue[Message | None] = asyncio.Queue(_MOST_QUEUED)
        requests = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> Message:
            """The request; then nothing, until the reader has left."""
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(self._scope(path, len(body)), receive, queue.put)
            finally:
                if not gone.is_set():  # a reader that has left makes no room
                    await queue.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await queue.get()) is not None:
                yield message
            await task
        except RouteError:
            raise
        except Exception as error:
            raise RouteError(f"the server failed with {type(error).__name__}; see its log") from error
        finally:
            gone.set()
            task.cancel()
            await asyncio.wait([task], timeout=_FAREWELL_SECONDS)

    def _scope(self, path: str, size: int) -> Message:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        headers.append((b"content-length", str(size).encode()))
        if self._key is not None:
            headers.append((b"authorization", b"Bearer " + self._key.encode()))
        return {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0), "state": {},
        }  # fmt: skip


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON of one line of a stream of events. Raises `RouteError` for an error in the middle of an answer."""
    kind, _, data = line.strip().partition(b":")
    if kind != b"data" or (data := data.strip()) == b"[DONE]":
        return None
    event: dict[str, Any] = json.loads(data)
    if "error" in event:
        raise RouteError(_error_in(data, 500))
    return event


def _error_in(content: bytes, status: int) -> str:
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return f"the server answered {status}"
