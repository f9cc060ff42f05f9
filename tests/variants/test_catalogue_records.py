"""The records of a catalogue on disk, and how it handles damaged records and files."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.server.catalogue_site import Site
from support.tiny_models import Pair, edit_json, edit_weights

from converters.errors import OptionError
from peanut_serve.errors import BeingWrittenError, UnknownVariantError, VariantError
from peanut_serve.variants.reading import VersionReader
from peanut_serve.variants.state_folder import VariantStore


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Site:
    return Site(pair, tmp_path)


def test_history_is_bounded(site: Site) -> None:
    digests = []
    for _ in range(8):
        digests.append(site.digest())
        site.change()
    record = site.catalogue.find("v1").record
    assert [record.digest, *record.previous] == digests[:1:-1]
    assert site.thetas() == set(digests[2:])
    (site.state / "theta" / ".new-left").mkdir()
    site.start()
    assert site.thetas() == set(digests[2:])


def test_state_is_kept_across_restarts(site: Site) -> None:
    first = site.digest()
    site.catalogue.pin("v1", True)
    site.catalogue.register("nice", "v1")
    site.catalogue.remember_active("nice")
    records = site.start().records
    assert records.active == "nice"
    assert records.variants["v1"].pinned
    assert not records.variants["nice"].pinned
    assert site.digest() == first
    shutil.rmtree(site.tasks / "v1")
    with pytest.raises(UnknownVariantError, match="the files of v1 were not found"):
        site.digest()


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"base": "x", "more": 1}', '{"base": "x", "variants": {"v": {}}}', "\0"]
)
def test_damaged_records(site: Site, damage: str) -> None:
    site.digest()
    (site.state / "variants.json").write_text(damage)
    with pytest.raises(OptionError, match="variants.json is damaged .* remove it"):
        site.start()
    (site.state / "variants.json").unlink()
    assert site.start().records.variants == {}


def test_one_server_per_state_folder(site: Site) -> None:
    with pytest.raises(OptionError, match="another server uses .* start this one with another --state folder"):
        VariantStore(site.state)


def test_records_of_another_base(site: Site) -> None:
    first = site.digest()
    edit_weights(site.pair.base / "model.safetensors", lambda weights: {k: v * 2 for k, v in weights.items()})
    assert site.start().records.variants == {}
    assert site.digest() != first


def test_records_of_another_base_are_set_aside(site: Site) -> None:
    """A start with a wrong base loses nothing: not even that a name was removed."""
    first = site.digest()
    shutil.copytree(site.tasks / "v1", site.tasks / "v2")
    site.digest("v2")
    site.catalogue.register("alias-of-v1", "v1")
    site.catalogue.pin("v1", True)
    site.catalogue.unregister("v2")
    right = (site.pair.base / "model.safetensors").read_bytes()
    edit_weights(site.pair.base / "model.safetensors", lambda weights: {k: v * 2 for k, v in weights.items()})
    site.start()
    assert "v2" in site.names()
    assert site.digest("v2") != first
    (site.pair.base / "model.safetensors").write_bytes(right)
    site.start()
    assert site.names() == ["base", "alias", "alias-of-v1", "org/allowed", "v1"]
    assert site.catalogue.find("v1").record.pinned
    shutil.rmtree(site.tasks / "v1")  # the kept copy of this base is still there
    shutil.copytree(site.tasks / "v2", site.tasks / "v1")
    assert site.digest() == first


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing file"])
def test_a_damaged_copy_is_made_anew(site: Site, damage: str) -> None:
    """Whether the copy is read after a restart, or is found under the digest of files that are read again."""
    first = site.digest()
    for restarted in (True, False):
        kept = site.state / "theta" / first / "adapter_model.safetensors"
        whole = kept.read_bytes()
        if damage == "flipped":
            at = len(whole) - 5
            kept.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        elif damage == "truncated":
            kept.write_bytes(whole[: len(whole) // 2])
        elif damage == "empty":
            kept.write_bytes(b"")
        else:
            kept.unlink()
        if restarted:
            site.start()
        else:
            asyncio.run(site.catalogue.reload("v1", site.preparing))
        assert site.digest() == first
        assert (site.state / "theta" / first / "adapter_model.safetensors").read_bytes() == whole
    site.change()
    site.digest()
    (site.state / "theta" / first / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(VariantError, match="is no longer available"):
        asyncio.run(site.catalogue.rollback("v1", first, site.preparing))


def test_records_of_an_older_version(site: Site) -> None:
    first = site.digest()
    saved = json.loads((site.state / "variants.json").read_text())
    for record in saved["variants"].values():
        del record["held"], record["release"]
    (site.state / "variants.json").write_text(json.dumps({**saved, "schema_version": 1}))
    assert site.start().records.variants["v1"].digest == first
    assert site.digest() == first


def test_records_of_a_newer_version(site: Site) -> None:
    site.digest()
    text = (site.state / "variants.json").read_text()
    edit_json(site.state / "variants.json", schema_version=4)
    with pytest.raises(OptionError, match="schema version 4, expected at most 3: it was written by a newer"):
        site.start()
    for garbled in ("", "[" * 100_000, "[]", text[:-20], text.replace('"source"', '"sauce"')):
        (site.state / "variants.json").write_text(garbled)
        with pytest.raises(OptionError, match="is damaged .*; remove it to start without records"):
            site.start()


def test_files_that_have_just_changed(site: Site) -> None:
    """A version is taken from files that have rested, and those that may be incomplete have to rest longer."""
    site.settle = 0.3
    site.start()
    start = time.monotonic()
    site.change()
    first = site.digest()
    assert time.monotonic() - start > 0.2
    weights = site.tasks / "v1" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))  # as if preallocated
    with pytest.raises(BeingWrittenError, match="end in zeros and have just changed") as error:
        site.digest()
    assert 1 <= error.value.retry_after <= 9
    weights.write_bytes(whole)
    assert site.digest() == first


def test_a_root_that_is_a_link_to_the_current_release(site: Site, tmp_path: Path) -> None:
    first = site.digest()
    releases = tmp_path / "releases"
    releases.mkdir()
    site.tasks.rename(releases / "1")
    site.tasks.symlink_to(releases / "1")
    site.start()
    assert site.digest() == first
    shutil.copytree(releases / "1", releases / "2")
    site.tasks.unlink()
    site.tasks.symlink_to(releases / "2")
    site.change()
    assert site.digest() != first


def test_a_file_that_is_far_too_large_is_not_copied(site: Site) -> None:
    with (site.tasks / "v1" / "optimizer.bin").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(VariantError, match=r"the files of v1 have 1048576 MiB, expected at most \d+ MiB"):
        site.digest()
    assert site.thetas() == set()


def test_files_that_are_being_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = VersionReader._open
    monkeypatch.setattr(VersionReader, "_open", lambda *args: (opened(*args), site.change())[0])
    with pytest.raises(BeingWrittenError, match="the files of v1 are being written"):
        site.digest()


def test_a_full_disk_stops_only_what_is_new(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose files are exchanged for new ones and back is served again."""

    def switch(to: Path) -> None:
        (site.tasks / ".new").symlink_to(to)
        (site.tasks / ".new").rename(site.tasks / "v1")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    shutil.copytree(site.tasks / "v1", tmp_path / "new")
    edit_json(tmp_path / "new" / "adapter_config.json", scaling=0.25)
    (site.tasks / "v1").rename(tmp_path / "old")
    switch(tmp_path / "old")
    first = site.digest()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        switch(tmp_path / "new")
        with pytest.raises(VariantError, match="No space left"):
            site.digest()
        switch(tmp_path / "old")
        assert site.digest() == first
    switch(tmp_path / "new")
    assert site.digest() != first


def test_a_full_disk_changes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first, names = site.digest(), site.names()
    before, records = site.saved(), site.catalogue.records.model_dump()
    edit_json(site.tasks / "v1" / "adapter_config.json", scaling=0.25)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    async def renew() -> None:
        await site.current("v1")

    changes: list[Callable[[], Awaitable[None] | object]] = [
        lambda: asyncio.run(renew()),
        lambda: site.catalogue.register("nice", "v1"),
        lambda: site.catalogue.unregister("v1"),
        lambda: site.catalogue.pin("v1", True),
        lambda: site.catalogue.remember_active("v1"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for change in changes:
            with pytest.raises((OSError, VariantError), match="No space left"):
                change()
    assert (site.saved(), site.catalogue.records.model_dump(), site.names()) == (before, records, names)
    assert [path.name for path in site.state.glob(".*")] == []
    assert first in site.thetas()
    assert site.digest() != first
