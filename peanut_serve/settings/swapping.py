"""What `peanut-serve --mode merged` was told, on its way into vLLM's server process."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.errors import OptionError
from converters.serving import parse_size
from peanut_serve.settings.admin_key import KEY_VARIABLE, checked_key

VARIABLE = "PEANUT_SWAP_SETTINGS"


class SwapSettings(BaseModel):
    """See `peanut-serve --help`.

    Attributes:
        mode: `merged`, or `auto`: LoRA where it says exactly what an adapter does.
        roots: folders of variants, and Hub ids that are allowed.
        state: folder of what survives a restart.
        drain: whether a swap waits for running requests, or ends them.
        drain_timeout: seconds after which those that still run are ended.
        host_cache: bytes of evaluated weights on the host.
        base_copy: where W0 is kept, to go back to.
        prefix_cache: `reset` at a swap, or kept apart by a salt for each variant.
        pin: variants whose weights stay on the host.
        preload: variants that are evaluated before the server is ready.
        max_wait: seconds after which a request's variant is next.
        min_dwell: seconds a variant keeps the weights while it has requests.
        max_queue: requests that may wait.
        admin_host, admin_port: where the admin API listens; nowhere without a port.
        device: where f is evaluated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["merged", "auto"]
    roots: tuple[str, ...]
    state: Path
    drain: Literal["wait", "abort"] = "wait"
    drain_timeout: float = Field(60.0, ge=0)
    host_cache: int = Field(8 << 30, gt=0)
    base_copy: Literal["host", "disk"] = "host"
    prefix_cache: Literal["reset", "salted"] = "reset"
    pin: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    max_wait: float = Field(10.0, ge=0)
    min_dwell: float = Field(0.5, ge=0)
    max_queue: int = Field(1024, gt=0)
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(None, gt=0, lt=65536)
    device: str = "cpu"

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "SwapSettings | None":
        """From the environment, where the launcher put them; None if this is not its server."""
        text = environment.get(VARIABLE)
        return cls.model_validate_json(text) if text else None

    @property
    def patience(self) -> float:
        """Seconds a swap waits for running requests."""
        return self.drain_timeout if self.drain == "wait" else 0.0


def swap_settings(base: str, *, host_cache: str, state: Path | None, **options: Any) -> SwapSettings:
    """Settings from the options of the command.

    Args:
        base: as given; without `state` it tells servers apart.
        host_cache: a size like `8GiB`.
        state: folder of what survives a restart; by default among huggingface-hub's assets.
        options: the others, see `SwapSettings`.

    Raises `OptionError` for values that have no meaning, and for an admin port without a key.
    """
    size = parse_size(host_cache)
    if size is None:
        raise OptionError(f"--host-cache is {host_cache}; wanted a size like 8GiB")
    try:
        settings = SwapSettings(host_cache=size, state=(state or _state_of(base)).expanduser().resolve(), **options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise OptionError(f"--{name} is {first['input']}: {first['msg'].lower()}") from None
    if settings.admin_port is not None:
        if not (key := os.environ.get(KEY_VARIABLE)):
            raise OptionError(f"--admin-port needs a key: set {KEY_VARIABLE}")
        checked_key(key, KEY_VARIABLE)
    return settings


def _state_of(base: str) -> Path:
    from huggingface_hub import cached_assets_path

    folder = Path(base).expanduser()
    identity = str(folder.resolve()) if folder.is_dir() else base
    return cached_assets_path("peanut-serve", "variants", hashlib.sha256(identity.encode()).hexdigest()[:16])
