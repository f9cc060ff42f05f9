"""Releases of adapters that are served as LoRA: both versions at once, each as an adapter of its own."""

import asyncio
from pathlib import Path

import pytest
from support.server.releases import releases_of, says, write_canaries
from support.server.rig import Rig, RunRig

from peanut_serve.releases.schema import Weighing


async def served(rig: Rig, asked: str, session: str | None = None) -> tuple[str, str]:
    """The variant that answers, and the name of the adapter that the request is given."""
    name = rig.server.catalogue.answering(asked, session)
    async with rig.server.serving(name, lambda: None, asked) as admitted:
        assert (admitted.model, admitted.lora is not None) == (asked, True)
        assert rig.engine.loras[admitted.lora.number] == admitted.lora.path
        found = (admitted.lora.path / "adapter_model.safetensors").read_bytes()
        assert found == (rig.server.settings.state / f"{admitted.version.digest}.bytes").read_bytes()
        return admitted.name, next(one for one, digest in rig.digests.items() if digest == admitted.version.digest)


async def learn(rig: Rig) -> None:
    """The digest and the adapter of each variant, as it is served by its own name."""
    for name in ("v1", "v2", "v3"):
        async with rig.server.serving(name, lambda: None) as admitted:
            rig.digests[name] = admitted.version.digest
            file = rig.server.settings.state / f"{admitted.version.digest}.bytes"
            file.write_bytes((admitted.lora.path / "adapter_model.safetensors").read_bytes())
    assert len(set(rig.digests.values())) == 3


@pytest.mark.parametrize("mode", ["lora", "auto"])
def test_both_versions_are_adapters(run_rig: RunRig, tasks: Path, tmp_path: Path, mode: str) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        write_canaries(tasks / "v2", says(rig.expected["base"]))  # the engine that is no engine ignores adapters
        assert (await releases.stage("v1", "v2")).passed
        assert await served(rig, "v1") == ("v1", "v1")
        assert await served(rig, "v1@staged") == ("v1@staged", "v2")
        await releases.weigh("v1", Weighing(weight=50))
        sessions = [f"user-{number}" for number in range(60)]
        found = await asyncio.gather(*(served(rig, "v1", session) for session in sessions))
        assert set(found) == {("v1", "v1"), ("v1@staged", "v2")}
        assert rig.engine.applied == ([] if mode == "lora" else rig.engine.applied[:3])  # no swaps
        await releases.promote("v1", force=False)
        assert await served(rig, "v1") == ("v1", "v2")
        await releases.rollback("v1", None)
        assert await served(rig, "v1") == ("v1", "v1")

    run_rig(test, mode=mode)


def test_a_release_that_ends_while_a_request_is_prepared(run_rig: RunRig, tmp_path: Path) -> None:
    """The request was for the name, which still answers."""

    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        await releases.stage("v1", "v2")
        await releases.weigh("v1", Weighing(weight=100))
        name = rig.server.catalogue.answering("v1", None)
        assert name == "v1@staged"
        await releases.rollback("v1", None)
        async with rig.server.serving(name, lambda: None, "v1") as admitted:
            assert (admitted.name, admitted.version.digest) == ("v1", rig.digests["v1"])

    run_rig(test, mode="lora")
