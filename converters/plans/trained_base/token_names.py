"""How the tokenizer beside an adapter calls tokens, for messages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.files.json_files import parse_json

_MOST = 8  # shown


def name_tokens(folder: Path, ids: range) -> str:
    """The names of tokens, as far as the files in `folder` have them: `'<a>', '<b>', and 2 more`."""
    known = _added_tokens(folder)
    names = [repr(known[number]) if number in known else f"token {number}" for number in ids[:_MOST]]
    more = f", and {len(ids) - _MOST} more" if len(ids) > _MOST else ""
    return ", ".join(names) + more


def _added_tokens(folder: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for file, read in (
        ("added_tokens.json", _by_name),
        ("tokenizer_config.json", _by_id),
        ("tokenizer.json", _listed),
    ):
        try:
            found |= read(parse_json(folder / file))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, or in another form: the numbers remain
    return found


def _by_name(content: Mapping[str, int]) -> dict[int, str]:
    return {int(number): str(name) for name, number in content.items()}


def _by_id(content: Mapping[str, Any]) -> dict[int, str]:
    return {int(number): str(one["content"]) for number, one in content["added_tokens_decoder"].items()}


def _listed(content: Mapping[str, Any]) -> dict[int, str]:
    return {int(one["id"]): str(one["content"]) for one in content["added_tokens"]}
