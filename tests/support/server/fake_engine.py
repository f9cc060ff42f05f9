"""An engine without vLLM that holds weights as bytes, answers by them, and fails where a test wants it to.

It reads tensors from the places it is given, as vLLM's workers do. What it is owed it checks by itself, and notes
each breach in `violations`: an exception would be taken for a fault, and rolled back.
"""

import asyncio
import hashlib
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from converters.files.header import TensorInfo
from converters.files.reader import TensorReader
from converters.models.checkpoint import Checkpoint
from peanut_serve.lora.folders import LoraFolder
from peanut_serve.swapping.checks.canary import Canary
from peanut_serve.variants.on_device.copies import Room
from peanut_serve.variants.on_device.places import KeptTensor, Place

_FUSED = re.compile(r"\b([qkv]|gate|up)_proj")  # into one layer of vLLM's, with the others of its parent


class FaultError(RuntimeError): ...


def read(places: Iterable[Place], kept: Mapping[str, bytes] = MappingProxyType({})) -> dict[str, bytes]:
    """Tensors as they lie in files, those in /proc too; or as they are evaluated from those that are kept."""
    with TensorReader() as reader:
        return {place.name: _bytes(place, reader, kept) for place in places}


def _bytes(place: Place, reader: TensorReader, kept: Mapping[str, bytes]) -> bytes:
    if isinstance(place, TensorInfo):
        return reader.range(place, 0, place.nbytes)
    if isinstance(place, KeptTensor):
        return kept[place.name]
    w0 = torch.frombuffer(bytearray(kept[place.name]), dtype=place.base.torch_dtype).view(place.base.shape)
    merged = w0.double() + reader.whole(place.up).double() @ reader.whole(place.down).double()
    return merged.to(w0.dtype).view(torch.uint8).numpy().tobytes()


def identity(weights: Mapping[str, bytes]) -> str:
    """What tells weights apart: every answer of the engine is made of it."""
    return hashlib.sha256(b"".join(name.encode() + weights[name] for name in sorted(weights))).hexdigest()


class FakeEngine:
    """See `peanut_serve.swapping.checks.self_test.LearningEngine`.

    Attributes:
        weights: what it computes with.
        calls: what was called, in order; `applied`: the names that each `apply` was given.
        violations: where it was used against the rules.
        loras: LoRA adapters that it has loaded, by number.
        running: requests that it works on; while `go` is not set, they do not end.
        reloads_wrongly: as vLLM 0.32 does mixtures of experts on a CPU.
        kept: tensors of the base on its device, which has `free` bytes; `staged`: names that each `stage` was given.
    """

    def __init__(self, base: Checkpoint, noise: float = 0.0) -> None:
        self._base, self._noise, self._random = base, noise, random.Random(0)
        self.calls: list[str] = []
        self.applied: list[list[str]] = []
        self.staged: list[list[str]] = []
        self.free = 1 << 40
        self.violations: list[str] = []
        self._faults: dict[tuple[str, int], str] = {}
        self.running, self.reloads_wrongly, self.go = 0, False, asyncio.Event()
        self.go.set()
        self._start()

    def _start(self) -> None:
        self.is_dead, self.weights = False, read(self._base.tensors.values())
        self.kept = dict[str, bytes]() if not hasattr(self, "kept") else self.kept  # its restart renews them
        self._prefixes, self.resumed = dict[str, str](), asyncio.Event()
        self.loras: dict[int, Path] = {}
        self.resumed.set()

    def fail(self, call: str, how: str = "raise", *nths: int) -> None:
        """Let the next call of a method fail, or those that are named: 1 is the next.

        `how`: `raise`; `die`: until it is restarted; `half`, `nothing`: what `apply` does of its work, the latter
        without a word; `nan`: the canary's answer; `wrong`: the weights after a restart.
        """
        self._faults |= {(call, self.calls.count(call) + nth): how for nth in nths or (1,)}

    def die(self) -> None:
        self.is_dead, self.weights = True, {}
        self.go.set()

    async def pause(self) -> None:
        await self._begin("pause")
        self._expect(self.running == 0, "paused while requests run")
        self.resumed.clear()

    async def resume(self) -> None:
        await self._begin("resume")
        self.resumed.set()

    async def apply(self, places: Sequence[Place], afresh: bool = False) -> None:
        names = [info.name for info in places]
        self._expect(not self.resumed.is_set(), "weights were applied while requests may run")
        self._expect(not any(0 < len({*group} & {*names}) < len(group) for group in self._groups()), "a torn layer")
        self.applied.append(names)
        before, self.weights = self.weights, {}  # a failure leaves them undefined
        fault = await self._begin("apply")
        if fault == "half":
            self.weights = read(places[: len(places) // 2], self.kept)
            raise FaultError("apply stopped halfway")
        self.weights = before if fault == "nothing" else {**before, **read(places, self.kept)}
        if self.reloads_wrongly:
            self.weights[names[0]] = self.weights[names[0]][::-1]

    async def learn(self, places: Sequence[TensorInfo]) -> list[list[str]]:
        await self.apply(places)
        return self._groups()

    async def room(self, places: Sequence[TensorInfo]) -> list[Room]:
        return [Room("fake", sum(info.nbytes for info in places), self.free)]

    async def keep(self, places: Sequence[TensorInfo]) -> int:
        await self._begin("keep")
        self.kept |= read(places)
        return sum(map(len, self.kept.values()))

    async def stage(self, places: Sequence[Place]) -> None:
        await asyncio.sleep(0)
        self.staged.append([place.name for place in places])

    async def invalidate(self) -> None:
        await self._begin("invalidate")
        self._prefixes.clear()

    async def ask_canary(self) -> Canary:
        self._expect(self.resumed.is_set(), "asked while it is paused: it would hang")
        fault = await self._begin("ask_canary")
        words = [int(identity(self.weights)[i : i + 8], 16) for i in range(0, 64, 8)]
        noise = math.nan if fault == "nan" else self._random.uniform(-self._noise, self._noise)
        return Canary((words[0],), ({token: -word / 2**28 + noise for token, word in enumerate(words)},))

    async def load_lora(self, name: str, folder: LoraFolder) -> None:
        await self._begin("load_lora")
        self._expect((folder.path / "adapter_model.safetensors").is_file(), "there is no adapter")
        self.loras[folder.number] = folder.path

    async def restart(self) -> None:
        fault = await self._begin("restart")
        self._start()
        if fault == "wrong":
            self.weights[next(iter(self.weights))] = b"wrong"

    async def generate(self, prompt: str = "") -> str:
        """What a client gets: `identity` of the weights that the prompt was computed with, perhaps earlier."""
        await self.resumed.wait()
        self.running += 1
        answer = self._prefixes.setdefault(prompt, before := identity(self.weights))
        try:
            await asyncio.sleep(0)
            await self.go.wait()
            if self.is_dead:
                raise FaultError("the engine died")
            self._expect(identity(self.weights) == before, "weights changed under a request")
            return answer
        finally:
            self.running -= 1

    async def _begin(self, call: str) -> str | None:
        self.calls.append(call)
        fault = self._faults.pop((call, self.calls.count(call)), None)
        await asyncio.sleep(0)
        if fault == "die":
            self.die()
        if fault in ("raise", "die") or (self.is_dead and call != "restart"):
            raise FaultError(f"{call} failed")
        return fault

    def _expect(self, is_right: bool, violation: str) -> None:
        if not is_right and not self.is_dead:
            self.violations.append(violation)

    def _groups(self) -> list[list[str]]:
        groups: dict[str, list[str]] = {}
        for name in self._base.tensors:
            groups.setdefault(_FUSED.sub("", name), []).append(name)
        return list(groups.values())
