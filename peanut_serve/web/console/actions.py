"""What people do in the console, by the same `Control` that the admin API uses."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from peanut_serve.web.schema import Control

Verb = Literal["activate", "pin", "unpin", "preload", "reload", "rollback", "register", "unregister"]

# verb -> what its button says
LABELS: dict[Verb, str] = {
    "activate": "Activate",
    "pin": "Pin",
    "unpin": "Unpin",
    "preload": "Preload",
    "reload": "Reload",
    "rollback": "Roll back",
    "register": "Register",
    "unregister": "Unregister",
}


class Action(BaseModel):
    """A change that somebody confirmed.

    Attributes:
        verb: what to do.
        name: of the variant.
        source: of a new variant: an entry of a variants folder, or an allowed Hub id.
        digest: of the version to roll back to; None for the one before.
        hold: whether a rollback holds that version until a reload, even if the files change.
        drain: wait for the requests of a variant that is removed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Verb
    name: str = Field(max_length=512)
    source: str = Field("", max_length=512)
    digest: str | None = Field(None, max_length=128)
    hold: bool = False
    drain: bool = False


async def perform(control: Control, action: Action) -> None:
    """Carry out an action. Raises what the control raises, which also audits it."""
    name = action.name
    match action.verb:
        case "activate":
            await control.activate(name)
        case "pin" | "unpin":
            await control.pin(name, action.verb == "pin")
        case "preload":
            await control.preload(name)
        case "reload":
            await control.reload(name)
        case "rollback":
            await control.rollback(name, action.digest or None, action.hold)
        case "register":
            await control.register(name, action.source)
        case "unregister":
            await control.unregister(name, action.drain)
