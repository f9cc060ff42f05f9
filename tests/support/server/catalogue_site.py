"""A catalogue over folders on the disk, for tests."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from support.tiny_models import Pair, edit_weights

from converters.models.checkpoint import open_checkpoint
from peanut_serve.variants.catalogue import Catalogue
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.roots import AdapterRoots
from peanut_serve.variants.state_folder import VariantStore
from peanut_serve.variants.version import LoadedModel, Version


class Site:
    """A base, a folder of variants, and one of state. Every catalogue finds the state that the last has left."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.tasks, self.state = pair, folder / "tasks", folder / "state"
        self.lora: LoraLimits | None = None
        self.merges, self.settle = True, 0.0
        self.prepared: list[str] = []
        self.prepare: Callable[[Version], None] = lambda version: None
        self.more = folder / "more"
        shutil.copytree(pair.adapter, self.tasks / "v1")
        self.more.mkdir()
        self.catalogue = self.start()

    def start(self) -> Catalogue:
        """As after a crash: nothing was closed."""
        old, self.state = self.state, self.state.with_name(self.state.name + "+")
        if old.exists():
            shutil.copytree(old, self.state)
        base = open_checkpoint(self.pair.base)
        model = LoadedModel(base, [[name] for name in base.tensors])
        roots, store = AdapterRoots([self.tasks, self.more, "org/allowed"]), VariantStore(self.state)
        opener = VersionOpener(model, "cpu", self.lora, self.merges)
        self.catalogue = Catalogue(["base", "alias"], roots, store, opener, self.settle)
        return self.catalogue

    async def preparing(self, version: Version) -> None:
        """What a server does before a name moves."""
        self.prepare(version)
        self.prepared.append(version.digest)

    async def current(self, name: str) -> Version:
        return (await self.catalogue.current(name, self.preparing))[1]

    def names(self) -> list[str]:
        """What is listed; the folders are read again."""
        self.catalogue._listing.renew()
        return asyncio.run(self.catalogue.names())

    def digest(self, name: str = "v1") -> str:
        return asyncio.run(self.current(name)).digest

    def change(self, name: str = "v1") -> None:
        """Other θ."""
        change = lambda theta: {key: value * 1.25 for key, value in theta.items()}  # noqa: E731
        edit_weights(self.tasks / name / "adapter_model.safetensors", change)

    def break_it(self) -> None:
        (self.tasks / "v1" / "adapter_model.safetensors").write_bytes(b"half of it")

    def saved(self) -> dict:
        return json.loads((self.state / "variants.json").read_text())["variants"]

    def thetas(self) -> set[str]:
        return {path.name for path in (self.state / "theta").iterdir()}
