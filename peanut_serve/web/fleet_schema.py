"""The JSON schemas of a fleet's admin API, where they are not those of a single server (`peanut_serve.web.schema`).

Answers about variants and the engine have the fields of a single server's, with what is true of the whole fleet, and
an entry per replica beside them.
"""

from typing import Any

from pydantic import Field

from peanut_serve.web.schema import Answer, EngineStatus, VariantStatus


class FleetEntry(Answer):
    """What a replica answered to a change that went to all of them."""

    replica: str | None = Field(description="Name of the replica; null if it was lost before it answered.")
    status: int = Field(description="HTTP status of its engine's answer; 503 if there is none.")
    answer: Any = Field(
        default=None, description="The answer: a variant's status, null after a removal, or an error."
    )
    error: str | None = Field(default=None, description="Why there is no answer.")

    @property
    def is_done(self) -> bool:
        """Whether it made the change."""
        return 200 <= self.status < 300

    @property
    def reason(self) -> str | None:
        """Why it did not make the change."""
        if self.is_done:
            return None
        told = self.answer.get("error") if isinstance(self.answer, dict) else None
        return (told.get("message") if isinstance(told, dict) else None) or self.error or f"status {self.status}"

    @property
    def digest(self) -> str | None:
        """Digest of the variant after the change."""
        return self.answer.get("digest") if self.is_done and isinstance(self.answer, dict) else None


class FleetChange(Answer):
    """Result of a change that went to all replicas."""

    agree: bool = Field(description="Whether all of them made it, and have the same digest now.")
    message: str = Field(description="What differs, for people; empty if they agree.")
    replicas: list[FleetEntry] = Field(description="An entry per replica.")


class ReplicaVariant(Answer):
    """A variant at one replica."""

    replica: str | None = Field(description="Name of the replica; null if it was lost.")
    status: VariantStatus | None = Field(description="Its status there; null if the replica does not have it.")
    withheld: str | None = Field(default=None, description="Why the replica refuses requests for it.")
    error: str | None = Field(default=None, description="Why there is no status.")


class FleetVariantStatus(VariantStatus):
    """A variant of a fleet: the most active state, sums, and a digest if it is the same at all replicas."""

    agree: bool = Field(description="Whether all replicas serve the same version, as far as it is known.")
    message: str = Field(description="What differs, for people; empty if they agree.")
    replicas: list[ReplicaVariant] = Field(description="An entry per replica.")


class ReplicaEngine(Answer):
    """The engine of one replica."""

    replica: str | None = Field(description="Name of the replica; null if it was lost.")
    engine: EngineStatus | None = Field(description="Its state; null if it did not answer.")
    error: str | None = Field(default=None, description="Why there is no state.")


class FleetEngineStatus(EngineStatus):
    """The engines of a fleet: the worst state, the active variants, and sums."""

    agree: bool = Field(description="Whether all replicas answered.")
    message: str = Field(description="Which did not, for people; empty if all did.")
    replicas: list[ReplicaEngine] = Field(description="An entry per replica.")
