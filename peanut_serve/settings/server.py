"""Settings of `peanut-serve`, and how they are passed to vLLM's server process."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.errors import OptionError
from converters.serving import parse_size
from peanut_serve.settings.admin_key import KEY_VARIABLE, checked_key
from peanut_serve.settings.tls import Certificate

VARIABLE = "PEANUT_SERVER_SETTINGS"

_CERTIFICATE = ("admin_ssl_certfile", "admin_ssl_keyfile")
# options of the admin API, without which they would have no effect
OF_ADMIN = ("admin_host", "admin_ssl_certfile", "admin_ssl_keyfile", "audit_log", "console_host")


class ServerSettings(BaseModel):
    """See `peanut-serve --help`.

    Attributes:
        mode: `lora`, `merged`, or `auto`: LoRA if it represents an adapter exactly.
        roots: folders of variants, and allowed Hub ids.
        state: folder of the state that is kept across restarts.
        drain: whether a swap waits for running requests, or aborts them.
        drain_timeout: seconds after which the requests that are still running are aborted.
        host_cache: size limit of the evaluated weights in host memory, in bytes.
        base_copy: where W0 is kept to restore the base's weights; on the `device`, variants are evaluated there too.
        packed_cache: size limit of the layers that each worker keeps as vLLM's CPU backend packed them, in bytes.
        prefix_cache: `reset` at each swap, or `salted`: separated by a salt for each variant.
        pin: variants whose weights are kept in host memory.
        preload: variants that are evaluated before the server is ready.
        max_wait: seconds after which a waiting request is overdue, and its variant is swapped to next.
        min_dwell: minimum number of seconds a variant stays active while it has requests.
        max_queue: maximum number of waiting requests.
        keys: file of the keys of many teams; see `peanut_serve/tenants/keys.py`.
        audit_log: file of who changed what through the admin API; by default in `state`.
        admin_host, admin_port: where the admin API listens; without a port, it is disabled.
        admin_ssl_certfile, admin_ssl_keyfile: its certificate, see `Certificate`; without one, it has no TLS.
        console: whether the admin port has a console.
        console_host: names by which browsers reach it, besides loopback and addresses.
        device: where f is evaluated.
        cache: folder of evaluated LoRA adapters.
        cache_bytes: its size limit.
        settle: seconds that files must not have changed for before a new version is taken from them.
        max_evaluations: maximum number of variants that are being evaluated, or wait for it.
        max_body: size limit of a request's body, in bytes.
        stall_timeout: seconds for which a client may read nothing of its response.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["lora", "merged", "auto"]
    roots: tuple[str, ...]
    state: Path
    drain: Literal["wait", "abort"] = "wait"
    drain_timeout: float = Field(60.0, ge=0, allow_inf_nan=False)
    host_cache: int = Field(8 << 30, gt=0)
    base_copy: Literal["host", "disk", "device"] = "host"
    packed_cache: int = Field(1 << 30, ge=0)
    prefix_cache: Literal["reset", "salted"] = "reset"
    pin: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    max_wait: float = Field(10.0, ge=0, allow_inf_nan=False)
    min_dwell: float = Field(0.5, ge=0, allow_inf_nan=False)
    max_queue: int = Field(1024, gt=0)
    keys: Path | None = None
    audit_log: Path | None = None
    admin_host: str = "127.0.0.1"
    admin_port: int | None = Field(None, gt=0, lt=65536)
    admin_ssl_certfile: Path | None = None
    admin_ssl_keyfile: Path | None = None
    console: bool = True
    console_host: tuple[str, ...] = ()
    device: str = "cpu"
    cache: Path
    cache_bytes: int = Field(20 * 10**9, gt=0)
    settle: float = Field(1.0, ge=0, allow_inf_nan=False)
    max_evaluations: int = Field(64, gt=0)
    max_body: int = Field(64 << 20, gt=0)
    stall_timeout: float = Field(30.0, gt=0, allow_inf_nan=False)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "ServerSettings | None":
        """Read the settings that the launcher wrote to the environment; None if there are none."""
        text = environment.get(VARIABLE)
        return cls.model_validate_json(text) if text else None

    @property
    def certificate(self) -> Certificate | None:
        """Of the admin port; None without TLS."""
        return Certificate(self.admin_ssl_certfile, self.admin_ssl_keyfile) if self.admin_ssl_certfile else None

    @property
    def drain_seconds(self) -> float:
        """Seconds that a swap waits for running requests."""
        return self.drain_timeout if self.drain == "wait" else 0.0


def server_settings(
    base: str,
    *,
    host_cache: str,
    packed_cache: str = "1GiB",
    state: Path | None,
    max_body: str = "64MiB",
    audit_log: Path | None = None,
    keys: Path | None = None,
    **options: Any,
) -> ServerSettings:
    """Check the options of the command, and return them as settings.

    Args:
        base: as given; the default `state` folder is derived from it.
        host_cache: a size like `8GiB`.
        packed_cache: a size like `1GiB`, or 0.
        state: folder of the state that is kept across restarts; by default in huggingface-hub's assets cache.
        max_body: a size like `64MiB`.
        audit_log: file of who changed what through the admin API; by default in the state folder.
        keys: file of the keys of many teams.
        options: the other fields of `ServerSettings`.

    Raises `OptionError` for an invalid value, for an admin port without a key, for a certificate that cannot be used,
    and for options of an admin API that there is not.
    """
    sizes = {"host_cache": _size("--host-cache", host_cache), "max_body": _size("--max-body", max_body)}
    sizes["packed_cache"] = 0 if packed_cache == "0" else _size("--packed-cache", packed_cache)
    folder = (state or state_of(base)).expanduser().resolve()
    named = {"audit_log": audit_log, "keys": keys} | {name: options.pop(name, None) for name in _CERTIFICATE}
    files = {"state": folder} | {name: file.expanduser().absolute() for name, file in named.items() if file}
    try:
        settings = ServerSettings.model_validate({**options, **sizes, **files})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise OptionError(f"--{name} is {first['input']}: {first['msg'].lower()}") from None
    if settings.mode == "lora" and settings.base_copy != "host":
        raise OptionError(f"--base-copy {settings.base_copy} is for weights that are swapped, but the mode is lora")
    if settings.admin_ssl_keyfile is not None and settings.admin_ssl_certfile is None:
        raise OptionError("--admin-ssl-keyfile needs --admin-ssl-certfile, the certificate of the key")
    if settings.certificate is not None:
        settings.certificate.check()
    if settings.admin_port is not None:
        if key := os.environ.get(KEY_VARIABLE):
            checked_key(key, KEY_VARIABLE)
        elif settings.keys is None:
            raise OptionError(f"--admin-port needs a key: set {KEY_VARIABLE}")
        return settings
    for name in OF_ADMIN:
        if getattr(settings, name) != type(settings).model_fields[name].default:
            raise OptionError(f"--{name.replace('_', '-')} is for the admin API, which is off; give --admin-port too")
    return settings


def _size(option: str, text: str) -> int:
    size = parse_size(text)
    if size is None:
        raise OptionError(f"{option} is {text}; expected a size like 8GiB")
    return size


def state_of(base: str) -> Path:
    """Where the state of a server is without --state; `base` as it is given to the server."""
    folder = Path(base).expanduser()
    identity = str(folder.resolve()) if folder.is_dir() else base
    return default_state(hashlib.sha256(identity.encode()).hexdigest())


def default_state(identity: str) -> Path:
    """Where the state of a server is by default; `identity` is `fleet`, or a hexadecimal digest of what it serves."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("peanut-serve", "variants", identity[:16])
