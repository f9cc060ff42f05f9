"""The options of `peanut-serve`, as given on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# LoRA on top of the base's weights; merged weights, swapped for each variant; LoRA if an adapter is exactly LoRA
Mode = Literal["lora", "merged", "auto"]


@dataclass(frozen=True)
class ServeOptions:
    """See `peanut-serve --help`.

    Attributes:
        base: folder, short name or Hub id.
        adapters: folders of adapters, and allowed Hub ids.
        mode: how variants are served.
        cache: folder for evaluated LoRA adapters; None for the default.
        cache_size: its size limit, for example `20GB`; None for the default.
        serving: the other options of `server_settings`.
        dry_run: print the vLLM command instead of starting it.
        vllm: options that are passed to vLLM.
        allow_untested_vllm: start although the installed vLLM was not tested.
        check: look for what is wrong instead of starting vLLM.
        api_key_file: file with the keys of clients.
        admin_key_file: file with the key of the admin API.
        log_format: of the server and vLLM.
    """

    base: str
    adapters: tuple[str, ...]
    mode: Mode = "lora"
    cache: Path | None = None
    cache_size: str | None = None
    serving: Mapping[str, Any] = field(default_factory=dict)
    dry_run: bool = False
    vllm: tuple[str, ...] = ()
    allow_untested_vllm: bool = False
    check: bool = False
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    log_format: Literal["text", "json"] = "text"
