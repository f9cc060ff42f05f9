"""The keys file: what it may have, what is refused, and how a running server follows its changes."""

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from support.paths import ROOT
from support.server.tenants import Clock, entry, token_of, write_keys

from converters.errors import OptionError
from peanut_serve.settings.server import ServerSettings
from peanut_serve.tenants import watched
from peanut_serve.tenants.keys import Key, Role, read_keys_file
from peanut_serve.tenants.watched import WatchedKeys, keys_of

HASH = "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def is_current() -> float | None:
    return REGISTRY.get_sample_value("peanut_keys_current")


def test_what_an_entry_says(file: Path) -> None:
    file.write_text(
        f"""
keys:
- name: search
  sha256: {HASH}
  variants: [gsm8k, "math-*"]
  requests-per-minute: 600
  places: 32
- {{name: rotating, sha256: [{"cd" * 32}, {"ef" * 32}], variants: style}}
- name: on.call_2
  sha256: "{"12" * 32}"
  role: read-only
"""
    )
    found = read_keys_file(file)
    search, rotating = found[bytes.fromhex(HASH)], found[bytes.fromhex("cd" * 32)]
    assert (search.requests_per_minute, search.places, search.role) == (600, 32, Role.DATA)
    names = ("gsm8k", "math-1", "math", "Math-1", "gsm8k2", "org/math-1", "", "x" * 10_000_000)
    assert [search.may_use(name) for name in names] == [True, True, False, False, False, False, False, False]
    assert found[bytes.fromhex("ef" * 32)] is rotating
    assert rotating.variants == ("style",)
    assert found[bytes.fromhex("12" * 32)].role is Role.READ_ONLY
    assert len(found) == 4


def test_the_example(caplog: pytest.LogCaptureFixture) -> None:
    found = {key.name: key for key in read_keys_file(ROOT / "examples" / "operations" / "keys.yaml").values()}
    assert {key.role for key in found.values()} == set(Role)
    assert any(key.is_restricted and key.places and key.requests_per_minute for key in found.values())


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([{"name": "a"}], "entry 1: sha256: Field required"),
        ([entry("a"), {"name": "b", "sha256": "x"}], "entry 2: sha256: 0: String should match pattern"),
        ([entry("a", sha256=HASH.upper())], "sha256: 0: String should match"),
        ([entry("a", sha256=[])], "sha256: Value should have at least 1 item"),
        ([entry("a", token="t")], "entry 1: token: Extra inputs are not permitted"),
        ([entry("a", role="root")], "role: Input should be 'data', 'read-only' or 'admin'"),
        ([entry("a", places=0)], "places: Input should be greater than 0"),
        ([entry("a", places=True)], "places: Input should be a valid integer"),
        ([entry("a", requests_per_minute=1.5)], "requests-per-minute: Input should be a valid integer"),
        ([entry("a b")], "name: String should match"),
        ([entry("a\n")], "name: String should match"),
        ([entry("other")], "the name other stands for everybody"),
        ([entry("a", role="admin", places=3)], "a key with the role admin has no places"),
        ([entry("a"), entry("a", sha256=HASH)], "has a twice; list both hashes"),
        ([entry("a"), entry("b", sha256=entry("a")["sha256"])], "has the same hash for a and b"),
        ([entry("a", role="admin", sha256=hashlib.sha256(b"").hexdigest())], "has the hash of an empty key for a"),
        (["a"], "entry 1 is a str"),
    ],
)
def test_entries_that_are_refused(file: Path, entries: list[Any], reason: str) -> None:
    write_keys(file, *entries)
    with pytest.raises(OptionError) as refused:
        read_keys_file(file)
    assert reason in str(refused.value)
    assert str(refused.value).startswith(f"the keys file {file}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "expected a list under keys:"),
        (b"keys:\n", "expected a list under keys:"),
        (b"keys: []\nother: 1\n", "expected a list under keys:"),
        (b"- a\n", "expected a list under keys:"),
        (b"keys: [{name: a, sha256: peanut_secret\n\n", "is not valid YAML or JSON, line 3"),
        (b"keys: !!python/object:os.system peanut_secret", "is not valid YAML or JSON, line 1"),
        (b"\xff\xfe\x00", "is not valid YAML or JSON"),
        (b"#" * (2 << 20), "is larger than 1 MiB"),
    ],
)
def test_files_that_are_refused(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(OptionError, match=reason) as refused:
        read_keys_file(file)
    assert "secret" not in str(refused.value)


def test_a_key_that_was_put_there_instead_of_its_hash_is_not_shown(file: Path) -> None:
    write_keys(file, entry("a", sha256=token_of("a")))
    with pytest.raises(OptionError) as refused:
        read_keys_file(file)
    assert token_of("a") not in str(refused.value)


def test_changes_are_followed_within_a_second(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    keys = WatchedKeys(write_keys(file, entry("a")), clock)
    with caplog.at_level(logging.INFO, "vllm.peanut_serve"):
        write_keys(file, entry("b"), entry("c"))
        clock.now += 0.9
        assert keys.find(token_of("a").encode()) is not None
        clock.now += 0.1
        assert [keys.find(token_of(name).encode()) is not None for name in "abc"] == [False, True, True]
        assert "new: b, c, gone: a" in caplog.text
        caplog.clear()
        clock.now += 1
        before = keys.keys
        assert keys.keys is before  # nothing has changed, nothing is read
        assert caplog.text == ""
    write_keys(file)  # nobody, on purpose
    clock.now += 1
    assert keys.keys == {}


@pytest.mark.parametrize("content", [b"", b"keys: [{", b"keys: [{name: a}]", None])
def test_a_broken_change_keeps_the_keys_and_is_told(
    file: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keys = WatchedKeys(write_keys(file, entry("a")), clock)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    for _ in range(3):
        clock.now += 1
        assert keys.find(token_of("a").encode()) is not None
        assert keys.find(b"") is None
    assert caplog.text.count("the keys stay as they were: the keys file") == 1
    assert is_current() == 0
    write_keys(file, entry("b"))
    clock.now += 1
    assert [keys.find(token_of(name).encode()) is not None for name in "ab"] == [False, True]
    assert is_current() == 1


def test_a_file_that_takes_long_holds_up_no_request(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, go_on, calls = Clock(), threading.Event(), []
    keys = WatchedKeys(write_keys(file, entry("a")), clock)

    def slow(file: Path) -> dict[bytes, Key]:
        calls.append(file)
        go_on.wait(30)
        return read_keys_file(file)

    monkeypatch.setattr(watched, "read_keys_file", slow)
    write_keys(file, entry("b"))
    began = time.monotonic()
    for _ in range(50):
        clock.now += 1
        assert keys.find(token_of("a").encode()) is not None, "the old keys are gone before the new ones are there"
    assert time.monotonic() - began < 5
    assert len(calls) == 1, "it is parsed more than once at a time"
    go_on.set()
    keys._looking.result(30)
    assert [keys.find(token_of(name).encode()) is not None for name in "ab"] == [False, True]


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        (None, {"math-a", "math-a@current", "math-a@staged", "b"}),
        (["*"], {"math-a", "math-a@current", "math-a@staged", "b"}),
        (["math-*"], {"math-a", "math-a@current"}),
        (["math-a"], {"math-a", "math-a@current"}),
        (["math-a@staged"], {"math-a@staged"}),
        (["math-*", "math-*@staged"], {"math-a", "math-a@current", "math-a@staged"}),
        (["*@staged"], {"math-a@staged"}),
    ],
)
def test_a_staged_version_is_for_those_who_may_use_it_by_name(
    file: Path, patterns: list[str] | None, allowed: set[str]
) -> None:
    more = {} if patterns is None else {"variants": patterns}
    (key,) = read_keys_file(write_keys(file, entry("a", **more))).values()
    assert {name for name in ("math-a", "math-a@current", "math-a@staged", "b") if key.may_use(name)} == allowed


def test_an_edit_of_the_same_size_in_place_is_seen(file: Path) -> None:
    clock = Clock()
    keys = WatchedKeys(write_keys(file, entry("a")), clock)
    before = file.stat()
    file.write_text(json.dumps({"keys": [entry("b")]}))
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    clock.now += 1
    assert keys.find(token_of("b").encode()) is not None


def test_a_file_that_others_may_change_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_keys(file, entry("a"))
    for mode, is_warned in ((0o600, False), (0o640, False), (0o644, True), (0o660, True), (0o602, True)):
        caplog.clear()
        file.chmod(mode)
        WatchedKeys(file)
        assert ("others may read or change" in caplog.text) == is_warned, oct(mode)


def test_an_admin_port_needs_an_operator(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEANUT_ADMIN_KEY", raising=False)

    def settings(**more: Any) -> ServerSettings:
        return ServerSettings(mode="lora", roots=(), state=tmp_path, cache=tmp_path, **more)

    write_keys(file, entry("a"))
    assert keys_of(settings()) is None
    assert keys_of(settings(keys=file)) is not None
    with pytest.raises(OptionError, match="--admin-port needs a key: set PEANUT_ADMIN_KEY, or give a key in"):
        keys_of(settings(keys=file, admin_port=8001))
    monkeypatch.setenv("PEANUT_ADMIN_KEY", "key")
    assert keys_of(settings(keys=file, admin_port=8001)) is not None
    monkeypatch.delenv("PEANUT_ADMIN_KEY")
    write_keys(file, entry("a", role="admin"))
    assert keys_of(settings(keys=file, admin_port=8001)) is not None


def test_the_hash_is_that_of_the_key(file: Path) -> None:
    assert entry("a")["sha256"] == hashlib.sha256(b"peanut_the-token-of-a").hexdigest()
    assert WatchedKeys(write_keys(file, entry("a"))).find(b"peanut_the-token-of-a") is not None
