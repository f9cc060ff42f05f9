"""The names in the folders of variants, and their kinds: read off the event loop, and at most once a second."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from converters import load_adapter
from converters.errors import OptionError, PeanutError
from peanut_serve.variants.lora_export import LoraLimits, kind_of
from peanut_serve.variants.roots import AdapterRoots, State, VariantSource, looks_merged
from peanut_serve.variants.version import VariantKind

_SECONDS = 1.0

Judge = Callable[[VariantSource], VariantKind]


class Listing:
    """For one event loop.

    Args:
        roots: the folders.
        judge: says of which kind a variant is; called in a thread, once for the same files.

    Attributes:
        latest: the names that were found last.
    """

    def __init__(self, roots: AdapterRoots, judge: Judge) -> None:
        self.latest: list[str] = []
        self._roots, self._judge = roots, judge
        self._judged: Mapping[str, tuple[State, VariantKind]] = {}
        self._read_at: float | None = None
        self._reading = asyncio.Lock()
        self._judging: asyncio.Task[None] | None = None

    async def names(self) -> list[str]:
        """Every name in the folders; those that ask while they are read share the result.

        Their kinds follow: θ of many new adapters takes longer to read than anybody should wait for a list.
        """
        async with self._reading:
            if self._read_at is None or time.monotonic() - self._read_at > _SECONDS:
                self.latest = await asyncio.to_thread(self._roots.names)
                self._read_at = time.monotonic()
                if self._judging is None or self._judging.done():
                    self._judging = asyncio.create_task(self._judge_all(self.latest))
                await asyncio.wait([self._judging], timeout=_SECONDS)
        return self.latest

    def kind(self, name: str) -> VariantKind | None:
        """Of which kind a name in the folders is; None if it was not there when they were read last."""
        judged = self._judged.get(name)
        return judged[1] if judged is not None else None

    def renew(self) -> None:
        """Read the folders again when the names are asked for next."""
        self._read_at = None

    async def _judge_all(self, names: Sequence[str]) -> None:
        self._judged = await asyncio.to_thread(self._kinds, names)

    def _kinds(self, names: Sequence[str]) -> Mapping[str, tuple[State, VariantKind]]:
        judged: dict[str, tuple[State, VariantKind]] = {}
        for name in names:
            try:
                if (source := self._roots.find(name)) is None:
                    continue  # removed in the meantime
            except OptionError:
                continue  # it is in two folders
            state, known = source.state(), self._judged.get(name)
            same = known is not None and known[0] == state
            judged[name] = known if known is not None and same else (state, self._judge(source))
        return judged


def judged_by_files(source: VariantSource, lora: LoraLimits | None, merges: bool) -> VariantKind:
    """Of which kind a variant will be, as far as its files tell; its first request may find another reason.

    Args:
        source: of the variant. Nothing is downloaded for one on the Hub.
        lora, merges: see `VersionOpener`.
    """
    if isinstance(source.spec, Path) and looks_merged(source.spec):
        return VariantKind.CHECKPOINT
    if lora is None or (merges and isinstance(source.spec, str)):
        return VariantKind.ADAPTER
    if not merges:
        return VariantKind.LORA  # or it is refused
    try:
        adapter = load_adapter(source.spec)
        ranks = [adapter.rank(module) for module in adapter.modules]
    except (PeanutError, OSError):
        return VariantKind.ADAPTER
    known = [rank for rank in ranks if rank is not None]
    fits = (
        known
        and len(known) == len(ranks)
        and lora.refusal(max(known), frozenset(map(kind_of, adapter.modules))) is None
    )
    return VariantKind.LORA if fits else VariantKind.ADAPTER
