"""`peanut-serve ctl`, against an admin API on a real socket."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from support.server.admin import KEY, FakeControl, serving_app

from peanut_serve.cli.ctl import command as ctl_command
from peanut_serve.tenants.usage import USAGE, Used
from peanut_serve.web.admin import admin_app
from peanut_serve.web.connections import bind

Ctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Runs the command; returns its exit code and what it printed."""
    monkeypatch.setenv("PEANUT_ADMIN_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not used for a server on this machine

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            ctl_command.main(list(arguments))
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FastAPI, str]]:
    app = admin_app(FakeControl(), KEY)
    with serving_app(app) as url:
        yield app, url


@pytest.fixture
def control(served: tuple[FastAPI, str], monkeypatch: pytest.MonkeyPatch) -> FakeControl:
    monkeypatch.setenv("PEANUT_ADMIN_URL", served[1])
    served[0].state.control = FakeControl()
    return served[0].state.control


def refused(done: tuple[int, str, str]) -> str:
    """The single line of the error."""
    code, out, err = done
    assert (code, out, err.count("\n")) == (1, "", 1), done
    assert err.startswith("peanut-serve ctl: ")
    assert KEY not in err
    return err.removeprefix("peanut-serve ctl: ").rstrip("\n")


def test_list(ctl: Ctl, control: FakeControl) -> None:
    control.names = ["base", "user/name", "long-" * 20, "[/odd]"]
    code, out, err = ctl("list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["NAME", "KIND", "STATE", "RUNNING", "WAITING", "REQUESTS", "HOST", "SWAP"]
    assert lines[1].split() == ["base", "base", "active,", "pinned", "1", "2", "30", "2.50", "GB", "0.12", "s"]
    assert [line.split()[0] for line in lines[1:]] == control.names
    _, out, _ = ctl("list", "--json")
    assert json.loads(out) == [variant.model_dump(mode="json") for variant in map(control.variant, control.names)]


def test_show_and_engine(ctl: Ctl, control: FakeControl) -> None:
    lines = ctl("show", "user/name")[1].splitlines()
    facts = dict(map(str.strip, line.split("  ", 1)) for line in lines)
    assert facts["name"] == "user/name"
    assert facts["source"] == "/srv/user/name[1]"
    assert facts["previous"] == "d0" * 20
    assert facts["error"] == "-"
    assert json.loads(ctl("show", "user/name", "--json")[1]) == control.variant("user/name").model_dump(mode="json")
    code, out, _ = ctl("engine")
    assert code == 0
    facts = dict(map(str.strip, line.split("  ", 1)) for line in out.splitlines())
    assert facts["swap seconds"] == "drain 0.500, apply 0.250"
    assert facts["host cache limit"] == "20.00 GB"
    assert json.loads(ctl("engine", "--json")[1])["state"] == "serving"


def test_changes(ctl: Ctl, control: FakeControl) -> None:
    shown = f"user/name: ready, digest {'d1' * 20}\n"
    for verb in ("activate", "reload", "rollback", "preload", "pin", "unpin"):
        assert ctl(verb, "user/name") == (0, shown, "")
    assert ctl("rollback", "user/name", "--digest", "d0", "--hold") == (0, shown, "")
    assert ctl("unregister", "user/name") == (0, "user/name: removed\n", "")
    assert ctl("register", "user/name", "/srv/x")[0] == 0
    assert ctl("unregister", "--drain", "user/name")[0] == 0
    assert control.calls == [
        ("activate", "user/name"),
        ("reload", "user/name"),
        ("rollback", "user/name", None, False),
        ("preload", "user/name"),
        ("pin", "user/name", True),
        ("pin", "user/name", False),
        ("rollback", "user/name", "d0", True),
        ("unregister", "user/name", False),
        ("register", "user/name", "/srv/x"),
        ("unregister", "user/name", True),
    ]


def test_usage(ctl: Ctl, control: FakeControl) -> None:
    USAGE.add("v-ctl", "team-ctl", Used(3, 1000, 250, 12.34))
    code, out, _ = ctl("usage")
    (row,) = [line.split() for line in out.splitlines() if "v-ctl" in line]
    assert (code, row) == (0, ["v-ctl", "team-ctl", "3", "1000", "250", "12.3"])
    assert out.splitlines()[0].split() == [
        "VARIANT",
        "TENANT",
        "REQUESTS",
        "PROMPT",
        "TOKENS",
        "GENERATED",
        "SECONDS",
    ]
    assert out.splitlines()[-1].startswith("since 20")
    report = json.loads(ctl("usage", "--json")[1])
    assert next(one for one in report["usage"] if one["variant"] == "v-ctl")["engine_seconds"] == 12.34
    assert report["since"].startswith("20")


@pytest.mark.parametrize(
    "name", ["..", ".", "../engine", "a?drain=true", "a#b", "50%", "%2E%2E", "é", "a b", "/", "a//b"]
)
def test_names_are_sent_unchanged(ctl: Ctl, control: FakeControl, name: str) -> None:
    assert refused(ctl("activate", name)) == f"there is no variant {name!r}"
    assert refused(ctl("unregister", name)) == f"there is no variant {name!r}"
    assert control.calls == [("activate", name), ("unregister", name, False)]


def test_errors_of_the_server(ctl: Ctl, control: FakeControl) -> None:
    assert refused(ctl("activate", "in-use")) == "in-use has 3 requests"
    assert refused(ctl("activate", "swap")) == "out of memory rolled back"
    assert refused(ctl("activate", "down")) == "the engine restarts; try again in 20 s"
    assert refused(ctl("activate", "bug")) == "unexpected KeyError; see the server's log"
    assert refused(ctl("register", "base", "x")) == "base is taken"


def test_the_key(ctl: Ctl, control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    wrong = (
        "the server rejected the key; PEANUT_ADMIN_KEY or --key-file must contain the one it was started with, "
        "or one of --keys"
    )
    monkeypatch.setenv("PEANUT_ADMIN_KEY", "wrong")
    assert refused(ctl("list")) == wrong
    assert ctl("--key-file", str(file), "list")[0] == 0  # the option has precedence
    file.write_bytes(b"\xff\xfe\x7a")
    assert refused(ctl("--key-file", str(file), "list")) == wrong
    file.write_text(f"{KEY}\n{KEY}\n")
    assert refused(ctl("--key-file", str(file), "list")).endswith("must be one line of printable characters")
    assert "No such file" in refused(ctl("--key-file", str(tmp_path / "none"), "list"))
    monkeypatch.setenv("PEANUT_ADMIN_KEY", "")
    assert refused(ctl("list")) == "the admin key in PEANUT_ADMIN_KEY is empty"
    monkeypatch.delenv("PEANUT_ADMIN_KEY")
    assert refused(ctl("list")) == "there is no admin key; set PEANUT_ADMIN_KEY, or use --key-file"


def test_a_server_that_is_not_running(ctl: Ctl) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        message = refused(ctl("--url", url, "list"))
    assert message.startswith(f"cannot reach {url} (")
    assert message.endswith("; check --url, and that `peanut-serve --mode merged --admin-port` is running")
    assert "cannot reach http://no.such.host.invalid" in refused(ctl("--url", "http://no.such.host.invalid", "list"))


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "localhost:8001", "ftp://localhost", "http://", "x y"])
def test_invalid_urls(ctl: Ctl, url: str) -> None:
    assert refused(ctl("--url", url, "list")) == f"{url} is not a valid URL; expected one like http://127.0.0.1:8001"


def test_another_server_at_the_url(ctl: Ctl) -> None:
    other = FastAPI()
    other.add_api_route("/admin/v1/engine", lambda: {"error": "Unauthorized"})
    with serving_app(other) as url:
        for command, status in (("list", 404), ("engine", 200)):
            assert f"{url} answered {status}, but not like the admin API" in refused(ctl("--url", url, command))


def test_a_server_that_dies(ctl: Ctl) -> None:
    def accept() -> None:
        connection, _ = listener.accept()
        connection.recv(1)
        connection.close()

    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        message = refused(ctl("--url", f"http://127.0.0.1:{listener.getsockname()[1]}", "activate", "base"))
        thread.join()
    assert "did not complete its response (" in message


def test_interrupting_the_wait(ctl: Ctl, control: FakeControl, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(httpx.Client, "request", interrupt)
    message = "stopped waiting, but the server continues; see peanut-serve ctl list"
    assert refused(ctl("activate", "base")) == message


def test_help(ctl: Ctl) -> None:
    code, out, _ = ctl("--help")
    assert (code, "peanut-serve ctl register gsm8k gsm8k-2026-11" in out) == (0, True)
    for command in (
        "list",
        "show",
        "engine",
        "register",
        "unregister",
        "activate",
        "reload",
        "rollback",
        "preload",
        "pin",
        "unpin",
    ):
        assert f"  {command} " in out
        assert ctl(command, "--help")[0] == 0  # needs no key
