"""Names and their versions: a name moves to another version atomically, and can be rolled back."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.server.catalogue_site import Site
from support.tiny_models import Pair, edit_json, edit_weights, save_adapter, tiny_llama

from converters import merge
from peanut_serve.errors import UnknownVariantError, VariantError, VariantNameError
from peanut_serve.variants import opening
from peanut_serve.variants.host_weights import HostMemoryError
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.version import VariantKind, Version


@pytest.fixture
def site(pair: Pair, tmp_path: Path) -> Site:
    return Site(pair, tmp_path)


def roll_back(site: Site, digest: str | None = None, hold: bool = False) -> None:
    asyncio.run(site.catalogue.rollback("v1", digest, site.preparing, hold))


def test_names(site: Site) -> None:
    shutil.copy(site.tasks / "v1" / "adapter_model.safetensors", site.tasks / "file.safetensors")
    (site.tasks / "empty").mkdir()
    (site.tasks / ".hidden.safetensors").touch()
    assert site.names() == ["base", "alias", "file", "org/allowed", "v1"]
    assert site.digest("base") == site.digest("alias") != site.digest("v1")
    known = "base, alias, file, org/allowed"
    with pytest.raises(UnknownVariantError, match=f"there is no variant none; the available variants are {known}"):
        site.catalogue.find("none")


def test_only_the_name_in_two_folders_is_rejected(site: Site) -> None:
    shutil.copytree(site.tasks / "v1", site.more / "v1")
    shutil.copytree(site.tasks / "v1", site.more / "v2")
    for name in site.names():
        assert site.catalogue.find(name).name == name  # every name can be listed
    with pytest.raises(VariantError, match="there are two adapters v1: .*; rename one of them"):
        site.digest("v1")
    assert site.digest("v2")
    shutil.rmtree(site.more)
    assert site.digest("v1") == site.prepared[0]
    assert "v2" not in site.names()
    assert "v2" in asyncio.run(site.catalogue.names(missing=True))  # operators see it


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../base", "v1/", "v1/../v1", "/etc", "tasks/v1", "v1\0", "v1\n", "é", "org/other", "a" * 129],
)
def test_a_name_is_not_a_path(site: Site, name: str) -> None:
    before = site.names()
    with pytest.raises(UnknownVariantError):
        site.digest(name)
    with pytest.raises((UnknownVariantError, VariantNameError, VariantError)):
        site.catalogue.register(name, name)
    assert site.names() == before


def test_a_version_is_its_content(site: Site) -> None:
    first = site.digest()
    shutil.copytree(site.tasks / "v1", site.tasks / "twin")
    os.utime(site.tasks / "v1" / "adapter_config.json", (1, 1))
    assert site.digest() == site.digest("twin") == first
    assert site.prepared == [first] * 3  # once each time the files were read
    assert site.catalogue.name_of(first) in ("v1", "twin")
    assert site.catalogue.find("v1").record.previous == []
    site.change()
    assert site.digest() != first
    assert site.catalogue.find("v1").record.previous == [first]
    assert site.digest("twin") == first


def test_one_theta_under_two_names_at_once(site: Site) -> None:
    for i in range(6):
        shutil.copytree(site.tasks / "v1", site.tasks / f"twin{i}")

    async def ask() -> set[str]:
        found = await asyncio.gather(*(site.current(f"twin{i}") for i in range(6)))
        return {version.digest for version in found}

    assert asyncio.run(ask()) == site.thetas()


def test_a_name_moves_when_its_version_is_prepared(site: Site) -> None:
    first = site.digest()
    site.change()

    def refuse(version: Version) -> None:
        assert site.catalogue.find("v1").record.digest == site.saved()["v1"]["digest"] == first != version.digest
        raise HostMemoryError("no memory")

    site.prepare = refuse
    with pytest.raises(HostMemoryError, match="no memory"):  # not `VariantError`: it may succeed later
        site.digest()
    assert site.catalogue.find("v1").record.digest == site.saved()["v1"]["digest"] == first
    site.prepare = lambda version: None
    assert site.digest() == site.saved()["v1"]["digest"] != first


def test_broken_theta_and_back(site: Site) -> None:
    first = site.digest()
    site.break_it()
    for _ in range(2):
        with pytest.raises(VariantError, match="the variant v1 cannot be served: .*not a whole safetensors file"):
            site.digest()
    assert "not a whole" in str(site.catalogue.find("v1").error)
    assert site.catalogue.find("v1").record.digest == first
    roll_back(site)
    assert (site.digest(), site.catalogue.find("v1").error) == (first, None)
    site.start()
    assert site.digest() == first  # θ is only in the state folder
    site.break_it()
    with pytest.raises(VariantError):
        site.digest()
    shutil.copy(site.pair.adapter / "adapter_model.safetensors", site.tasks / "v1")
    assert site.digest() == first
    assert site.catalogue.find("v1").error is None


def test_back_to_an_earlier_version_until_the_files_change(site: Site) -> None:
    first = site.digest()
    site.change()
    second = site.digest()
    site.change()  # this version is never requested
    roll_back(site)
    assert site.digest() == first
    assert site.catalogue.find("v1").record.previous == [second]
    site.start()
    assert site.digest() == first
    roll_back(site, second[:8])
    assert site.digest() == second
    with pytest.raises(VariantError, match=f"no such earlier version; its earlier versions are {first[:12]}"):
        roll_back(site, "f00")
    site.change()
    assert site.digest() not in (first, second)
    third = asyncio.run(site.catalogue.reload("v1", site.preparing)).record
    assert (third.digest, third.previous) == (site.digest(), [second, first])


def test_a_version_that_is_held_until_a_reload(site: Site) -> None:
    first = site.digest()
    site.change()
    second = site.digest()
    roll_back(site, first, hold=True)
    site.change()
    assert site.digest() == first
    assert site.saved()["v1"]["held"]
    site.start()
    assert site.digest() == first
    site.catalogue.pin("v1", True)
    site.change()
    assert site.digest() == first
    weights = site.state / "theta" / first / "adapter_model.safetensors"
    weights.write_bytes(b"")
    site.start()
    for _ in range(2):  # never the version of the files instead
        with pytest.raises(VariantError, match=f"a rollback or release holds its version {first[:12]}, which"):
            site.digest()
    roll_back(site, second)
    assert (site.digest(), site.saved()["v1"]["held"]) == (second, False)
    roll_back(site, second, hold=True)  # the version that it has already
    assert asyncio.run(site.catalogue.reload("v1", site.preparing)).record.digest not in (first, second)
    assert not site.saved()["v1"]["held"]


def test_back_to_a_version_that_the_state_folder_has(site: Site, tmp_path: Path) -> None:
    """As another server put it there, that had this version when this one had not."""
    other = Site(site.pair, tmp_path / "other")
    first, theta = other.digest(), other.state / "theta"
    site.change()
    second = site.digest()
    for digest in (first, first[:20], f"../theta/{second}", "..", "/"):
        with pytest.raises(VariantError, match="no such earlier version"):
            roll_back(site, digest)
    shutil.copytree(theta / first, site.state / "theta" / first)
    with pytest.raises(VariantError, match="no such earlier version"):
        roll_back(site, first[:20])
    roll_back(site, first)
    assert (site.digest(), site.catalogue.find("v1").record.previous) == (first, [second])
    site.start()
    assert site.digest() == first


def test_reload_undoes_a_rollback(site: Site) -> None:
    first = site.digest()
    site.change()
    second = site.digest()
    roll_back(site)
    assert site.digest() == first
    assert asyncio.run(site.catalogue.reload("v1", site.preparing)).record.digest == site.digest() == second


def test_register_and_unregister(site: Site) -> None:
    site.catalogue.register("nice", "v1")
    assert site.digest("nice") == site.digest("v1")
    for name, reason in (
        ("nice", "already"),
        ("base", "already"),
        ("a b", "not a valid name"),
        ("../x", "not a valid name"),
    ):
        with pytest.raises(VariantNameError, match=reason):
            site.catalogue.register(name, "v1")
    shutil.copytree(site.tasks / "v1", site.tasks / "v2")
    for source in ("v1", "v2"):  # the roots have this name
        with pytest.raises(VariantNameError, match="already"):
            site.catalogue.register("v2", source)
    with pytest.raises(VariantError, match="none is neither in the folders of variants nor an allowed Hub id"):
        site.catalogue.register("new", "none")
    site.catalogue.unregister("v1")
    site.start()
    assert "v1" not in site.names()
    with pytest.raises(UnknownVariantError):
        site.digest("v1")
    site.catalogue.unregister("nice")
    site.start()
    assert site.names() == ["base", "alias", "org/allowed", "v2"]
    assert site.thetas() == set()
    site.catalogue.register("v1", "v1")
    assert site.digest() == site.prepared[0]
    for change in (site.catalogue.unregister, lambda name: site.catalogue.pin(name, True)):
        with pytest.raises(VariantNameError, match="base is the base model, which cannot be changed"):
            change("base")


def test_a_name_removed_while_it_is_prepared_does_not_come_back(site: Site) -> None:
    site.prepare = lambda version: site.catalogue.unregister("v1")
    site.digest()  # an earlier request is served
    assert "v1" not in site.names()
    assert site.saved()["v1"]["hidden"]
    site.start()
    assert "v1" not in site.names()


def test_merged_models(site: Site) -> None:
    merge(site.pair.base, site.pair.adapter, site.tasks / "merged")
    version = asyncio.run(site.current("merged"))
    assert (version.kind, len(version.specs)) == (VariantKind.CHECKPOINT, 4)
    assert version.digest == asyncio.run(site.catalogue.reload("merged", site.preparing)).record.digest
    assert site.thetas() == set()  # models are not copied
    weights = site.tasks / "merged" / "model.safetensors"
    edit_weights(weights, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1})
    assert site.digest("merged") != version.digest
    with pytest.raises(VariantError, match=f"version {version.digest[:12]} of merged is no longer available"):
        asyncio.run(site.catalogue.rollback("merged", None, site.preparing))
    edit_json(site.tasks / "merged" / "config.json", rms_norm_eps=0.1)
    with pytest.raises(VariantError, match=r"rms_norm_eps is 0.1 in its config, but 1e-06 in the running model's"):
        site.digest("merged")
    shutil.copy(site.pair.base / "config.json", site.tasks / "merged")
    for change, reason in (
        (lambda tensors: {**tensors, "other.weight": tensors["lm_head.weight"] + 1}, "does not load"),
        (lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"][:9]}, r"has shape \(9, 32\)"),
        (lambda tensors: tensors.pop("lm_head.weight"), "does not have the base's tensor lm_head.weight"),
    ):
        edit_weights(weights, change)
        with pytest.raises(VariantError, match=reason):
            site.digest("merged")


def test_a_tensor_the_model_does_not_load(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """vLLM would silently ignore the head of a model with a tied embedding."""
    site = Site(make_pair(tiny_llama(tie_word_embeddings=True), modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(VariantError, match="changes lm_head.weight, which the running model does not load"):
        site.digest()
    assert (site.thetas(), site.prepared) == (set(), [])


def test_an_adapter_that_is_exactly_lora_is_served_as_lora(site: Site) -> None:
    save_adapter(tiny_llama(), site.tasks / "wide", r=16)
    save_adapter(tiny_llama(), site.tasks / "head", modules_to_save=["lm_head"])
    merged = site.digest("v1")
    site.lora = LoraLimits(8, frozenset({"q_proj", "v_proj"}))
    site.start()
    found = {name: asyncio.run(site.current(name)) for name in ("v1", "wide", "head")}
    assert {name: version.kind for name, version in found.items()} == {
        "v1": VariantKind.LORA, "wide": VariantKind.ADAPTER, "head": VariantKind.ADAPTER
    }  # fmt: skip
    assert found["v1"].digest != merged


def test_an_adapter_is_opened_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version is opened from its copy, and evaluated from where the copy is kept."""
    opened: list[Path] = []
    load = opening.load_adapter
    monkeypatch.setattr(opening, "load_adapter", lambda source: (opened.append(source), load(source))[1])
    version = asyncio.run(site.current("v1"))
    assert len(opened) == 1
    assert not opened[0].exists()
    shutil.rmtree(site.tasks / "v1")
    version.evaluate().close()
    assert len(opened) == 1
