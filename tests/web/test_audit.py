"""The audit log of the admin API, over a real socket."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.server.admin import KEY, FakeControl, serving_app

from converters.errors import OptionError
from peanut_serve.web.admin import admin_app
from peanut_serve.web.audit import AuditedControl, AuditLog, Caller

V1 = "/admin/v1"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "audit.jsonl"


@pytest.fixture
def client(file: Path) -> Iterator[httpx.Client]:
    headers = {b"Authorization": b"Bearer " + KEY.encode()}
    app = admin_app(AuditedControl(FakeControl(), AuditLog(file)), KEY)
    with serving_app(app) as url, httpx.Client(base_url=url, headers=headers) as client:
        yield client


def entries(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_change_gets_a_line(client: httpx.Client, file: Path) -> None:
    digest = "d1" * 20
    client.post(f"{V1}/variants", json={"name": "new", "source": "/srv/new"})
    for verb in ("activate", "reload", "pin", "unpin"):
        client.post(f"{V1}/variants/new/{verb}")
    client.post(f"{V1}/variants/new/rollback", json={"digest": "d0"})
    client.delete(f"{V1}/variants/new?drain=true")
    found = entries(file)
    verbs = ["register", "activate", "reload", "pin", "unpin", "rollback", "unregister"]
    assert [one["action"] for one in found] == verbs
    assert {(one["variant"], one["outcome"]) for one in found} == {("new", "done")}
    assert [(one["old"], one["new"]) for one in found] == [(None, digest), *[(digest, digest)] * 5, (digest, None)]
    assert found[0]["source"] == "/srv/new"
    assert (found[5]["digest"], found[5]["hold"], found[6]["drain"]) == ("d0", False, True)
    assert {one["from"] for one in found} == {"127.0.0.1"}
    assert len({one["key"] for one in found}) == 1
    assert len(str(found[0]["key"])) == 12
    assert str(found[0]["time"]).endswith("+00:00")
    assert file.stat().st_mode & 0o077 == 0


def test_refusals_and_failures(client: httpx.Client, file: Path) -> None:
    client.post(f"{V1}/variants/swap/activate")
    client.post(f"{V1}/variants/none/reload")
    client.post(f"{V1}/variants/bug/activate")
    refused, unknown, failed = entries(file)
    assert (refused["outcome"], refused["error"]) == ("refused", "SwapError: out of memory\nrolled back")
    assert (failed["outcome"], failed["error"]) == ("failed", "KeyError: 'bug'")
    assert (unknown["outcome"], unknown["old"], unknown["new"]) == ("refused", None, None)


def test_what_changes_nothing_gets_no_line(client: httpx.Client, file: Path) -> None:
    client.get(f"{V1}/variants")
    client.post(f"{V1}/variants/base/rollback", json={"to": "d0"})
    client.post(f"{V1}/variants/base/activate", headers={"Authorization": "Bearer wrong"})
    assert entries(file) == []


def test_keys_are_never_written(client: httpx.Client, file: Path) -> None:
    client.post(f"{V1}/variants/base/pin?key=in-the-address", headers={"X-Api-Key": "in-a-header"})
    client.post(f"{V1}/variants", json={"name": "a", "source": "b"})
    text = file.read_text()
    for key in (KEY, json.dumps(KEY)[1:-1], "in-the-address", "in-a-header"):
        assert key not in text


def test_the_file_is_rotated(file: Path) -> None:
    log = AuditLog(file, most_bytes=1000, kept=2)
    for number in range(50):
        log.write(Caller("::1", "f"), "pin", f"v{number}\n", {})
    log.close()
    files = sorted(file.parent.iterdir())
    assert [one.name for one in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(one.stat().st_size <= 1000 for one in files)
    assert entries(file)[-1]["variant"] == "v49\n"
    assert all(one.stat().st_mode & 0o077 == 0 for one in files)


def test_a_full_disk_is_told(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(Path("/dev/full"))
    with caplog.at_level(logging.ERROR):
        log.write(Caller(), "pin", "v1", {})
    assert "the audit log /dev/full cannot be written; the entry is: {" in caplog.text
    assert "No space left" in caplog.text


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"the audit log .* cannot be written: Is a directory"):
        AuditLog(tmp_path)


def test_two_servers_do_not_share_a_file(file: Path) -> None:
    """Each would rotate the lines of the other away."""
    log = AuditLog(file, most_bytes=1000, kept=20)
    with pytest.raises(
        OptionError, match="another server writes the audit log .*; give each server a file of its own"
    ):
        AuditLog(file)
    for number in range(50):
        log.write(Caller("::1", "f"), "pin", f"v{number}", {})
    with pytest.raises(OptionError, match="another server writes"):
        AuditLog(file)  # a new file by now
    log.close()
    AuditLog(file).close()
    found = [one["variant"] for path in file.parent.iterdir() for one in entries(path)]
    assert sorted(found) == sorted(f"v{number}" for number in range(50))
