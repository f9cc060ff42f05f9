"""What the admin API and its client share: what they say, and the Protocol of what is controlled."""

from datetime import datetime
from enum import Enum
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field


class VariantState(str, Enum):
    """How far a variant is."""

    REGISTERED = "registered"  # never evaluated yet
    PREPARING = "preparing"
    READY = "ready"  # its weights are on the host
    ACTIVE = "active"  # its weights are in the engine
    FAILED = "failed"


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class VariantStatus(_Answer):
    """A variant as it is now."""

    name: str = Field(description="What a request calls it in `model`.")
    kind: Literal["base", "adapter", "checkpoint", "lora"] = Field(description="What it is made of.")
    state: VariantState = Field(
        description="`registered` (never evaluated yet), `preparing`, `ready` (on the host), `active` or `failed`."
    )
    digest: str | None = Field(description="Identity of its weights; null until they are known.")
    previous: list[str] = Field(description="Earlier digests that a rollback can go to, newest first.")
    source: str = Field(description="Entry of the folders of variants, or Hub id.")
    host_bytes: int = Field(description="Size of its evaluated weights on the host.")
    pinned: bool = Field(description="Whether its weights stay on the host.")
    running: int = Field(description="Requests that the engine works on.")
    waiting: int = Field(description="Requests that wait for its weights.")
    requests: int = Field(description="Requests answered so far.")
    last_used: datetime | None = Field(description="When a request last asked for it.")
    swaps: int = Field(description="How often its weights went into the engine.")
    last_swap_seconds: float | None = Field(description="What the last of these swaps took.")
    error: str | None = Field(description="Why its last preparation or swap failed.")


class EngineStatus(_Answer):
    """The engine as it is now."""

    state: Literal["serving", "swapping", "restarting", "failed"] = Field(description="What it does.")
    active: str = Field(description="Name of the variant whose weights it has.")
    digest: str = Field(description="Identity of these weights.")
    restarts: int = Field(description="How often it was started again.")
    host_cache_bytes: int = Field(description="Size of all evaluated weights on the host.")
    host_cache_limit: int = Field(description="What they may take together, in bytes.")
    swap_seconds: dict[str, float] = Field(description="What each phase of the last swap took.")
    detail: str | None = Field(description="What there is to know of the state.")


class Registration(BaseModel):
    """A variant to add."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(description="What requests will call it.")
    source: str = Field(description="Entry of the folders of variants, or allowed Hub id.")


class Rollback(BaseModel):
    """Where to go back to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    digest: str | None = Field(default=None, description="One of `previous`; the newest of them if left out.")


class ErrorDetail(_Answer):
    """Why a request was refused."""

    type: str = Field(description="Name of the error, for programs.")
    message: str = Field(description="What was found, what was wanted and what to do, for people.")


class ErrorAnswer(_Answer):
    """A refusal."""

    error: ErrorDetail


class Control(Protocol):
    """What the admin API controls. It is called in the server's event loop only.

    Every name, source and digest comes from the network: a name or digest is looked up, and never made into a path.
    All raise `UnknownVariantError` for one that is not there; what needs the engine, `EngineDownError` without one.
    """

    def variants(self) -> list[VariantStatus]:
        """Every variant, the base too."""
        ...

    def variant(self, name: str) -> VariantStatus:
        """One of them."""
        ...

    def engine(self) -> EngineStatus:
        """The engine."""
        ...

    async def register(self, name: str, source: str) -> VariantStatus:
        """Give an entry of the folders of variants, or an allowed Hub id, a name, and evaluate it.

        Raises `VariantNameError`, or `VariantError` for a source that is none.
        """
        ...

    async def unregister(self, name: str, drain: bool) -> None:
        """Remove a variant: after the last of its requests if `drain`.

        Raises `VariantInUseError`: it has requests and `drain` is not set, or it cannot be removed at all.
        """
        ...

    async def activate(self, name: str) -> VariantStatus:
        """Prepare a variant and swap its weights in; return once the engine has them.

        Raises `VariantError`, `SwapError`.
        """
        ...

    async def reload(self, name: str) -> VariantStatus:
        """Read its source again; what was there is kept for a rollback.

        Raises `VariantError`: it cannot be served until its files are mended, or it is rolled back.
        """
        ...

    async def rollback(self, name: str, digest: str | None) -> VariantStatus:
        """Go back to an earlier version, the last one if `digest` is None.

        Raises `VariantError`, `SwapError`; the variant stays what it was.
        """
        ...

    async def pin(self, name: str, pinned: bool) -> VariantStatus:
        """Keep its weights on the host, or no longer."""
        ...
