"""Assembles a `VariantServer` in the process that has the engine: vLLM's server, or another host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from converters import Checkpoint
from peanut_serve.settings.server import ServerSettings
from peanut_serve.swapping.checks.self_test import LearningEngine
from peanut_serve.swapping.server import VariantServer
from peanut_serve.swapping.swappable import keep_base_weights, make_swappable
from peanut_serve.variants.catalogue import Catalogue
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.roots import AdapterRoots
from peanut_serve.variants.state_folder import VariantStore


@dataclass(frozen=True, eq=False)
class Host:
    """The process that has the engine.

    Attributes:
        base: the checkpoint that the engine was started from.
        base_names: names of the base; the first is used if a request names no variant.
        lora: what the engine allows as LoRA; see `VersionOpener`.
        on_active: called with the digest whenever the engine's weights change, before a request can use them.
        lora_slots: how many LoRA adapters the engine has at once.
    """

    base: Checkpoint
    base_names: Sequence[str]
    lora: LoraLimits | None = None
    on_active: Callable[[str], None] = lambda digest: None
    lora_slots: int = 0


async def assemble_server(settings: ServerSettings, engine: LearningEngine, host: Host) -> VariantServer:
    """Build a server around an engine, after its self-test if weights are swapped; call its `start` to serve.

    Args:
        settings: the operator's choices.
        engine: it has the base's weights and no running requests.
        host: describes the base and this process.

    Raises:
        SelfTestError: the engine does not swap the weights of this model correctly.
        OptionError: the roots or the state folder cannot be used.
    """
    merges = settings.mode != "lora"
    if merges:
        swappable = await make_swappable(engine, host.base, settings.base_copy)
    else:
        swappable = await keep_base_weights(engine, host.base)
    keeps_base = merges and settings.base_copy == "device"
    opener = VersionOpener(swappable.model, settings.device, host.lora, merges, keeps_base)
    roots, store = AdapterRoots(settings.roots), VariantStore(settings.state)
    catalogue = Catalogue(host.base_names, roots, store, opener, settings.settle)
    return VariantServer(settings, swappable, catalogue, host.on_active, host.lora_slots)
