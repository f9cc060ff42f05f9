"""A `VariantServer` with a fake engine that tells which weights it computed an answer with; see `fake_engine.py`."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

import pytest
from support.server.fake_engine import FakeEngine, identity
from support.server.weights import Weights, weights_in

from peanut_serve.settings.server import ServerSettings
from peanut_serve.swapping import driver as swap_driver
from peanut_serve.swapping.assembly import Host, assemble_server
from peanut_serve.swapping.server import VariantServer
from peanut_serve.variants.lora_export import LoraLimits

NAMES = ("base", "v1", "v2", "v3")
SIZE = 12288  # bytes of a variant on the host
SLOTS = 2  # for LoRA adapters in the engine


def make_weights(folder: Path) -> Weights:
    """Variants on disk, one of them broken."""
    found = weights_in(folder)
    (found.tasks / "broken.safetensors").write_bytes(b"no")
    return found


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@dataclass
class Rig:
    """A server and its engine."""

    engine: FakeEngine
    server: VariantServer
    expected: dict[str, str]
    actives: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # name -> of the version that a test has learned

    async def ask(self, name: str, prompt: str = "a prompt that all ask") -> None:
        """One request: it has to get its variant's weights."""
        task = asyncio.current_task()
        assert task is not None
        async with self.server.serving(name, task.cancel) as admitted:
            assert admitted.version.digest == self.server.swapper.active.version.digest == self.actives[-1]
            assert await self.engine.generate(prompt) == self.expected[name]

    async def asking(self, name: str) -> "asyncio.Task[None]":
        """A request that waits for its weights, or runs."""
        before = self.waiting + len(self.server.gate.running)
        task = asyncio.create_task(self.ask(name))
        await until(lambda: self.waiting + len(self.server.gate.running) > before or task.done())
        return task

    @property
    def waiting(self) -> int:
        return sum(len(queue.arrivals) for queue in self.server.gate.queues())

    @property
    def swaps(self) -> int:
        return len(self.engine.applied) - 3  # those of the self-test


RunRig = Callable[..., None]


def rig_runner(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> RunRig:
    """What runs a test on a server of its own, for at most so long."""
    monkeypatch.setattr(swap_driver, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(swap_driver, "_LOOK_SECONDS", 0.01)

    def call(test: Callable[[Rig], Awaitable[None]], **options: object) -> None:
        async def run() -> None:
            folders = {"roots": (str(weights.tasks),), "cache": tmp_path / "evaluated"}
            folders["state"] = Path(mkdtemp(dir=tmp_path))
            choices = {**folders, "min_dwell": 0, "max_wait": 0, "settle": 0, "mode": "merged", **options}
            settings = ServerSettings(**choices)
            engine, actives = FakeEngine(weights.base), []
            lora = None if settings.mode == "merged" else LoraLimits(512)
            host = Host(weights.base, ["base"], lora, actives.append, lora_slots=SLOTS if lora else 0)
            server = await assemble_server(settings, engine, host)
            await server.start()
            expected = {name: identity(found) for name, found in weights.expected.items()}
            expected["new"] = expected["v1"]  # what tests register
            try:
                await test(Rig(engine, server, expected, actives))
                assert engine.violations == []
            finally:
                server.stop()
                server.cache.close()

        asyncio.run(asyncio.wait_for(run(), seconds))

    return call
