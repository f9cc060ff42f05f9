"""The client of the admin API, for `peanut-serve ctl`."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from converters.errors import OptionError
from peanut_serve.errors import AdminRequestError
from peanut_serve.settings.admin_key import KEY_VARIABLE, checked_key
from peanut_serve.web.schema import ErrorAnswer

# seconds; the admin API shares its event loop with the server, which may be busy
_TIMEOUT = 60.0
_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


def segment(name: str) -> str:
    """A name as one segment of a path: slashes are escaped, and so are dots, which would be resolved as folders."""
    return quote(name, safe="").replace(".", "%2E")


@dataclass(frozen=True)
class AdminClient:
    """The admin API of a server, or of a fleet.

    Attributes:
        url: its URL, without /admin/v1.
        key_file: file with the key; by default the key is read from the environment.
        ca_file: certificates of the authorities that are trusted with https; by default those of the system.
    """

    url: str
    key_file: Path | None
    ca_file: Path | None = None

    def ask(
        self, answer: Any, method: str, path: str, body: BaseModel | None = None, has_timeout: bool = True
    ) -> Any:
        """Send a request and return the response as an `answer`. Without `has_timeout`, wait as long as it takes.

        Raises `AdminRequestError` for no response, an error, or a response that is not from the admin API.
        """
        response = self._send(method, path, body, _TIMEOUT if has_timeout else None)
        try:
            if response.is_success:
                return TypeAdapter(answer).validate_json(response.content or b"null")
            refusal = ErrorAnswer.model_validate_json(response.content).error
        except ValidationError:
            raise AdminRequestError(
                f"{self.url} answered {response.status_code}, but not like the admin API of this version; "
                "--url needs the admin port, not the port for completions"
            ) from None
        raise AdminRequestError(_explain(response, refusal.message))

    def _send(self, method: str, path: str, body: BaseModel | None, timeout: float | None) -> httpx.Response:
        headers, trust = {b"Authorization": b"Bearer " + self._key().encode()}, self._trust()
        content = body.model_dump() if body else None
        try:
            with httpx.Client(
                timeout=httpx.Timeout(timeout, connect=_TIMEOUT),
                verify=trust,
                trust_env=httpx.URL(self.url).host not in _LOCAL_HOSTS,  # a proxy would resolve these to itself
            ) as client:
                url = f"{self.url.rstrip('/')}/admin/v1/{path}"
                return client.request(method, url, headers=headers, json=content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AdminRequestError(self._failure(error)) from None

    def _trust(self) -> ssl.SSLContext | bool:
        if self.ca_file is None:
            return True
        try:
            return ssl.create_default_context(cafile=self.ca_file.expanduser())
        except OSError as error:
            reason = error.strerror if not isinstance(error, ssl.SSLError) else "it has no certificate in PEM form"
            raise OptionError(f"--ca-file {self.ca_file} cannot be used: {reason}") from None

    def _key(self) -> str:
        if self.key_file is not None:
            return checked_key(self.key_file.expanduser().read_text("utf-8", "replace"), str(self.key_file))
        if (key := os.environ.get(KEY_VARIABLE)) is None:
            raise OptionError(f"there is no admin key; set {KEY_VARIABLE}, or use --key-file")
        return checked_key(key, KEY_VARIABLE)

    def _failure(self, error: Exception) -> str:
        if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
            return f"{self.url} is not a valid URL; expected one like http://127.0.0.1:8001"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return f"{self.url} is not trusted ({error}); give the certificate of its authority as --ca-file"
        if "WRONG_VERSION_NUMBER" in str(error) or "RECORD_LAYER_FAILURE" in str(error):
            return f"{self.url} does not speak TLS; use an http:// URL, or start the server with --admin-ssl-certfile"
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            found = f"cannot reach {self.url} ({error or 'no response'})"
            return f"{found}; check --url, and that `peanut-serve --mode merged --admin-port` is running"
        reason = str(error) or type(error).__name__
        hint = "; if it has TLS, use an https:// URL" if self.url.startswith("http://") else ""
        return f"{self.url} did not complete its response ({reason}){hint}; see the server's log, and retry"


def _explain(response: httpx.Response, message: str) -> str:
    if response.status_code == httpx.codes.UNAUTHORIZED:
        expected = "the one it was started with, or one of --keys"
        return f"the server rejected the key; {KEY_VARIABLE} or --key-file must contain {expected}"
    if after := response.headers.get("Retry-After"):
        return f"{message}; try again in {after} s"
    return message
