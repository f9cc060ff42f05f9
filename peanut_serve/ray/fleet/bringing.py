"""The steps that bring one name at one engine to what operators want of it.

An engine may have missed any number of changes: it was down, or it has the state of an earlier time. So each step
begins with what the engine has, not with the change that was made.
"""

from typing import Any

from peanut_serve.ray.fleet.engine_admin import EngineAdmin, Entry, checked, path_of, release_path
from peanut_serve.ray.fleet.wanted import Wanted

_STAGED, _PROMOTED, _ROLLED_BACK = "staged", "promoted", "rolled_back"
_RULES = ("weight", "max_error_rate", "min_requests")


async def bring(engine: EngineAdmin, name: str, wanted: Wanted, withhold: Any) -> None:
    """Bring a name to its version.

    Args:
        engine: it.
        name: of the variant.
        wanted: of it.
        withhold: called with the reason while the engine has a version that nobody wants.

    Raises `ChangeRefusedError`.
    """
    await _end_release(engine, name, wanted)
    found = await engine.look(name)
    if wanted.removed:
        if found is not None:
            await engine.do("DELETE", f"{path_of(name)}?drain=true")
        return
    found = await _from_entry(engine, name, wanted, found, withhold)
    if found is None:
        return  # its files are gone: the engine refuses requests for it
    if wanted.held is not None:
        if not found.get("held") or found["digest"] != wanted.held:
            withhold("it is being rolled back")
            if found["digest"] in (None, wanted.held):  # that of its files, perhaps
                found = await engine.hold(name) or found
            if found["digest"] != wanted.held:
                checked(await engine.roll_back(name, wanted.held))
    elif found.get("held"):
        await engine.do("POST", f"{path_of(name)}/reload")


async def _end_release(engine: EngineAdmin, name: str, wanted: Wanted) -> None:
    """End a release that the engine still has, as it was ended elsewhere."""
    release = await engine.release(name)
    if release is None:
        return
    ended = wanted.release.state if wanted.release and wanted.release.digest == release["digest"] else _ROLLED_BACK
    why = {"reason": wanted.release.events[-1].detail if wanted.release and wanted.release.events else None}
    if release["state"] == _STAGED and ended == _PROMOTED:
        await engine.do("POST", f"{release_path(name)}/promote", {"force": True})
    elif release["state"] == _STAGED and ended == _ROLLED_BACK:
        await engine.do("POST", f"{release_path(name)}/rollback", why)
    elif release["state"] == _PROMOTED and wanted.release is not None and ended == _ROLLED_BACK:
        found = await engine.look(name)
        if found is not None and found["digest"] == release["digest"] == wanted.release.digest:
            await engine.do("POST", f"{release_path(name)}/rollback", why)


async def _from_entry(
    engine: EngineAdmin, name: str, wanted: Wanted, found: Entry | None, withhold: Any
) -> Entry | None:
    """Let a name have the entry that its versions come from. Returns its status then."""
    entry = wanted.target
    if entry is None or (found is not None and found["source"] == entry):
        return found
    if found is not None:
        withhold("it is being moved to another entry")
        if wanted.source is None:  # it has a folder of its own, so that no other entry can be registered for it
            await engine.stage(name, entry, wanted.held)
            await engine.do("POST", f"{release_path(name)}/promote", {"force": True})
            return await engine.look(name)
        await engine.do("DELETE", f"{path_of(name)}?drain=true")
    registered: Entry = await engine.do("POST", "/variants", {"name": name, "source": entry})
    return registered


async def bring_staged(engine: EngineAdmin, name: str, wanted: Wanted) -> None:
    """Bring the staged version of a name to what is wanted of it. Raises `ChangeRefusedError`."""
    release = None if wanted.removed else wanted.open_release
    if release is None:
        return
    found = await engine.release(name)
    if found is None or found["state"] != _STAGED:
        found = await engine.stage(name, release.source, release.digest)
    rules = {rule: getattr(release, rule) for rule in _RULES}
    if rules != {rule: found[rule] for rule in _RULES}:
        await engine.do("POST", f"{release_path(name)}/weight", {**rules, "force": wanted.forced})


async def bring_pin(engine: EngineAdmin, name: str, wanted: Wanted) -> None:
    """Pin the weights of a name, or unpin them, if somebody has said so. Raises `ChangeRefusedError`."""
    if wanted.removed or wanted.pinned is None:
        return
    found = await engine.look(name)
    if found is not None and found["pinned"] != wanted.pinned:
        await engine.do("POST", f"{path_of(name)}/{'pin' if wanted.pinned else 'unpin'}")
