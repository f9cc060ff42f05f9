"""The certificate of a port: of the admin port, or of the server of classifiers."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from converters.errors import OptionError


@dataclass(frozen=True)
class Certificate:
    """Files in PEM form.

    Attributes:
        certfile: the certificate, and those that lead to its authority.
        keyfile: its key; by default in the same file.
        option: by which the certificate was given.
    """

    certfile: Path
    keyfile: Path | None = None
    option: str = "--admin-ssl-certfile"

    def check(self) -> None:
        """Raise `OptionError` if they cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        files = self.certfile if self.keyfile is None else f"{self.certfile} with the key {self.keyfile}"
        try:
            context.load_cert_chain(self.certfile, self.keyfile, _no_passphrase)
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
            raise OptionError(
                f"{self.option} {files} cannot be used: {reason}; expected a certificate and its key in PEM "
                "form, without a passphrase"
            ) from None


def _no_passphrase() -> str:
    """Instead of a question on the terminal."""
    return ""
