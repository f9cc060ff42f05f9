"""The options of `peanut-serve`, as they were given."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# LoRA on top of the base's weights; whole weights swapped for each variant; LoRA where an adapter is exactly LoRA
Mode = Literal["lora", "merged", "auto"]


@dataclass(frozen=True)
class ServeOptions:
    """See `peanut-serve --help`.

    Attributes:
        base: folder, short name or Hub id.
        adapters: folders of adapters, and Hub ids that are allowed.
        mode: how variants are served.
        cache: folder for evaluated LoRA adapters; None for the default.
        cache_size: its limit, like `20GB`; None for the default.
        swapping: options of `swap_settings`, checked only where weights are swapped.
        dry_run: show what would be started.
        vllm: options that are passed on to vLLM.
    """

    base: str
    adapters: tuple[str, ...]
    mode: Mode = "lora"
    cache: Path | None = None
    cache_size: str | None = None
    swapping: Mapping[str, object] = field(default_factory=dict)
    dry_run: bool = False
    vllm: tuple[str, ...] = ()
