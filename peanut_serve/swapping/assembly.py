"""Assembles a `VariantServer` in the process that has the engine: vLLM's server, or another host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from converters import Checkpoint
from peanut_serve.settings.swapping import SwapSettings
from peanut_serve.swapping.self_test import LearningEngine
from peanut_serve.swapping.server import VariantServer
from peanut_serve.swapping.swappable import make_swappable
from peanut_serve.variants.catalogue import Catalogue
from peanut_serve.variants.opening import FitsLora, VersionOpener
from peanut_serve.variants.roots import AdapterRoots
from peanut_serve.variants.state_folder import VariantStore


@dataclass(frozen=True, eq=False)
class Host:
    """The process that has the engine.

    Attributes:
        base: the checkpoint that the engine was started from.
        base_names: names of the base; the first is used if a request names no variant.
        fits_lora: see `VersionOpener`.
        on_active: called with the digest whenever the engine's weights change, before a request can use them.
    """

    base: Checkpoint
    base_names: Sequence[str]
    fits_lora: FitsLora | None = None
    on_active: Callable[[str], None] = lambda digest: None


async def assemble_server(settings: SwapSettings, engine: LearningEngine, host: Host) -> VariantServer:
    """Run the engine's self-test, and build a server around it; call its `start` to serve.

    Args:
        settings: the operator's choices.
        engine: it has the base's weights and no running requests.
        host: describes the base and this process.

    Raises:
        SelfTestError: the engine does not swap the weights of this model correctly.
        OptionError: the roots or the state folder cannot be used.
    """
    swappable = await make_swappable(engine, host.base, base_on_host=settings.base_copy == "host")
    opener = VersionOpener(swappable.model, settings.device, host.fits_lora)
    roots, store = AdapterRoots(settings.roots), VariantStore(settings.state)
    catalogue = Catalogue(host.base_names, roots, store, opener)
    return VariantServer(settings, swappable, catalogue, host.on_active)
