"""Releases of a server: which version answers before, during and after, by what the engine computed with."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from support.server.call import Call
from support.server.releases import BrokenCall, releases_of, says, write_canaries
from support.server.rig import Rig, RunRig

from peanut_serve.errors import (
    PeanutError,
    ReleaseError,
    UnknownVariantError,
    VariantError,
    VariantInUseError,
    VariantNameError,
)
from peanut_serve.releases.schema import Weighing
from peanut_serve.variants.backup.exporting import export_state
from peanut_serve.variants.backup.importing import import_state
from peanut_serve.variants.version import Version


async def say(rig: Rig, model: str = "v1", kind: type[Call] = Call, **headers: str) -> tuple[str, str]:
    """The variant that answered, and whose weights it had: those that the digest in the headers stands for."""
    call = kind(rig, "/v1/completions", {"model": model}, **headers)
    status, text = await call.answer()
    assert status == 200, text
    assert text == identity_of(rig, call.header("x-peanut-digest"))
    return str(call.header("x-peanut-variant")), name_of(rig, text)


def identity_of(rig: Rig, digest: str | None) -> str:
    """What the engine answers with the weights of a version."""
    return {d: rig.expected[name] for name, d in rig.digests.items()}[str(digest)]


def name_of(rig: Rig, identity: str) -> str:
    return next(name for name, found in rig.expected.items() if found == identity)


async def learn(rig: Rig) -> None:
    """The digest of every variant, before any is replaced."""
    for name in ("base", "v1", "v2", "v3"):
        rig.digests[name] = (await rig.server.prepare(name)).digest


def replace(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def test_from_staging_to_promotion(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        staged = await releases.stage("v1", "v2")
        assert (staged.state, staged.weight, staged.passed) == ("staged", 0, None)
        assert (staged.digest, staged.replaces) == (rig.digests["v2"], rig.digests["v1"])
        assert await say(rig) == ("v1", "v1")
        assert await say(rig, "v1@staged") == ("v1@staged", "v2")
        assert await say(rig, "v1@current") == ("v1", "v1")
        assert "v1@staged" in await rig.server.names()
        await releases.weigh("v1", Weighing(weight=100))
        assert await say(rig) == ("v1@staged", "v2")
        assert await say(rig, "v1@current") == ("v1", "v1")
        promoted = await releases.promote("v1", force=False)
        assert (promoted.state, promoted.weight) == ("promoted", 0)
        assert await say(rig) == ("v1", "v2")
        assert "v1@staged" not in await rig.server.names()
        for gone in ("v1@staged", "v1@current"):
            assert (await Call(rig, "/v1/completions", {"model": gone}).answer())[0] == 404
        assert rig.server.facts("v1").previous == (rig.digests["v1"],)
        await releases.rollback("v1", "wrong units")
        assert await say(rig) == ("v1", "v1")
        replace(tasks / "v1", tasks / "v3")
        assert await say(rig) == ("v1", "v1")  # it holds until told otherwise
        await rig.server.reload("v1")
        assert await say(rig) == ("v1", "v3")
        actions = [(event.action, event.detail) for event in releases.release("v1").events]
        assert [action for action, _ in actions] == ["stage", "weight", "promote", "rollback"]
        assert actions[-1][1] == "wrong units"

    run_rig(test)


def test_a_version_from_the_files_of_the_name(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        with pytest.raises(VariantError, match="the files of v1 have the version .* that v1 has now; replace them"):
            await releases.stage("v1", None)
        await releases.hold("v1")
        replace(tasks / "v1", tasks / "v2")
        assert await say(rig) == ("v1", "v1")
        await releases.stage("v1", None)
        replace(tasks / "v1", tasks / "v3")  # what is staged was read, and is kept
        assert await say(rig) == ("v1", "v1")
        assert await say(rig, "v1@staged") == ("v1@staged", "v2")
        await releases.promote("v1", force=False)
        assert await say(rig) == ("v1", "v2")
        await releases.stage("v1", None)
        assert await say(rig, "v1@staged") == ("v1@staged", "v3")
        await releases.rollback("v1", None)
        assert await say(rig) == ("v1", "v2")

    run_rig(test)


def test_a_version_that_is_named_by_its_digest(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    """So that every engine of a fleet stages the same one, though the files may have changed in between."""

    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        with pytest.raises(VariantError, match=f"the files of v3 have version .*, expected {'f' * 12}"):
            await releases.stage("v1", "v3", "f" * 40)
        write_canaries(tasks / "v3", says(rig.expected["v3"]))
        staged = await releases.stage("v1", "v3", rig.digests["v2"])  # of which there is θ in the state folder
        assert (staged.digest, staged.passed) == (rig.digests["v2"], None), (
            "the canary set is that of another version"
        )
        assert await say(rig, "v1@staged") == ("v1@staged", "v2")
        await releases.rollback("v1", None)
        staged = await releases.stage("v1", "v3", rig.digests["v3"])
        assert (staged.digest, staged.passed) == (rig.digests["v3"], True)

    run_rig(test)


def test_a_failing_canary(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        write_canaries(tasks / "v2", says(rig.expected["v2"]), says(rig.expected["v1"]))
        staged = await releases.stage("v1", "v2")
        assert (staged.state, staged.passed) == ("staged", False)
        assert [bool(one.problems) for one in staged.canary] == [False, True]
        assert staged.canary[1].problems == [f"{rig.expected['v1'][:8]!r} is not in the answer"]
        assert rig.expected["v2"][:8] in staged.canary[1].answer
        for change in (releases.weigh("v1", Weighing(weight=10)), releases.promote("v1", force=False)):
            with pytest.raises(ReleaseError, match="has not passed its canary set .*is not in the answer"):
                await change
        assert await say(rig) == ("v1", "v1")
        assert await say(rig, "v1@staged") == ("v1@staged", "v2")
        await releases.weigh("v1", Weighing(weight=0))  # takes nothing from anybody
        assert (await releases.weigh("v1", Weighing(weight=100, force=True))).weight == 100
        assert await say(rig) == ("v1@staged", "v2")
        await releases.promote("v1", force=True)
        assert await say(rig) == ("v1", "v2")

    run_rig(test)


def test_a_passing_canary(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        write_canaries(tasks / "v2", says(rig.expected["v2"], not_contains=[rig.expected["v1"][:8]]))
        assert (await releases.stage("v1", "v2")).passed
        write_canaries(tasks / "v2", says("others"))  # it is the one that was read that counts
        assert (await releases.check("v1")).passed
        await releases.weigh("v1", Weighing(weight=50))
        await releases.promote("v1", force=False)
        write_canaries(tasks / "v3", says(rig.expected["v3"]), same_as_current=1.0)
        staged = await releases.stage("v1", "v3")
        assert staged.canary[-1].problems == [
            "0 of 1 answers are those of the current version, expected at least 100%"
        ]
        for text in ("{", '{"prompts": []}', '{"prompts": [{"prompt": "a", "contain": ["b"]}]}'):
            await releases.rollback("v1", None)
            (tasks / "v3" / "canary.json").write_text(text)
            with pytest.raises(VariantError, match=r"canary\.json is not"):
                await releases.stage("v1", "v3")
            assert releases.release("v1").state == "rolled_back"
            (tasks / "v3" / "canary.json").unlink()
            await releases.stage("v1", "v3")
        with pytest.raises(ReleaseError, match=r"there was no canary\.json beside version"):
            await releases.check("v1")

    run_rig(test)


def test_sessions_stay_with_their_version(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        await releases.stage("v1", "v2")
        sessions = [f"user-{number}" for number in range(400)]
        answering = rig.server.catalogue.answering
        drawn: set[str] = set()
        for weight in (0, 10, 40, 100):
            await releases.weigh("v1", Weighing(weight=weight))
            now = {one for one in sessions if answering("v1", one) == "v1@staged"}
            assert now >= drawn
            assert abs(len(now) - 4 * weight) <= 40
            assert now == {one for one in sessions if answering("v1", one) == "v1@staged"}
            drawn = now
        await releases.weigh("v1", Weighing(weight=40))
        chosen = [answering("v1", None) for _ in range(1000)]
        assert 300 < chosen.count("v1@staged") < 500
        in_header, in_body = [], []
        for one in sessions[:12]:
            in_header.append((await say(rig, x_session=one))[0])
            call = Call(rig, "/v1/completions", {"model": "v1", "user": one}, x_session="another")
            await call.answer()
            in_body.append(call.header("x-peanut-variant"))
        assert in_header == in_body == [answering("v1", one) for one in sessions[:12]]
        assert set(in_header) == {"v1", "v1@staged"}

    run_rig(test)


def test_failures_roll_a_release_back(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        await releases.stage("v1", "v2")
        for _ in range(3):
            await BrokenCall(rig, "/v1/completions", {"model": "v1@staged"}).answer()
        assert releases.release("v1").watched == 0  # somebody tries it out
        await releases.weigh("v1", Weighing(weight=100, max_error_rate=0.5, min_requests=5))
        for expected in (1, 2):
            await say(rig)
            assert releases.release("v1").watched == expected
        for failed in (1, 2):
            assert (await BrokenCall(rig, "/v1/completions", {"model": "v1"}).answer())[0] == 500
            assert (releases.release("v1").failed, releases.release("v1").state) == (failed, "staged")
        assert (await BrokenCall(rig, "/v1/completions", {"model": "v1"}).answer())[0] == 500
        ended = releases.release("v1")
        assert (ended.state, ended.weight) == ("rolled_back", 0)
        assert ended.events[-1].detail == "3 of the latest 5 requests failed, at most 50.0% may"
        assert (await say(rig, kind=BrokenCall)) == ("v1", "v1")
        lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
        assert [line["action"] for line in lines] == ["release stage", "release weight", "release rollback"]
        assert (lines[-1]["key"], lines[-1]["reason"]) == ("peanut-serve", ended.events[-1].detail)
        assert (lines[-1]["staged"], lines[-1]["new"]) == (rig.digests["v2"], rig.digests["v1"])

    run_rig(test)


def test_a_version_that_cannot_be_swapped_in_counts_as_failed(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        await releases.stage("v1", "v2")
        await releases.weigh("v1", Weighing(weight=100, max_error_rate=0, min_requests=1))
        rig.engine.fail("apply")
        assert (await Call(rig, "/v1/completions", {"model": "v1"}).refusal())[:2] == (500, "SwapError")
        assert releases.release("v1").state == "rolled_back"
        assert await say(rig) == ("v1", "v1")

    run_rig(test)


def test_a_full_disk_does_not_keep_the_share(
    run_rig: RunRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        await releases.stage("v1", "v2")
        await releases.weigh("v1", Weighing(weight=100, max_error_rate=0, min_requests=1))

        def full(*_: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(rig.server.catalogue._store, "save", full)
        await BrokenCall(rig, "/v1/completions", {"model": "v1"}).answer()
        assert await say(rig) == ("v1", "v1")

    run_rig(test)


def test_a_restart_in_the_middle(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    """Twice: with a release that is open, from an export, and after failures have ended it."""
    digests: dict[str, str] = {}

    async def begin(rig: Rig) -> None:
        await learn(rig)
        digests.update(rig.digests)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        write_canaries(tasks / "v2", says(rig.expected["v2"]))
        await releases.stage("v1", "v2")
        await releases.weigh("v1", Weighing(weight=100, max_error_rate=0.1, min_requests=2))
        replace(tasks / "v1", tasks / "v3")
        replace(tasks / "v2", tasks / "v3")
        export_state(rig.server.settings.state, tmp_path / "state.tar")
        import_state(tmp_path / "state.tar", tmp_path / "first")

    async def go_on(rig: Rig) -> None:
        rig.digests.update(digests)
        releases = releases_of(rig, tmp_path / "later.jsonl")
        assert await say(rig) == ("v1@staged", "v2")
        assert await say(rig, "v1@current") == ("v1", "v1")
        found = releases.release("v1")
        assert (found.weight, found.passed, found.max_error_rate, found.watched) == (100, True, 0.1, 1)
        await BrokenCall(rig, "/v1/completions", {"model": "v1"}).answer()
        assert releases.release("v1").state == "rolled_back"
        shutil.copytree(rig.server.settings.state, tmp_path / "second")

    async def end(rig: Rig) -> None:
        rig.digests.update(digests)
        assert await say(rig) == ("v1", "v1")
        assert rig.server.facts("v1").is_held
        assert not rig.server.has("v1@staged")

    run_rig(begin)
    run_rig(go_on, state=tmp_path / "first")
    run_rig(end, state=tmp_path / "second")


def test_no_answer_has_the_digest_of_another_version(run_rig: RunRig, tmp_path: Path) -> None:
    """Requests go on while versions are staged, get shares, are promoted and rolled back."""

    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        is_over = asyncio.Event()
        seen: set[tuple[str, str]] = set()

        async def ask(model: str) -> None:
            while not is_over.is_set():
                if not rig.server.has(model):
                    await asyncio.sleep(0.001)
                    continue
                call = Call(rig, "/v1/completions", {"model": model})
                status, text = await call.answer()
                if model == "v1@staged" and status in (404, 422):
                    continue  # it has ended
                assert status == 200, text
                assert text == identity_of(rig, call.header("x-peanut-digest"))
                seen.add((str(call.header("x-peanut-variant")), name_of(rig, text)))

        asking = [asyncio.create_task(ask(model)) for model in ["v1"] * 6 + ["v1@staged"] * 2 + ["v3"]]
        for source in ("v2", "v3", "v2", "v3"):
            await releases.stage("v1", source)
            await releases.weigh("v1", Weighing(weight=50))
            await asyncio.sleep(0.2)
            await releases.promote("v1", force=False)
            await asyncio.sleep(0.05)
            await releases.rollback("v1", None)
            assert rig.server.facts("v1").digest == rig.digests["v1"]
        is_over.set()
        await asyncio.gather(*asking)
        assert {("v1", "v1"), ("v1@staged", "v2"), ("v1@staged", "v3")} <= seen

    run_rig(test)


def test_what_a_release_forbids(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        server, releases = rig.server, releases_of(rig, tmp_path / "audit.jsonl")
        for name, source, error in (
            ("none", None, UnknownVariantError),
            ("base", "v2", VariantNameError),
            ("v1", "none", UnknownVariantError),
            ("v1", "../tasks/v2", UnknownVariantError),
            ("v1", "broken", PeanutError),
            ("v1", "v1", VariantError),
        ):
            with pytest.raises(error):
                await releases.stage(name, source)
        assert await say(rig) == ("v1", "v1")
        for change in (releases.promote("v1", True), releases.rollback("v1", None), releases.check("v1")):
            with pytest.raises(UnknownVariantError, match="v1 has no release"):
                await change
        await releases.stage("v1", "v2")
        with pytest.raises(ReleaseError, match="v1 has a release of version"):
            await releases.stage("v1", "v3")
        for forbidden in (server.reload("v1"), server.rollback("v1", None), server.unregister("v1", drain=False)):
            with pytest.raises(VariantInUseError, match="v1 has a release .* promote it or roll it back"):
                await forbidden
        for forbidden in (server.reload("v1@staged"), server.unregister("v1@staged", drain=False)):
            with pytest.raises(VariantNameError, match="a staged version"):
                await forbidden
        with pytest.raises(VariantNameError, match="release v1"):
            await releases.stage("v1@staged", "v3")
        await releases.promote("v1", force=False)
        await server.rollback("v1", rig.digests["v1"])
        with pytest.raises(ReleaseError, match="v1 has no version that a release gave it"):
            await releases.rollback("v1", None)
        with pytest.raises(ReleaseError, match="was promoted; stage another version"):
            await releases.promote("v1", force=True)

    run_rig(test)


def test_a_reload_while_a_version_is_staged(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    """The name is held all the same: the release is between two versions, whatever happens to the files."""

    async def test(rig: Rig) -> None:
        await learn(rig)
        releases, make_ready = releases_of(rig, tmp_path / "audit.jsonl"), rig.server.make_ready

        async def slowly(name: str, version: Version) -> None:
            await make_ready(name, version)
            await rig.server.reload("v1")  # which ends the hold

        rig.server.make_ready = slowly  # type: ignore[method-assign]
        await releases.stage("v1", "v2")
        replace(tasks / "v1", tasks / "v3")
        assert await say(rig) == ("v1", "v1")

    run_rig(test)


def test_a_pinned_name_pins_what_it_is_promoted_to(run_rig: RunRig, tmp_path: Path) -> None:
    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        await rig.server.pin("v1", True)
        await releases.stage("v1", "v2")
        await rig.server.pin("v1@staged", True)
        await releases.promote("v1", force=False)
        cache = rig.server.cache
        assert cache.evictable(rig.digests["v2"]) == 0
        assert cache.evictable(rig.digests["v1"]) > 0

    run_rig(test)


def test_the_files_of_a_staged_version_are_removed(run_rig: RunRig, tasks: Path, tmp_path: Path) -> None:
    """Its share is answered by the version that the name has."""

    async def test(rig: Rig) -> None:
        await learn(rig)
        releases = releases_of(rig, tmp_path / "audit.jsonl")
        await releases.stage("v1", "v2")
        await releases.weigh("v1", Weighing(weight=100))
        shutil.rmtree(tasks / "v2")
        assert await say(rig) == ("v1", "v1")
        assert (await Call(rig, "/v1/completions", {"model": "v1@staged"}).answer())[0] == 404

    run_rig(test)
