"""A server of classifiers in a thread, and programs that ask it."""

import asyncio
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from peanut_serve.classify.http.app import classify_app
from peanut_serve.classify.http.console import TaskConsole
from peanut_serve.classify.http.door import CLIENTS
from peanut_serve.classify.serving.limits import Limits
from peanut_serve.classify.serving.server import TaskServer
from peanut_serve.tenants.visits import Tenants
from peanut_serve.web.audit import AuditLog
from peanut_serve.web.connections import BoundedProtocol, bind
from peanut_serve.web.request_body import ClientLimits

PATIENCE = 240  # seconds: the first request imports transformers


@contextmanager
def classifying(
    *folders: Path,
    keys: tuple[str, ...] = (),
    clients: ClientLimits = CLIENTS,
    console: str | None = None,
    tenants: Tenants | None = None,
    audit: AuditLog | None = None,
    **limits: Any,
) -> Iterator[tuple[str, TaskServer]]:
    """Serve folders with one thread per run: the URL, and the server. `console` is the key of its console."""
    tasks = TaskServer(folders, limits=Limits(**{"threads": 1, "wait_seconds": PATIENCE, **limits}))
    listener = bind("127.0.0.1", 0)
    own = TaskConsole(console, listener.getsockname()[1], audit=audit) if console else None
    config = uvicorn.Config(
        classify_app(tasks, keys, clients, own, tenants),
        http=BoundedProtocol,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=30,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", tasks
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def digit(seed: int, side: int = 8) -> bytes:
    """A PNG like those of the digits."""
    noise = np.random.default_rng(seed).integers(0, 17, (side, side)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def raw(url: str, content: bytes, wait: float = 30.0) -> bytes:
    """Send bytes on a connection, and read until the server closes it."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(content)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)
