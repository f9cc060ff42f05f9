"""A held version stays held, and a rollback goes to the version that is meant, or to none."""

import asyncio
from pathlib import Path

import pytest
from support.server.catalogue_site import Site
from support.tiny_models import Pair

from peanut_serve.errors import VariantError


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Site:
    return Site(pair, tmp_path)


def rollback(site: Site, digest: str | None = None, hold: bool = False) -> None:
    asyncio.run(site.catalogue.rollback("v1", digest, site.preparing, hold))


def reload(site: Site) -> None:
    asyncio.run(site.catalogue.reload("v1", site.preparing))


def test_a_failed_reload_does_not_end_the_hold(site: Site) -> None:
    first = site.digest()
    site.change()
    site.digest()
    rollback(site, hold=True)
    site.break_it()
    with pytest.raises(VariantError, match="cannot be served"):
        reload(site)
    assert site.catalogue.find("v1").record.held
    site.catalogue.register("other", "v1")  # saves all records
    assert site.saved()["v1"]["held"]
    assert site.digest() == first
    site.start()
    assert site.digest() == first


def test_a_reload_that_fails_later_does_not_end_the_hold(site: Site) -> None:
    first = site.digest()
    site.change()
    second = site.digest()
    rollback(site, hold=True)

    def refuse(version: object) -> None:
        raise VariantError("there is no room for it")

    site.prepare = refuse
    with pytest.raises(VariantError, match="there is no room for it"):
        reload(site)
    site.prepare = lambda version: None
    assert site.digest() == first
    reload(site)
    assert site.digest() == second
    assert not site.catalogue.find("v1").record.held


def test_a_short_digest_of_several_versions_is_refused(site: Site) -> None:
    site.digest()
    record = site.catalogue.find("v1").record
    twins = ["ab" * 20, "abc" + "d" * 37]
    record.previous = [*twins, "ef" * 20]
    with pytest.raises(
        VariantError, match="several versions of v1 may be meant: abababababab, abcddddddddd; give more"
    ):
        rollback(site, "ab")
    with pytest.raises(VariantError, match="version abcddddddddd of v1 is no longer available"):
        rollback(site, "abc")
    with pytest.raises(VariantError, match="no such earlier version; its earlier versions are abababababab, .*, ef"):
        rollback(site, "f")
