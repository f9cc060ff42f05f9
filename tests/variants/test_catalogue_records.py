"""The records of a catalogue on disk, and how it handles damaged records and files."""

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.server.catalogue_site import Site
from support.tiny_models import Pair, edit_json, edit_weights

from converters.errors import OptionError
from peanut_serve.errors import UnknownVariantError, VariantError
from peanut_serve.variants.catalogue import Catalogue
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


def test_files_that_are_being_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Catalogue._open
    monkeypatch.setattr(Catalogue, "_open", lambda *args: (opened(*args), site.change())[0])
    with pytest.raises(VariantError, match="the files of v1 are being written"):
        site.digest()


def test_a_full_disk_changes_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first, names = site.digest(), site.catalogue.names()
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
    assert (site.saved(), site.catalogue.records.model_dump(), site.catalogue.names()) == (before, records, names)
    assert [path.name for path in site.state.glob(".*")] == []
    assert first in site.thetas()
    assert site.digest() != first
