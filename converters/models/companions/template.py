"""Chat templates: several files can hold one, and which of them is read depends on who reads.

A tokenizer reads chat_template.jinja and additional_chat_templates/ before the `chat_template` in its config. A
processor reads the `chat_template` in processor_config.json first, then chat_template.json, then the .jinja files. So
the templates of one side have to be hidden from nobody by those of the other.
"""

import json
import re
from typing import Any

from converters.models.companions.companion import Companion
from converters.models.companions.folder import Folder, as_json
from converters.models.companions.names import TEMPLATE

_KEY = "chat_template"
_JINJA, _LEGACY = "chat_template.jinja", "chat_template.json"
_HOLDERS = ("tokenizer_config.json", "processor_config.json")
_NAME = re.compile(r"[\w.-]+")


def settle_templates(chosen: dict[str, Companion], base: Folder, adapter: Folder) -> dict[str, Companion]:
    """The files `chosen` of the other sets, with the templates of one side only: the adapter's, if it has any."""
    winner, loser = (adapter, base) if _holds_templates(adapter) else (base, adapter)
    files = dict(chosen)
    for name in _HOLDERS:
        if name in files and files[name].side == loser.side and _template_in(loser, name):
            settings = json.loads(files[name].read())  # it may have been changed before
            settings.pop(_KEY, None)
            files[name] = files[name].edited(as_json(settings), f"without {_KEY}")
    files |= {name: Companion(winner.side, path) for name, path in winner.sets[TEMPLATE].items()}
    lost = [name for name in _HOLDERS if _template_in(winner, name) and not _is_from(files, name, winner)]
    if lost or _holds_templates(loser):
        files |= _as_files(winner, files)
    return files


def _holds_templates(folder: Folder) -> bool:
    return bool(folder.sets[TEMPLATE]) or any(_template_in(folder, name) for name in _HOLDERS)


def _template_in(folder: Folder, name: str) -> Any:
    return folder.read(name).get(_KEY)


def _is_from(files: dict[str, Companion], name: str, folder: Folder) -> bool:
    return name in files and files[name].side == folder.side


def _as_files(folder: Folder, files: dict[str, Companion]) -> dict[str, Companion]:
    """Templates that stand in a config only, as the files that every tokenizer and processor reads."""
    if any(name.endswith(".jinja") for name in folder.sets[TEMPLATE]) or folder.path is None:
        return {}
    for name in (*_HOLDERS, _LEGACY):
        if found := _template_in(folder, name):
            source = Companion(folder.side, folder.path / name)
            return {
                target: source.edited(template.encode(), f"{_KEY} of {name}")
                for target, template in _named(found).items()
            }
    return {}


def _named(found: Any) -> dict[str, str]:
    """A template, or several with names, as file -> content."""
    if isinstance(found, str):
        return {_JINJA: found}
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if not isinstance(found, dict):
        return {}
    return {
        _JINJA if name == "default" else f"additional_chat_templates/{name}.jinja": template
        for name, template in found.items()
        if isinstance(name, str) and isinstance(template, str) and _NAME.fullmatch(name)
    }
