"""The JSON schema of releases in a fleet's admin API: that of a single server's, with an entry per replica."""

from pydantic import Field

from peanut_serve.releases.schema import ReleaseStatus
from peanut_serve.web.schema import Answer


class ReplicaRelease(Answer):
    """A release at one replica."""

    replica: str | None = Field(description="Name of the replica; null if it was lost.")
    status: ReleaseStatus | None = Field(description="Its status there; null if the replica does not have it.")
    withheld: str | None = Field(default=None, description="Why the replica does not have the staged version.")
    error: str | None = Field(default=None, description="Why there is no status.")


class FleetReleaseStatus(ReleaseStatus):
    """A release of a fleet: what is wanted of all replicas, sums, and the first failed answers to the canary set."""

    agree: bool = Field(description="Whether every replica has it as it is wanted.")
    message: str = Field(description="What differs, for people; empty if they agree.")
    replicas: list[ReplicaRelease] = Field(description="An entry per replica.")
