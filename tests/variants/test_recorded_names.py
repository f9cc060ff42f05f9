"""Which names `--pin` and `--preload` may have: those that a server with the same state folder would serve."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.server.catalogue_site import Site
from support.tiny_models import Pair, edit_json

from converters.errors import PeanutError
from peanut_serve.cli.finding import find_adapters, usable_names
from peanut_serve.errors import VariantError
from peanut_serve.settings.serving import Mode
from peanut_serve.variants.roots import AdapterRoots


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Site:
    return Site(pair, tmp_path)


def known(site: Site, mode: Mode = "merged", base: str | None = None) -> set[str]:
    roots = AdapterRoots([site.tasks, site.more])
    return usable_names(find_adapters(roots), mode, roots, site.state, base or str(site.pair.base))


def served(site: Site, name: str) -> bool:
    """Whether a server that starts now answers requests for a name."""
    site.start()
    try:
        return bool(site.digest(name))
    except PeanutError:
        return False


def broken(site: Site) -> None:
    """An upload that cannot be read replaces the files."""
    site.digest()
    site.break_it()
    with pytest.raises(VariantError):
        site.digest()


def rolled_back(site: Site, hold: bool = False) -> None:
    broken(site)
    asyncio.run(site.catalogue.rollback("v1", None, site.preparing, hold))


def rolled_back_and_broken_again(site: Site, hold: bool = False) -> None:
    rolled_back(site, hold)
    (site.tasks / "v1" / "adapter_model.safetensors").write_bytes(b"less than half")


CASES: dict[str, tuple[Callable[[Site], None], bool]] = {
    "as it was": (lambda site: None, True),
    "broken": (broken, False),
    "rolled back": (rolled_back, True),
    "rolled back, and other files": (rolled_back_and_broken_again, False),
    "held": (lambda site: rolled_back(site, hold=True), True),
    "held, and other files": (lambda site: rolled_back_and_broken_again(site, hold=True), True),
    "gone": (lambda site: shutil.rmtree(site.tasks / "v1"), False),
}


@pytest.mark.parametrize("name", ["v1", "prod"])
@pytest.mark.parametrize("case", CASES)
def test_names_are_known_if_a_server_serves_them(case: str, name: str, site: Site) -> None:
    prepare, is_served = CASES[case]
    if name == "prod":
        site.catalogue.register("prod", "v1")
        site.digest("prod")
        is_served = is_served and "back" not in case and "held" not in case  # v1 alone was rolled back
    prepare(site)
    assert (name in known(site), served(site, name)) == (is_served, is_served)


def test_the_records_of_another_base_do_not_count(site: Site) -> None:
    """A server sets them aside, and uses them again with that base."""
    site.catalogue.register("prod", "v1")
    site.catalogue.unregister("v1")
    assert known(site) == {"prod"}
    own = (site.state / "variants.json").read_text()
    edit_json(site.state / "variants.json", base="another")
    assert known(site) == {"v1"}
    assert known(site, base="org/base") == {"prod", "v1"}  # nobody knows yet which base it is
    (site.state / "variants-0123456789abcdef.json").write_text(own)
    assert known(site) == {"prod"}


def test_records_that_cannot_be_read(site: Site) -> None:
    for text in ("no", '{"schema_version": 99, "base": "any"}'):
        (site.state / "variants.json").write_text(text)
        assert known(site) == {"v1"}
