"""PEANuT adapters for vLLM's offline `LLM`: one `LoRARequest` for each name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import OptionError
from peanut_serve.lora.cache import LoraCache
from peanut_serve.lora.exporter import Exported, LoraExporter
from peanut_serve.settings.environment import Settings
from peanut_serve.variants.roots import AdapterRoots

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class LoraRequests:
    """Creates the `lora_request=` argument of `LLM.generate` and `LLM.chat`; evaluates adapters on first use.

    Args:
        base: folder or Hub id, as given to `LLM`.
        adapters: folders of adapters, or allowed Hub ids.
        revision: of a base on the Hub.
        dtype: of the factors: `fp32`, `bf16` or `fp16`.
        device: where f is evaluated.

    Raises `OptionError` if one of `adapters` is neither a folder nor a Hub id.
    """

    def __init__(
        self,
        base: str | Path,
        adapters: str | Path | Sequence[str | Path],
        *,
        revision: str | None = None,
        dtype: str = "fp32",
        device: str = "cpu",
    ) -> None:
        self.roots = AdapterRoots([adapters] if isinstance(adapters, str | Path) else adapters)
        settings = Settings.read()
        cache = LoraCache(settings.cache, settings.cache_bytes)
        self._exporter = LoraExporter(str(base), cache, revision=revision, dtype=dtype, device=device)
        self._exported: dict[str, Exported] = {}

    def get(self, name: str) -> "LoRARequest":
        """The `LoRARequest` of an adapter. If the adapter has changed, it has another id and another path.

        Raises `OptionError` for an unknown name, and what `LoraExporter.export` raises.
        """
        from vllm.lora.request import LoRARequest

        source = self.roots.find(name)
        if source is None:
            available = ", ".join(self.roots.names()) or "none"
            raise OptionError(f"there is no adapter {name}; the available adapters are {available}")
        exported = next((e for e in self._exported.values() if e.state == source.state()), None)
        exported = exported or self._exporter.export(source)
        self._exported.setdefault(exported.digest, exported)
        return LoRARequest(name, 1 + list(self._exported).index(exported.digest), str(exported.lease.folder))
