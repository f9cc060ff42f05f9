"""Settings of the vLLM plugin, read from environment variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.errors import OptionError
from converters.serving import parse_size

ADAPTERS, CACHE, CACHE_SIZE, DEVICE, STATE = (
    "PEANUT_ADAPTERS",
    "PEANUT_CACHE",
    "PEANUT_CACHE_SIZE",
    "PEANUT_DEVICE",
    "PEANUT_STATE",
)

ALLOW_UNTESTED = "PEANUT_ALLOW_UNTESTED_VLLM"


@dataclass(frozen=True)
class Settings:
    """Settings of the plugin without `peanut-serve`, and of offline use; see peanut_serve/README.md.

    Attributes:
        roots: PEANUT_ADAPTERS, folders of adapters or Hub ids, separated by `:`; if it is not set, the plugin is
            inactive.
        cache: PEANUT_CACHE, folder of evaluated adapters; by default in huggingface-hub's assets cache.
        cache_bytes: PEANUT_CACHE_SIZE, its size limit, for example `20GB`.
        device: PEANUT_DEVICE, where f is evaluated; by default the CPU, because vLLM uses the GPU.
    """

    roots: tuple[str, ...]
    cache: Path
    cache_bytes: int = 20 * 10**9
    device: str = "cpu"

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings from environment variables. Raises `OptionError` if the size is invalid."""
        from huggingface_hub import cached_assets_path

        size = parse_size(environment.get(CACHE_SIZE, "20GB"))
        if size is None:
            raise OptionError(f"{CACHE_SIZE} is {environment[CACHE_SIZE]}; expected a size like 20GB")
        cache = environment.get(CACHE)
        return cls(
            roots=tuple(root for root in environment.get(ADAPTERS, "").split(os.pathsep) if root),
            cache=Path(cache) if cache else cached_assets_path(library_name="peanut-serve", namespace="lora"),
            cache_bytes=size,
            device=environment.get(DEVICE, "cpu"),
        )
