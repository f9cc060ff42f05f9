"""What the admin API and its client share: the JSON schemas, and the protocol of the server that is controlled."""

from datetime import datetime
from enum import Enum
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field


class VariantState(str, Enum):
    """State of a variant."""

    REGISTERED = "registered"  # not evaluated yet
    PREPARING = "preparing"
    READY = "ready"  # its weights are on the host
    ACTIVE = "active"  # its weights are in the engine
    FAILED = "failed"


class Answer(BaseModel):
    """What the admin API answers."""

    model_config = ConfigDict(frozen=True)


class VariantStatus(Answer):
    """Current state of a variant."""

    name: str = Field(description="Name that requests use in `model`.")
    kind: Literal["base", "adapter", "checkpoint", "lora"] = Field(
        description="How it is stored and served: lora on top of the base, adapter merged into it, checkpoint merged "
        "before. Until the first request, it is judged by the files."
    )
    state: VariantState = Field(
        description="`registered` (not evaluated yet), `preparing`, `ready` (on the host), `active` or `failed`."
    )
    digest: str | None = Field(description="Digest of its weights; null until they are known.")
    previous: list[str] = Field(description="Digests of earlier versions that a rollback can restore, newest first.")
    source: str = Field(description="Entry of a variants folder, or Hub id.")
    host_bytes: int = Field(description="Size of its evaluated weights in host memory, in bytes.")
    evictable_bytes: int = Field(
        0, description="What evicting them would free, in bytes: none while they are pinned or in use."
    )
    pinned: bool = Field(description="Whether its weights are pinned in host memory.")
    held: bool = Field(default=False, description="Whether a rollback holds its version until it is reloaded.")
    running: int = Field(description="Number of running requests.")
    waiting: int = Field(description="Number of requests that wait for its weights.")
    requests: int = Field(description="Number of requests answered so far.")
    last_used: datetime | None = Field(description="Time of the last request for it.")
    swaps: int = Field(description="Number of times its weights were swapped in.")
    last_swap_seconds: float | None = Field(description="Duration of the last of these swaps, in seconds.")
    error: str | None = Field(description="Why its last preparation or swap failed.")


class EngineStatus(Answer):
    """Current state of the engine."""

    state: Literal["serving", "swapping", "restarting", "failed"] = Field(description="State of the engine.")
    active: str = Field(description="Name of the variant whose weights the engine has.")
    digest: str = Field(description="Digest of these weights.")
    restarts: int = Field(description="Number of times the engine was restarted.")
    host_cache_bytes: int = Field(description="Size of all evaluated weights in host memory, in bytes.")
    host_cache_limit: int = Field(description="Limit of their size, in bytes.")
    base_copy_bytes: int = Field(
        0, description="Size of the copies of the base, in host memory or on the devices, in bytes."
    )
    swap_seconds: dict[str, float] = Field(description="Duration of each phase of the last swap, in seconds.")
    kv_cache_usage: float | None = Field(None, description="Part of the KV cache in use; null if not known.")
    detail: str | None = Field(description="Details of the state.")


class SwapStatus(Answer):
    """One swap, or one restart of the engine, as it ended."""

    number: int = Field(description="Counts swaps and restarts since the start of the server.")
    at: datetime = Field(description="When it began.")
    cause: Literal["operator", "overdue", "idle", "paid", "engine_died"] = Field(
        description="`operator` (asked for), `overdue` (a request had waited for --max-wait), `idle` (no request was "
        "running), `paid` (waiting had cost as much as the swap) or `engine_died`."
    )
    before: str = Field(description="Name of the variant whose weights the engine had.")
    before_digest: str = Field(description="Digest of these weights.")
    target: str = Field(description="Name of the variant that was to get the engine.")
    digest: str = Field(description="Digest of its weights.")
    running: int = Field(description="Number of requests that had to end before.")
    waiting: dict[str, int] = Field(description="Requests that waited when it began, by variant.")
    longest_wait: float = Field(description="How long the oldest of them had waited, in seconds.")
    outcome: Literal["done", "cancelled", "rolled_back", "restarted", "down"] = Field(
        description="`done`; `cancelled` (nothing was loaded), `rolled_back` (the weights of before were restored), "
        "`restarted` (the engine has the base's weights) or `down` (the engine could not be restarted)."
    )
    error: str | None = Field(description="Why it failed.")
    seconds: dict[str, float] = Field(description="Duration of each phase, in seconds.")
    tensors: int = Field(description="Number of tensors to load.")
    nbytes: int = Field(description="Their size, in bytes.")


class VariantTraffic(Answer):
    """The requests for a variant since the start of the server."""

    name: str = Field(description="Name of the variant.")
    answered: int = Field(description="Requests that ended with a status of 2xx.")
    failed: int = Field(description="Requests that ended in another way.")
    outcomes: dict[str, int] = Field(description="Requests by status, or by what happened instead.")
    prompt_tokens: int = Field(description="Tokens of prompts.")
    generated_tokens: int = Field(description="Tokens of answers.")
    p50_seconds: float | None = Field(
        description="Median duration of the latest answered requests, waiting included."
    )
    p95_seconds: float | None = Field(description="The duration that 95 % of them did not exceed.")


class Registration(BaseModel):
    """A variant to add."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(description="Name that requests will use.")
    source: str = Field(description="Entry of a variants folder, or an allowed Hub id.")


class Rollback(BaseModel):
    """Version to roll back to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    digest: str | None = Field(
        default=None, description="One of `previous`, by default the newest; or the full digest of a kept version."
    )
    hold: bool = Field(default=False, description="Hold it until a reload, even if the files change.")


class ErrorDetail(Answer):
    """Why a request failed."""

    type: str = Field(description="Name of the error, for programs.")
    message: str = Field(description="What was found, what was expected and what to do, for people.")


class ErrorAnswer(Answer):
    """Body of an error response."""

    error: ErrorDetail


class Control(Protocol):
    """The server that the admin API controls. Methods are called in the server's event loop only.

    Every name, source and digest comes from the network: a name or digest is looked up, and never made into a path.
    All methods raise `UnknownVariantError` if the variant does not exist; those that need the engine raise
    `EngineDownError` if it is not available.
    """

    async def variants(self) -> list[VariantStatus]:
        """The state of every variant, including the base."""
        ...

    def variant(self, name: str) -> VariantStatus:
        """The state of one variant."""
        ...

    def engine(self) -> EngineStatus:
        """The state of the engine."""
        ...

    def swaps(self) -> list[SwapStatus]:
        """The latest swaps and restarts, the newest first."""
        ...

    async def traffic(self) -> list[VariantTraffic]:
        """The requests for every variant."""
        ...

    async def register(self, name: str, source: str) -> VariantStatus:
        """Add an entry of a variants folder, or an allowed Hub id, under a name, and evaluate it.

        Raises `VariantNameError`, or `VariantError` if the source is not a variant.
        """
        ...

    async def unregister(self, name: str, drain: bool) -> None:
        """Remove a variant; with `drain`, after its last request.

        Raises `VariantInUseError` if it has requests and `drain` is not set, or if it cannot be removed at all.
        """
        ...

    async def activate(self, name: str) -> VariantStatus:
        """Prepare a variant and swap its weights in; returns when the engine has them.

        Raises `VariantError`, `SwapError`.
        """
        ...

    async def reload(self, name: str) -> VariantStatus:
        """Read its source again; the previous version is kept for a rollback.

        Raises `VariantError` if it cannot be served until its files are repaired or it is rolled back.
        """
        ...

    async def rollback(self, name: str, digest: str | None, hold: bool) -> VariantStatus:
        """Roll back to an earlier version, by default to the previous one, and hold it there if `hold`.

        Raises `VariantError`, `SwapError`; the variant is then unchanged.
        """
        ...

    async def preload(self, name: str) -> VariantStatus:
        """Evaluate its weights into host memory, so that a swap to it needs no evaluation. Raises `VariantError`."""
        ...

    async def pin(self, name: str, pinned: bool) -> VariantStatus:
        """Pin its weights in host memory, or unpin them."""
        ...
