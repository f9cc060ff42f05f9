"""What is recorded of a release, and which version a request gets meanwhile. See `peanut_serve.releases`."""

import hashlib
import random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

ReleaseState = Literal["staged", "promoted", "rolled_back"]


class _Recorded(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CanaryAnswer(_Recorded):
    """How a version answered one prompt of its canary set.

    Attributes:
        prompt: its beginning.
        answer: its beginning.
        problems: which of the expected properties the answer does not have.
    """

    prompt: str
    answer: str = ""
    problems: list[str] = []


class ReleaseEvent(_Recorded):
    """Something that happened to the release of a name.

    Attributes:
        at: seconds since the epoch.
        action: what was done, as in `peanut-serve ctl release`.
        digest: of the version that was staged.
        detail: why, or how.
    """

    at: float
    action: str
    digest: str
    detail: str | None = None


class Release(_Recorded):
    """The latest release of a name. It is open while it is staged.

    Attributes:
        digest: of the new version.
        source: the entry of the roots that it was read from.
        replaces: digest of the version that the name has, or had before.
        replaces_source: the entry that that one was read from.
        state: what became of it.
        weight: how many of a hundred requests for the name the new version answers.
        max_error_rate: share of failures from which it is rolled back.
        min_requests: number of requests before which the share does not count.
        canary: the canary set that was beside the new version; None if there was none, or the release has ended.
        answers: to that set; None if it was not asked yet.
        events: the latest of this release and of those before it, the newest last.
    """

    digest: str
    source: str
    replaces: str
    replaces_source: str
    state: ReleaseState = "staged"
    weight: int = 0
    max_error_rate: float = 0.05
    min_requests: int = 20
    canary: dict[str, Any] | None = None
    answers: list[CanaryAnswer] | None = None
    events: list[ReleaseEvent] = []

    @property
    def is_open(self) -> bool:
        """Whether the new version has a name of its own, and may get a share of the requests."""
        return self.state == "staged"

    @property
    def passed(self) -> bool | None:
        """Whether every answer to the canary set has the expected properties; None if there is no set."""
        if self.canary is None and self.answers is None:
            return None
        return self.answers is not None and not any(one.problems for one in self.answers)

    def draws(self, session: str | None) -> bool:
        """Whether the new version answers a request.

        Args:
            session: the requests of one session are answered by one version, as long as the weight is not lowered;
                None draws for this request alone.
        """
        if not self.is_open or not self.weight:
            return False
        if session is None:
            point = random.random()
        else:
            digest = hashlib.blake2b(f"{self.digest}\0{session}".encode(errors="replace"), digest_size=8).digest()
            point = int.from_bytes(digest, "big") / 2**64
        return point * 100 < self.weight
