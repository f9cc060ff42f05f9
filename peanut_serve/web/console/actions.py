"""What people do in the console, by the same `Control` that the admin API uses, and who did it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from converters.errors import PeanutError
from peanut_serve.errors import shown
from peanut_serve.web.schema import Control

logger = logging.getLogger("vllm.peanut_serve")

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
        drain: wait for the requests of a variant that is removed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    verb: Verb
    name: str = Field(max_length=512)
    source: str = Field("", max_length=512)
    digest: str | None = Field(None, max_length=128)
    drain: bool = False


@dataclass(frozen=True)
class Deed:
    """An action that has ended.

    Attributes:
        who: the session, and the address of its browser.
        action: what was done.
        error: why it failed; None if it did not.
    """

    who: str
    action: Action
    error: str | None


Audit = Callable[[Deed], None]


def log_deed(deed: Deed) -> None:
    """Write what was done to the server's log."""
    outcome = "done" if deed.error is None else f"failed error={deed.error}"
    logger.info(
        "console who=%s action=%s variant=%s outcome=%s", deed.who, deed.action.verb, shown(deed.action.name), outcome
    )


async def perform(control: Control, action: Action, who: str, audit: Audit) -> None:
    """Carry out an action; whatever comes of it is audited, here alone. Raises what the control raises."""
    try:
        await _carry_out(control, action)
    except BaseException as error:
        audit(Deed(who, action, str(error) if isinstance(error, PeanutError) else type(error).__name__))
        raise
    audit(Deed(who, action, None))


async def _carry_out(control: Control, action: Action) -> None:
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
            await control.rollback(name, action.digest or None)
        case "register":
            await control.register(name, action.source)
        case "unregister":
            await control.unregister(name, action.drain)
