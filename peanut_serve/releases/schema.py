"""The JSON schemas of releases in the admin API, and the protocol of what is controlled."""

from datetime import datetime
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from peanut_serve.web.schema import Answer


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CanaryStatus(Answer):
    """One prompt of a canary set, as the staged version answered it."""

    prompt: str = Field(description="Its beginning.")
    answer: str = Field(description="Beginning of the answer.")
    problems: list[str] = Field(description="Expected properties that the answer does not have; empty if it passed.")


class EventStatus(Answer):
    """Something that happened to the releases of a variant."""

    at: datetime = Field(description="When.")
    action: str = Field(description="What was done.")
    digest: str = Field(description="Digest of the version that was staged then.")
    detail: str | None = Field(description="Why, or how.")


class ReleaseStatus(Answer):
    """The latest release of a variant."""

    name: str = Field(description="Name of the variant.")
    state: Literal["staged", "promoted", "rolled_back"] = Field(
        description="`staged` (open: the version answers under NAME@staged), `promoted` or `rolled_back`."
    )
    digest: str = Field(description="Digest of the new version.")
    source: str = Field(description="Entry of a variants folder, or Hub id, that it was read from.")
    replaces: str = Field(description="Digest of the version that the name has, or had before.")
    weight: int = Field(description="How many of a hundred requests the new version answers.")
    max_error_rate: float = Field(description="Share of failures above which it is rolled back.")
    min_requests: int = Field(description="Number of requests before which it is not.")
    watched: int = Field(description="Requests of its share so far, since the weight or the server's start.")
    failed: int = Field(description="How many of them failed.")
    passed: bool | None = Field(description="Whether it passed its canary set; null if it has none.")
    canary: list[CanaryStatus] = Field(description="The answers to its canary set; empty before it was asked.")
    events: list[EventStatus] = Field(description="What happened, the newest last; earlier releases included.")


class Staging(_Request):
    """Where a new version comes from."""

    source: str | None = Field(
        None,
        max_length=512,
        description="Entry of a variants folder, or allowed Hub id; by default the variant's own.",
    )
    digest: str | None = Field(
        None, pattern="^[0-9a-f]{40}$", description="Digest of the version that has to be there."
    )


class Weighing(_Request):
    """The share of a new version."""

    weight: int = Field(ge=0, le=100, description="How many of a hundred requests it answers.")
    max_error_rate: float = Field(0.05, ge=0, le=1, description="Share of failures above which it is rolled back.")
    min_requests: int = Field(20, ge=1, le=1000, description="Number of requests before which it is not.")
    force: bool = Field(False, description="Although it has not passed its canary set.")


class Promotion(_Request):
    """How to promote."""

    force: bool = Field(False, description="Although it has not passed its canary set.")


class Reason(_Request):
    """Why a release is rolled back."""

    reason: str | None = Field(None, max_length=500, description="For the audit log and the events.")


class ReleaseControl(Protocol):
    """What the routes control. All methods raise `UnknownVariantError` if the variant or its release is unknown."""

    def releases(self) -> list[ReleaseStatus]:
        """The latest release of every variant that had one."""
        ...

    def release(self, name: str) -> ReleaseStatus:
        """The latest release of a variant."""
        ...

    async def hold(self, name: str) -> None:
        """Keep a variant at its version until it is reloaded."""
        ...

    async def stage(self, name: str, source: str | None, digest: str | None = None) -> ReleaseStatus:
        """Stage a version, and ask its canary set. Raises `ReleaseError`, `VariantError`."""
        ...

    async def check(self, name: str) -> ReleaseStatus:
        """Ask the canary set again. Raises `ReleaseError`."""
        ...

    async def weigh(self, name: str, weighing: Weighing) -> ReleaseStatus:
        """Give the staged version a share of the requests. Raises `ReleaseError`."""
        ...

    async def promote(self, name: str, force: bool) -> ReleaseStatus:
        """Move the name to the staged version. Raises `ReleaseError`, `VariantError`."""
        ...

    async def rollback(self, name: str, reason: str | None) -> ReleaseStatus:
        """End an open release, or return from a promoted one. Raises `ReleaseError`, `VariantError`."""
        ...
