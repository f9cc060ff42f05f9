"""The keys file: who may ask for which variants and how often, and who operates the server.

It has hashes of keys, not keys. `peanut-serve key` makes keys of 256 random bits, which nobody can find from a plain
SHA-256; a word that a person chose could be found.
"""

import hashlib
import secrets
from collections.abc import Mapping
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from converters.errors import OptionError
from peanut_serve.settings.small_file import read_small
from peanut_serve.settings.versions import CURRENT, STAGED

OTHERS = "other"  # in metrics: all clients without a key of the file, and names that are gone
PREFIX = "peanut_"  # of a new key, so that it is recognised where it should not be
ALL = ("*",)
_MOST_BYTES = 1 << 20  # of a file
_LONGEST_NAME = 512  # of a variant
_RANDOM_BYTES = 32


class Role(str, Enum):
    """What a key is for."""

    DATA = "data"  # requests for variants
    READ_ONLY = "read-only"  # what the admin API and the console show
    ADMIN = "admin"  # everything that these can do


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the former, in C, is ten times as fast
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Whole = Annotated[int, Field(strict=True, gt=0)]


class Key(BaseModel):
    """An entry of the file.

    Attributes:
        name: of the tenant or operator, in labels, logs and usage.
        sha256: of its key; of several while one replaces another.
        role: what it is for.
        variants: names of the variants that it may use, or patterns like `math-*`; see `may_use`.
        requests_per_minute: how many it may send; None for any number.
        places: how many may be in the server at once; None for any number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: Annotated[tuple[_Digest, ...], BeforeValidator(_listed), Field(min_length=1)]
    role: Role = Role.DATA
    variants: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ALL
    requests_per_minute: _Whole | None = None
    places: _Whole | None = None

    @model_validator(mode="after")
    def _check(self) -> "Key":
        if self.name == OTHERS:
            raise ValueError(f"the name {OTHERS} stands for everybody who is not in the file; choose another")
        limits = {"variants", "requests_per_minute", "places"} & self.model_fields_set
        if self.role is not Role.DATA and limits:
            raise ValueError(f"a key with the role {self.role.value} has no {min(limits)}: it asks for no variants")
        return self

    @property
    def is_restricted(self) -> bool:
        """Whether there may be variants that it may not use."""
        return "*" not in self.variants

    def may_use(self, variant: str) -> bool:
        """Whether it may use a variant of this name, which may come from a client.

        `math@current` is `math`. `math@staged` is another version, which only a pattern with an @ in it allows.
        """
        if not self.is_restricted:
            return True
        variant = variant.removesuffix(CURRENT)
        patterns = self.variants
        if variant.endswith(STAGED):
            patterns = tuple(pattern for pattern in patterns if "@" in pattern)
        return len(variant) <= _LONGEST_NAME and any(fnmatchcase(variant, pattern) for pattern in patterns)


def digest_of(token: bytes) -> bytes:
    """What a key is looked up by. The time that this takes says nothing about keys that are similar."""
    return hashlib.sha256(token).digest()


def new_token() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def read_keys_file(file: Path) -> dict[bytes, Key]:
    """The keys by their digests. None at all is allowed: then nobody has a key of the file.

    Raises `OptionError` if the file cannot be used. The message has no text of the file but names, as keys may be in
    it by mistake.
    """
    content = read_small(file, _MOST_BYTES, f"the keys file {file}")
    found: dict[bytes, Key] = {}
    names: set[str] = set()
    for number, entry in enumerate(_entries(file, content), 1):
        key = _key(f"the keys file {file}, entry {number}", entry)
        if key.name in names:
            raise OptionError(f"the keys file {file} has {key.name} twice; list both hashes as sha256 of one entry")
        names.add(key.name)
        for text in key.sha256:
            if bytes.fromhex(text) == digest_of(b""):
                told = f"the keys file {file} has the hash of an empty key for {key.name}"
                raise OptionError(f"{told}, which everybody has; make one with peanut-serve key")
            other = found.setdefault(bytes.fromhex(text), key)
            if other is not key:
                raise OptionError(f"the keys file {file} has the same hash for {other.name} and {key.name}")
    return found


def _entries(file: Path, content: bytes) -> list[Any]:
    try:
        value = yaml.load(content.decode(), _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise OptionError(f"the keys file {file} is not valid YAML or JSON{where}") from None
    if not isinstance(value, dict) or set(value) != {"keys"} or not isinstance(value["keys"], list):
        raise OptionError(f"the keys file {file} has another form; expected a list under keys: and nothing else")
    return list(value["keys"])


def _key(where: str, entry: Any) -> Key:
    if not isinstance(entry, Mapping):
        raise OptionError(f"{where} is a {type(entry).__name__}; expected name, sha256 and others")
    fields = {str(field).replace("-", "_"): value for field, value in entry.items()}
    try:
        return Key.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = "".join(f"{part}: ".replace("_", "-") for part in first["loc"])
        raise OptionError(f"{where}: {field}{first['msg'].removeprefix('Value error, ')}") from None
