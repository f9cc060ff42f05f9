"""The admin port with TLS: `ctl` and the console over https, and what cannot be used as a certificate."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from support.server.admin import KEY, FakeControl, serving_app
from support.server.certificates import self_signed
from support.server.console import Completions

from converters.errors import OptionError
from peanut_serve.cli.ctl import command as ctl_command
from peanut_serve.settings.server import server_settings
from peanut_serve.settings.tls import Certificate
from peanut_serve.web.admin import admin_app
from peanut_serve.web.console.app import ConsoleHost, add_console

Ctl = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return self_signed(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def url(certificate: Certificate) -> Iterator[str]:
    control = FakeControl()
    app = admin_app(control, KEY)
    add_console(app, ConsoleHost(control, KEY, 8001, route=Completions().route))
    with serving_app(app, certificate) as url:
        yield url


@pytest.fixture
def ctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Runs the command; returns its exit code and what it printed."""
    monkeypatch.setenv("PEANUT_ADMIN_KEY", KEY)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            ctl_command.main(list(map(str, arguments)))
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


def test_ctl_over_https(ctl: Ctl, url: str, certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, error = ctl("--url", url, "--ca-file", certificate.certfile, "list")
    assert (code, error) == (0, "")
    assert "user/name" in out
    monkeypatch.setenv("PEANUT_ADMIN_CA_FILE", str(certificate.certfile))
    monkeypatch.setenv("PEANUT_ADMIN_URL", url)
    assert ctl("pin", "base")[0] == 0


def test_ctl_says_what_is_wrong(ctl: Ctl, url: str, certificate: Certificate, tmp_path: Path) -> None:
    def refusal(*arguments: str | Path) -> str:
        code, _, error = ctl(*arguments, "list")
        assert (code, error.count("\n")) == (1, 1)
        assert KEY not in error
        return error

    assert "give the certificate of its authority as --ca-file" in refusal("--url", url)
    other = self_signed(tmp_path).certfile
    assert "give the certificate of its authority as --ca-file" in refusal("--url", url, "--ca-file", other)
    assert "if it has TLS, use an https:// URL" in refusal("--url", url.replace("https", "http"))
    missing = refusal("--url", url, "--ca-file", tmp_path / "none")
    assert "none cannot be used: No such file" in missing
    (tmp_path / "empty").write_text("")
    assert "empty cannot be used: it has no certificate in PEM form" in refusal("--ca-file", tmp_path / "empty")
    with serving_app(admin_app(FakeControl(), KEY)) as plain:
        tls = refusal("--url", plain.replace("http", "https"), "--ca-file", certificate.certfile)
    assert "does not speak TLS; use an http:// URL" in tls


def test_the_console_over_https(url: str, certificate: Certificate) -> None:
    trust = ssl.create_default_context(cafile=certificate.certfile)
    with httpx.Client(base_url=url, verify=trust, headers={"Origin": url}) as browser:
        answer = browser.post("/console/login", data={"key": KEY})
        assert answer.status_code == 303
        assert "secure" in answer.headers["set-cookie"].lower().split("; ")
        assert browser.get("/console").status_code == 200
        plain = browser.post("/console/act", json={}, headers={"Origin": url.replace("https", "http")})
        assert plain.status_code == 403


def settings(tmp_path: Path, **options: object) -> object:
    """The settings of a server with these options."""
    folders = {"state": tmp_path, "cache": tmp_path, "roots": ()}
    return server_settings("base", host_cache="8GiB", mode="merged", **folders, **options)


def test_certificates_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEANUT_ADMIN_KEY", "a-key")
    good, other = self_signed(tmp_path / "good"), self_signed(tmp_path / "other")
    locked = self_signed(tmp_path / "locked", b"passphrase")
    wrong = {
        "tls.crt with the key .* cannot be used: KEY_VALUES_MISMATCH": (good.certfile, other.keyfile),
        "without a passphrase": (locked.certfile, locked.keyfile),
        "tls.crt cannot be used": (good.certfile, None),
        "none cannot be used: No such file": (tmp_path / "none", None),
    }
    for message, (certfile, keyfile) in wrong.items():
        with pytest.raises(OptionError, match=message):
            settings(tmp_path, admin_port=8001, admin_ssl_certfile=certfile, admin_ssl_keyfile=keyfile)
    with pytest.raises(OptionError, match="--admin-ssl-keyfile needs --admin-ssl-certfile"):
        settings(tmp_path, admin_port=8001, admin_ssl_keyfile=good.keyfile)
    with pytest.raises(OptionError, match="--admin-ssl-certfile is for the admin API, which is off"):
        settings(tmp_path, admin_ssl_certfile=good.certfile, admin_ssl_keyfile=good.keyfile)
    joined = tmp_path / "joined.pem"
    joined.write_bytes(good.certfile.read_bytes() + good.keyfile.read_bytes())  # type: ignore[union-attr]
    found = settings(tmp_path, admin_port=8001, admin_ssl_certfile=joined)
    assert found.certificate == Certificate(joined)  # type: ignore[attr-defined]
