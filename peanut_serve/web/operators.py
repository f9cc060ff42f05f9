"""Who may use the admin API and the console, and who of them may change something."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from peanut_serve.errors import ForbiddenError, UnauthorizedError
from peanut_serve.settings.admin_key import checked_key
from peanut_serve.tenants.keys import Key, Role, digest_of
from peanut_serve.tenants.visits import refused
from peanut_serve.tenants.watched import WatchedKeys
from peanut_serve.web.bearer import fingerprint


@dataclass(frozen=True)
class Operator:
    """Somebody with a key.

    Attributes:
        name: for logs: the one in the keys file, or the fingerprint of an admin key.
        may_change: whether the key is for more than looking.
        digest: of the key.
        is_named: whether the name is one of the keys file.
    """

    name: str
    may_change: bool
    digest: bytes
    is_named: bool = True

    def check_change(self, what: str) -> None:
        """Raise `ForbiddenError` if this operator may change nothing."""
        if not self.may_change:
            raise refused(self.name, "role", ForbiddenError(f"the key of {self.name} is read-only; {what} changes"))


class Operators:
    """Finds out who sends a request.

    Args:
        keys: admin keys that are not in a file.
        file: the keys file, if there is one.

    Raises `OptionError` if a key cannot be sent in a header.
    """

    def __init__(self, keys: Sequence[str] = (), file: WatchedKeys | None = None) -> None:
        self._own = [digest_of(checked_key(key, "the server's settings").encode()) for key in keys]
        self._file = file

    def find(self, token: bytes) -> Operator:
        """The operator with a key. A key that is in the file as well has the role of the file.

        Raises `UnauthorizedError`, and `ForbiddenError` for a key of a tenant.
        """
        digest = digest_of(token)
        key = self._in_file(digest)
        if key is None and self._is_own(digest):
            return Operator(fingerprint(token), True, digest, is_named=False)
        if key is None:
            raise UnauthorizedError("the admin key is missing or wrong; send it as Authorization: Bearer KEY")
        if key.role is Role.DATA:
            message = f"the key of {key.name} is for requests for variants, not for operators"
            raise refused(key.name, "role", ForbiddenError(message))
        return Operator(key.name, key.role is Role.ADMIN, digest)

    def renewed(self, before: Operator) -> Operator | None:
        """What an operator may do now; None if the key is no longer one of operators."""
        key = self._in_file(before.digest)
        if key is None:
            return before if self._is_own(before.digest) else None
        return None if key.role is Role.DATA else Operator(key.name, key.role is Role.ADMIN, before.digest)

    def _is_own(self, digest: bytes) -> bool:
        matches = [secrets.compare_digest(digest, own) for own in self._own]  # with every key, found or not
        return any(matches)

    def _in_file(self, digest: bytes) -> Key | None:
        return None if self._file is None else self._file.keys.get(digest)


def operators_of(key: "str | Operators") -> Operators:
    """Those who have one admin key, or who were found elsewhere. Raises `OptionError` for a key that is not one."""
    return key if isinstance(key, Operators) else Operators([key])
