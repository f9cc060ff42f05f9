"""The server in LoRA mode, with an engine without vLLM: names, versions and adapters on disk have one truth."""

import asyncio
import json
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.errors import QueueFullError, UnknownVariantError, VariantError
from peanut_serve.lora.cache import Lease, LoraCache
from peanut_serve.lora.folders import LoraFolder
from peanut_serve.swapping import metrics
from peanut_serve.variants.version import VariantKind
from peanut_serve.web.audit import AuditedControl, AuditLog
from peanut_serve.web.operator import VariantControl


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return make_weights(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    """Each test changes its own copy of the variants."""
    shutil.copytree(weights.tasks, tmp_path / "tasks", dirs_exist_ok=True)
    run = rig_runner(weights, tmp_path, monkeypatch)
    return lambda test, **options: run(test, **{"mode": "lora", "roots": (str(tmp_path / "tasks"),), **options})


async def folder_of(rig: Rig, name: str) -> LoraFolder:
    """The adapter that a request for a name is given."""
    async with rig.server.serving(name, lambda: None) as admitted:
        assert admitted.lora is not None
        assert admitted.is_running()
        assert admitted.version.kind is VariantKind.LORA
        assert rig.engine.loras[admitted.lora.number] == admitted.lora.path
        return admitted.lora


def test_a_rollback_serves_the_weights_that_it_names(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        first = await folder_of(rig, "v1")
        old = rig.server.facts("v1").digest
        shutil.rmtree(tmp_path / "tasks" / "v1")
        shutil.copytree(tmp_path / "tasks" / "v2", tmp_path / "tasks" / "v1")
        second = await folder_of(rig, "v1")
        assert second == await folder_of(rig, "v2") != first
        await rig.server.rollback("v1", None)
        assert (await folder_of(rig, "v1"), rig.server.facts("v1").digest) == (first, old)

    run_rig(test)


def test_the_audit_log_has_the_versions_before_and_after(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        control = AuditedControl(VariantControl(rig.server), AuditLog(tmp_path / "audit.jsonl"))
        old = (await control.reload("v1")).digest
        shutil.copytree(tmp_path / "tasks" / "v2", tmp_path / "tasks" / "v1", dirs_exist_ok=True)
        new = (await control.reload("v1")).digest
        await control.rollback("v1", None, True)
        with pytest.raises(VariantError):
            await control.reload("broken")
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        digests = [(one["old"], one["new"]) for one in lines]
        assert digests == [(None, old), (old, new), (new, old), (None, None)]
        assert old != new
        assert [one["outcome"] for one in lines] == ["done", "done", "done", "refused"]

    run_rig(test)


def test_an_alias_and_a_name_that_was_removed(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await rig.server.register("alias", "v1")
        assert await folder_of(rig, "alias") == await folder_of(rig, "v1")
        await rig.server.unregister("v2", drain=False)
        with pytest.raises(UnknownVariantError):
            await folder_of(rig, "v2")
        assert set(await rig.server.names()) == {"base", "alias", "v1", "v3", "broken"}

    run_rig(test)


def test_what_is_not_lora_is_refused(run_rig: RunRig, weights: Weights, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        shutil.copytree(weights.tasks.parent / "merged-v1", tmp_path / "tasks" / "whole")
        with pytest.raises(VariantError, match="whole is a merged model, which --mode lora does not serve"):
            await folder_of(rig, "whole")
        rig.engine.fail("load_lora")
        with pytest.raises(VariantError, match="vLLM cannot load the adapter v1: load_lora failed"):
            await folder_of(rig, "v1")
        await folder_of(rig, "v1")

    run_rig(test)


def test_an_engine_that_died_gets_its_adapters_again(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        await folder_of(rig, "v1")
        rig.engine.die()
        await until(lambda: rig.server.swapper.restarts == 1 and rig.server.is_ready)
        assert rig.engine.loras == {}
        await folder_of(rig, "v1")

    run_rig(test)


def test_adapters_are_leased_only_while_they_are_used(run_rig: RunRig, tmp_path: Path) -> None:
    """So the size of the cache is a bound, and no file descriptor per adapter is held."""

    async def test(rig: Rig) -> None:
        async with rig.server.serving("v1", lambda: None) as admitted:
            for name in ("v2", "v3"):
                await folder_of(rig, name)
            assert admitted.lora is not None
            assert admitted.lora.path.is_dir()  # it is in use, although there is room for none
        await folder_of(rig, "v2")
        assert len(list((tmp_path / "evaluated").iterdir())) <= 2
        assert rig.server._lora._leases == {}

    run_rig(test, cache_bytes=1)


def test_many_cold_adapters_at_once(run_rig: RunRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few wait for their evaluation, the others get a 429; requests for one version share an evaluation."""

    may_end, get = threading.Event(), LoraCache.get

    def slow(*arguments: Any) -> Lease:
        assert may_end.wait(30)
        return get(*arguments)

    monkeypatch.setattr(LoraCache, "get", slow)

    async def test(rig: Rig) -> None:
        async def ask(name: str) -> LoraFolder | QueueFullError:
            try:
                return await folder_of(rig, name)
            except QueueFullError as error:
                may_end.set()
                return error

        found = await asyncio.gather(*(ask(name) for name in ["v1", "v2", "v3"] * 5))
        refused = [one for one in found if isinstance(one, QueueFullError)]
        assert 0 < len(refused) <= 5  # all for the same version
        assert refused[0].retry_after > 0
        assert len({one for one in found if isinstance(one, LoraFolder)}) >= 2
        assert rig.server.facts("v3").error is None

    run_rig(test, max_evaluations=2)


def test_a_cancelled_request_leaves_no_lease(run_rig: RunRig) -> None:
    async def test(rig: Rig) -> None:
        version = (await rig.server.catalogue.current("v1", prepare_nothing))[1]
        with ExitStack() as holds:
            preparing = asyncio.create_task(rig.server._lora.prepare("v1", version, holds))
            await asyncio.sleep(0.01)
            preparing.cancel()
            await asyncio.wait([preparing])
        await folder_of(rig, "v1")
        assert rig.server._lora._leases == {}

    run_rig(test)


def test_the_series_of_a_name_end_with_it(run_rig: RunRig, tmp_path: Path) -> None:
    """Whether it is removed by an operator, or its files are."""

    def series() -> set[str]:
        samples = [sample for family in REGISTRY.collect() for sample in family.samples]
        return {sample.labels["variant"] for sample in samples if "variant" in sample.labels}

    async def test(rig: Rig) -> None:
        await rig.server.names()
        for name in ("v1", "v2", "v3"):
            await folder_of(rig, name)
            metrics.REQUESTS.labels(name, "200").inc()
        assert {"v1", "v2", "v3"} <= series()
        await rig.server.unregister("v1", drain=False)
        shutil.rmtree(tmp_path / "tasks" / "v2")
        rig.server.catalogue._listing.renew()
        await rig.server.names()
        assert {"v1", "v2", "v3"} & series() == {"v3"}

    run_rig(test)


async def prepare_nothing(version: object) -> None: ...
