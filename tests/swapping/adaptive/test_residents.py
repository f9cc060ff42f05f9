"""One variant has the engine's weights, all others share them as complements: no answer is ever another's."""

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.adaptive.effective import who
from support.server.rig import Rig, RunRig, make_weights, rig_runner, until
from support.server.weights import Weights

from peanut_serve.errors import PeanutError, UnknownVariantError
from peanut_serve.swapping import history
from peanut_serve.swapping.adaptive import choosing
from peanut_serve.swapping.adaptive.gathering import Gathering
from peanut_serve.web.operator import VariantControl

NAMES = ("base", "v1", "v2", "v3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    found = make_weights(tmp_path_factory.mktemp("residents"))
    found.expected["whole"] = found.expected["v2"]
    return found


@pytest.fixture
def run_rig(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRig:
    """Each test changes its own copy of the variants; `whole` is a merged folder, which cannot be LoRA."""
    shutil.copytree(weights.tasks, tmp_path / "tasks", dirs_exist_ok=True)
    shutil.copytree(weights.tasks.parent / "merged-v2", tmp_path / "tasks" / "whole")
    monkeypatch.setattr(choosing, "_LOOK_SECONDS", 0.01)
    run = rig_runner(weights, tmp_path, monkeypatch)
    fixed = {"mode": "auto", "roots": (str(tmp_path / "tasks"),), "resident": "v1", "max_wait": 5.0}
    return lambda test, **options: run(test, **{**fixed, **options})


@dataclass
class Clients:
    """Who asks, and how they were answered."""

    rig: Rig
    weights: Weights
    paths: Counter[tuple[str, str]] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    async def ask(self, name: str) -> str:
        """One request, answered by the right weights from its admission to its end; how they were computed."""
        task, engine = asyncio.current_task(), self.rig.engine
        assert task is not None
        async with self.rig.server.serving(name, task.cancel) as admitted:
            assert name in who(engine, admitted.lora, self.weights), (name, admitted.path)
            await engine.generate(f"{name} {admitted.path}")
            assert name in who(engine, admitted.lora, self.weights), (name, admitted.path)
            self.paths[name, admitted.path] += 1
            return admitted.path

    async def ask_for_ever(self, names: Iterable[str], seed: int) -> None:
        dice, choices = random.Random(seed), list(names)
        while True:
            try:
                await self.ask(dice.choice(choices))
            except PeanutError as error:
                self.failed[type(error).__name__] += 1
            except Exception as error:  # the engine died under the request
                self.failed[str(error)] += 1
                assert "died" in str(error), error
            await asyncio.sleep(dice.random() / 500)

    async def become(self, name: str | None) -> None:
        """Make a variant the resident, and wait until it is."""
        server = self.rig.server
        if name is None:
            server.residents.want(None, "saves")
            server.driver.wake()
        else:
            await server.chooser._become(name, "fixed")
        wanted = server.residents.wanted
        digest = server.catalogue.base.digest if wanted is None else wanted.merged.digest
        await until(lambda: server.gate.weights == digest and server.driver.state == "serving")


def test_the_resident_is_merged_and_all_others_are_complements(run_rig: RunRig, weights: Weights) -> None:
    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        await until(lambda: rig.server.residents.in_engine is not None)
        swaps = rig.swaps
        found = {name: await clients.ask(name) for name in NAMES}
        assert found == {"base": "complement", "v1": "merged", "v2": "complement", "v3": "complement"}
        assert rig.swaps == swaps == 1  # nobody waited for one
        assert await clients.ask("whole") == "merged"
        assert rig.engine.loras == {}
        found = {name: await clients.ask(name) for name in NAMES}  # it came back with the turn
        assert found == {"base": "complement", "v1": "merged", "v2": "complement", "v3": "complement"}
        assert rig.swaps == 3
        record = rig.server.driver.history.latest()
        assert [(one.before, one.target) for one in record] == [("whole", "v1"), ("v1", "whole"), ("base", "v1")]
        assert record[-1].cause == "fixed"

    run_rig(test)


def test_without_a_resident_nothing_changes(run_rig: RunRig, weights: Weights) -> None:
    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        found = {name: await clients.ask(name) for name in NAMES}
        assert found == {"base": "base", "v1": "lora", "v2": "lora", "v3": "lora"}
        assert rig.swaps == 0
        assert rig.server._choosing is None

    run_rig(test, resident=None)


def test_mixed_traffic_over_changes_of_the_resident(run_rig: RunRig, weights: Weights) -> None:
    """No request is answered by a complement of another resident, whenever it came."""

    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        rig.server._choosing.cancel()
        tasks = [asyncio.create_task(clients.ask_for_ever([*NAMES, "whole"], seed)) for seed in range(16)]
        for name in ("v1", "v2", None, "v3", "v1", None, "v2", "v1"):
            await clients.become(name)
            before = clients.paths.total()
            await until(lambda before=before: clients.paths.total() > before + 40 or any(t.done() for t in tasks))
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [one for one in ended if not isinstance(one, asyncio.CancelledError)] == []
        assert clients.failed == {}
        assert {path for _, path in clients.paths} == {"base", "lora", "merged", "complement"}
        assert all(clients.paths[name, "complement"] and clients.paths[name, "merged"] for name in NAMES[1:])

    run_rig(test)


@pytest.mark.parametrize("call", ["apply", "bind_adapters", "invalidate", "ask_canary"])
@pytest.mark.parametrize("how", ["raise", "die"])
def test_a_change_that_fails(run_rig: RunRig, weights: Weights, call: str, how: str) -> None:
    """The weights of before are back, or the base's after a restart, and everybody is answered by them."""

    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        rig.server._choosing.cancel()
        await clients.become("v1")
        rig.engine.fail(call, how)
        tasks = [asyncio.create_task(clients.ask(name)) for name in NAMES * 5]
        await rig.server.chooser._become("v2", "fixed")
        await until(lambda: any(one.error for one in rig.server.driver.history.latest()))
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: rig.server.driver.state == "serving")
        expected = "base" if how == "die" else "complement"
        assert await clients.ask("base") == expected
        assert await clients.ask("v1") == ("lora" if how == "die" else "merged")
        assert await clients.ask("v2") == ("lora" if how == "die" else "complement")
        assert rig.server.driver.change_failure(rig.server.residents.wanted.merged.digest) is not None
        assert rig.waiting == 0

    run_rig(test)


def test_a_change_to_the_base_that_fails_refuses_nobody(
    run_rig: RunRig, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_FIRST_RETRY", 60.0)

    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        rig.server._choosing.cancel()
        await clients.become("v1")
        rig.engine.fail("apply")
        tasks = [asyncio.create_task(clients.ask(name)) for name in NAMES * 5]
        rig.server.residents.want(None, "gone")
        rig.server.driver.wake()
        await until(lambda: any(one.error for one in rig.server.driver.history.latest()))
        await asyncio.gather(*tasks)
        assert await clients.ask("v2") == "complement"
        assert rig.swaps == 3  # to v1, the failed one, and back

    run_rig(test)


def test_a_variant_without_a_complement_brings_back_the_base(run_rig: RunRig, weights: Weights) -> None:
    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        await until(lambda: rig.server.residents.in_engine is not None)
        assert await clients.ask("v2") == "complement"
        rig.server.residents._max_rank = 7  # that of each is 4
        assert await clients.ask("v2") == "lora"
        assert rig.server.driver.history.latest()[0].cause == "unfit"
        assert rig.server.residents.why == "unfit"
        for _ in range(5):
            await asyncio.sleep(0.02)
            assert await clients.ask("v2") == "lora"
        assert rig.server.residents.wanted is None  # while v2 is asked for

    run_rig(test)


def test_why_a_pair_does_not_fit(run_rig: RunRig, weights: Weights) -> None:
    async def test(rig: Rig) -> None:
        await until(lambda: rig.server.residents.in_engine is not None)
        resident = rig.server.residents.in_engine
        version = await rig.server.prepare("v2")
        assert rig.server.residents.refusal(version, resident) is None
        rig.server.residents._max_rank = 7
        assert rig.server.residents.refusal(version, resident) == (
            "its rank is 4 and that of v1 4, together 8, but vLLM runs with --max-lora-rank 7"
        )
        assert rig.server.residents.refusal(resident.version, resident) is None

    run_rig(test)


def test_the_resident_follows_its_name(run_rig: RunRig, weights: Weights, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        await until(lambda: rig.server.residents.in_engine is not None)
        shutil.rmtree(tmp_path / "tasks" / "v1")
        shutil.copytree(tmp_path / "tasks" / "v3", tmp_path / "tasks" / "v1")
        old, task = rig.server.gate.weights, asyncio.current_task()
        async with rig.server.serving("v1", task.cancel) as admitted:  # a new version, until it is the resident
            assert "v3" in who(rig.engine, admitted.lora, weights)
        await until(lambda: rig.server.gate.weights != old)
        assert await clients.ask("v3") == "merged"  # the same θ
        assert await clients.ask("v2") == "complement"
        await rig.server.unregister("v1", drain=True)
        await until(lambda: rig.server.residents.wanted is None)
        assert rig.server.residents.why == "gone"
        assert await clients.ask("v2") == "lora"
        assert rig.server.residents._held == {}

    run_rig(test)


def test_others_are_gathered_beside_the_resident(run_rig: RunRig, weights: Weights) -> None:
    async def test(rig: Rig) -> None:
        clients, gate = Clients(rig, weights), rig.server.gate
        await until(lambda: rig.server.residents.in_engine is not None)
        for name in NAMES:
            await clients.ask(name)  # a cold one has waited for its evaluation
        rig.engine.go.clear()
        own = asyncio.create_task(clients.ask("v1"))
        await until(lambda: len(gate.running) == 1)
        others = [asyncio.create_task(clients.ask(name)) for name in ("v2", "base", "v3")]
        await until(lambda: rig.waiting == 3)
        more = asyncio.create_task(clients.ask("v1"))
        await until(lambda: len(gate.running) == 2)  # the resident's pass
        assert rig.waiting == 3
        rig.engine.go.set()
        await asyncio.gather(own, more)
        await asyncio.gather(*others)  # at once: nobody of the resident runs any more
        rig.engine.go.clear()
        start = asyncio.get_running_loop().time()
        tasks = [asyncio.create_task(clients.ask(name)) for name in ("v1", "v2", "v3")]
        await until(lambda: len(gate.running) == 3)
        waited = asyncio.get_running_loop().time() - start
        assert waited >= 1.0  # a sixteenth of the setting, as there is room
        rig.engine.go.set()
        await asyncio.gather(*tasks)

    run_rig(test, gather=16000)


def test_when_a_group_is_due() -> None:
    gathering = Gathering(8.0, 4)
    assert gathering.due([3.0, 2.0], residents=4, running=4) == 10.0
    assert gathering.due([3.0, 2.0], residents=3, running=3) == 2.5
    assert gathering.due([3.0, 2.0], residents=0, running=4) == float("-inf")  # nobody has anything from waiting
    assert Gathering(0.0, 4).due([2.0], residents=4, running=4) == float("-inf")


def test_traffic_decides(run_rig: RunRig, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peanut_serve.swapping.adaptive.policy._SMOOTHING", 0.05)
    monkeypatch.setattr("peanut_serve.swapping.adaptive.policy._FACTOR", 0.02)

    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        for name in ("v2", "v3"):
            busy = [asyncio.create_task(clients.ask_for_ever([name], seed)) for seed in range(4)]
            await until(lambda name=name: (one := rig.server.residents.in_engine) is not None and one.name == name)
            assert rig.server.driver.history.latest()[0].cause == "saves"
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
        status = VariantControl(rig.server).engine()
        assert (status.active, status.resident, status.resident_why) == ("v3", "v3", "saves")
        await until(lambda: VariantControl(rig.server).engine().saved_seconds >= 0)
        busy = [asyncio.create_task(clients.ask_for_ever(["base"], seed)) for seed in range(4)]
        await until(lambda: rig.server.residents.in_engine is None)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)

    run_rig(test, resident="auto")


def test_what_is_told_of_a_resident(run_rig: RunRig, weights: Weights) -> None:
    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        await until(lambda: rig.server.residents.in_engine is not None)
        await clients.ask("v2")
        await rig.server.names()
        residency = rig.server.residency()
        assert (residency.resident, residency.loaded, residency.limit) == (("v1",), ("v2",), 3)
        status = VariantControl(rig.server).engine()
        assert (status.active, status.resident, status.resident_why) == ("v1", "v1", "fixed")
        assert status.complements == ["v2"]
        states = {name: VariantControl(rig.server).variant(name).state.value for name in NAMES}
        assert states == {"base": "ready", "v1": "active", "v2": "ready", "v3": "registered"}
        rig.server.residents.want(None, "gone")
        rig.server._choosing.cancel()
        rig.server.driver.wake()
        await until(lambda: rig.server.residents.in_engine is None)
        assert rig.server.residency().loaded == ()  # the engine has forgotten them
        assert VariantControl(rig.server).engine().resident is None

    run_rig(test)


def test_a_resident_that_does_not_exist_or_cannot_be(run_rig: RunRig, weights: Weights) -> None:
    async def nothing(rig: Rig) -> None: ...

    async def test(rig: Rig) -> None:
        clients = Clients(rig, weights)
        await asyncio.sleep(0.1)
        assert rig.server.residents.wanted is None
        assert await clients.ask("v1") == "lora"

    with pytest.raises(UnknownVariantError):
        run_rig(nothing, resident="none")
    run_rig(test, resident="whole")  # it is swapped in when it is asked for


def test_a_resident_whose_weights_fail_is_given_up(run_rig: RunRig, weights: Weights) -> None:
    async def test(rig: Rig) -> None:
        rig.server._choosing.cancel()
        rig.engine.fail("apply")
        await rig.server.chooser._become("v2", "fixed")
        await until(lambda: any(one.error for one in rig.server.driver.history.latest()))
        await rig.server.chooser.look()
        assert rig.server.residents.wanted is None
        assert rig.server.chooser._barred.keys() == {"v2"}

    run_rig(test, resident="auto")
