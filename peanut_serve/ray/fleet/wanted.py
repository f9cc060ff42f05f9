"""What operators want of all replicas: one document, of which each change makes another."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from peanut_serve.releases.rules import check_none_open, noted
from peanut_serve.variants.release import Release


class Wanted(BaseModel):
    """What is wanted of a name.

    Attributes:
        source: the entry that it was registered for; None if it is an entry of the folders itself.
        removed: it was unregistered.
        pinned: whether its weights are kept in host memory; None if nobody has said.
        held: digest of the version at which it stays, whatever its files are; None if it follows them.
        entry: the entry that its versions come from since a release was promoted; None if that is its own.
        release: its latest release; the canary set and its answers are those of each replica.
        forced: whether the release gets its share though a replica may not have passed its canary set.
    """

    model_config = ConfigDict(frozen=True)

    source: str | None = None
    removed: bool = False
    pinned: bool | None = None
    held: str | None = None
    entry: str | None = None
    release: Release | None = None
    forced: bool = False

    @property
    def target(self) -> str | None:
        """The entry that its versions come from; None for its own in the folders, or any that an engine knows."""
        return self.entry or self.source

    @property
    def open_release(self) -> Release | None:
        """Its release, while that is open."""
        return self.release if self.release is not None and self.release.is_open else None

    def staged(self, name: str, release: Release) -> "Wanted":
        """With a new release, and held at the version that it replaces. Raises `ReleaseError` if one is open."""
        check_none_open(name, self.release)
        return self.model_copy(update={"release": release, "held": release.replaces, "forced": False})

    def promoted(self, release: Release, detail: str) -> "Wanted":
        """With the version of its release."""
        ended = noted(release, "promote", detail, state="promoted", weight=0)
        return self.model_copy(update={"release": ended, "held": release.digest, "entry": release.source})

    def rolled_back(self, release: Release, reason: str | None) -> "Wanted":
        """Without its release, or with the version that one has replaced."""
        ended = noted(release, "rollback", reason, state="rolled_back", weight=0)
        before = {"held": release.replaces, "entry": release.replaces_source} if not release.is_open else {}
        return self.model_copy(update={"release": ended, **before})


class WantedState(BaseModel):
    """What is wanted of all names that operators have changed.

    Attributes:
        revision: raised by each change.
        variants: name -> what is wanted.
    """

    model_config = ConfigDict(frozen=True)

    revision: int = 0
    variants: Mapping[str, Wanted] = {}

    def of(self, name: str) -> Wanted:
        """What is wanted of a name; nothing in particular if nobody has changed it."""
        return self.variants.get(name, Wanted())

    def after(self, action: str, name: str, given: str | None) -> "WantedState":
        """The state after a change.

        Args:
            action: the verb, as in `peanut-serve ctl`.
            name: of the variant.
            given: its source for `register`, the full digest for `rollback` and `hold`.
        """
        old = self.of(name)
        new = {
            "register": Wanted(source=given),
            "unregister": Wanted(removed=True),
            "reload": old.model_copy(update={"held": None}),
            "rollback": old.model_copy(update={"held": given}),
            "hold": old.model_copy(update={"held": given}),
            "pin": old.model_copy(update={"pinned": True}),
            "unpin": old.model_copy(update={"pinned": False}),
        }[action]
        return self.with_one(name, new)

    def with_one(self, name: str, wanted: Wanted) -> "WantedState":
        """The next state, in which this is wanted of a name."""
        return WantedState(revision=self.revision + 1, variants={**self.variants, name: wanted})

    def changed(self, since: "WantedState") -> list[str]:
        """The names of which something else is wanted than before."""
        return [name for name, wanted in self.variants.items() if since.variants.get(name) != wanted]


def base_of(options: Sequence[str]) -> str:
    """What a command line of `peanut-serve` says as `--base`."""
    for index, option in enumerate(options):
        if option == "--base" and index + 1 < len(options):
            return options[index + 1]
        if option.startswith("--base="):
            return option.removeprefix("--base=")
    return ""
