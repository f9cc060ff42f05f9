"""How a replica is brought to what operators want, with a fake engine; test_operating.py has Ray."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from support.fleet.fake_admin import digest_of
from support.fleet.replayed import Engine

from peanut_serve.errors import ReleaseError
from peanut_serve.ray.fleet.wanted import Wanted, WantedState, base_of
from peanut_serve.variants.kept_theta import add_theta, read_theta
from peanut_serve.variants.release import Release

OLD, NEW = digest_of("old"), digest_of("new")


def files(folder: Path, **digests: str) -> None:
    (folder / "files.json").write_text(json.dumps(digests))


def wanted(**variants: Wanted) -> WantedState:
    return WantedState(revision=7, variants=variants)


def test_an_engine_with_an_empty_state_folder_gets_everything(tmp_path: Path) -> None:
    files(tmp_path, v1=NEW)
    engine = Engine(tmp_path, theta={"theta": b"old"})
    engine.follow(
        wanted(nice=Wanted(source="v2"), v1=Wanted(held=OLD), v3=Wanted(removed=True), v4=Wanted(pinned=True))
    )
    assert engine.replay.withheld == engine.replay.unpinned == {}
    assert (engine.admin.current("nice"), engine.admin.current("v1"), engine.admin.current("v3")) == ("v2", OLD, None)
    assert engine.admin.records["v4"]["pinned"]
    files(tmp_path, v1=digest_of("newer"))
    assert engine.admin.current("v1") == OLD, "it is not held"


def test_an_engine_with_the_state_of_an_earlier_time_forgets_it(tmp_path: Path) -> None:
    files(tmp_path, v1=NEW)
    engine = Engine(tmp_path, theta={"theta": b"old"})
    engine.follow(
        wanted(nice=Wanted(source="v2"), v1=Wanted(held=OLD), v3=Wanted(pinned=True), gone=Wanted(source="v5"))
    )
    later = WantedState(
        revision=9,
        variants={
            "nice": Wanted(source="v4"),
            "v1": Wanted(),
            "v3": Wanted(pinned=False),
            "gone": Wanted(removed=True),
        },
    )
    restarted = Engine(tmp_path)
    restarted.follow(later)
    assert restarted.replay.withheld == {}
    assert (restarted.admin.current("nice"), restarted.admin.current("v1")) == ("v4", NEW)
    assert not restarted.admin.records["v3"]["pinned"]
    assert "gone" not in restarted.admin.records
    calls = len(restarted.calls)
    again = Engine(tmp_path)
    again.follow(later)
    assert (len(again.calls), calls > 0) == (0, True), "what is as wanted is left alone"


def test_a_version_that_is_rolled_back_answers_nothing_meanwhile(tmp_path: Path) -> None:
    engine = Engine(tmp_path, theta={"theta": b"old"})
    engine.follow(wanted(v1=Wanted(held=OLD), v4=Wanted(pinned=True)))
    assert list(zip(engine.calls, engine.withheld_meanwhile, strict=True)) == [
        ("rollback", True),  # without θ, which then comes from another replica
        ("rollback", True),
        ("pin", False),
    ]
    assert engine.replay.withheld == {}


def test_a_name_that_cannot_be_brought_there_is_withheld_until_it_can(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.follow(wanted(v1=Wanted(held=OLD), v2=Wanted(pinned=True), nice=Wanted(source="nothing")))
    assert engine.replay.withheld == {
        "v1": "v1 has no such earlier version",
        "nice": "there are no files of nothing",
    }
    engine.theta = {"theta": b"old"}
    files(tmp_path, nothing=NEW)
    asyncio.run(engine.replay.settle(["v1", "nice"]))
    assert engine.replay.withheld == {}
    assert (engine.admin.current("v1"), engine.admin.current("nice")) == (OLD, NEW)


def test_a_pin_that_fails_withholds_nothing(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    (engine.state / "refuses").write_text("v2")
    engine.follow(wanted(v2=Wanted(pinned=True)))
    assert (engine.replay.withheld, engine.replay.unpinned) == ({}, {"v2": "v2 cannot be changed here"})


def test_a_change_that_the_replica_made_is_not_made_again(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    first = WantedState().after("pin", "v1", None)
    engine.follow(first, done=True)
    assert engine.calls == []
    engine.follow(first.after("pin", "v2", None).after("pin", "v3", None), done=True)  # it missed one
    assert engine.calls == ["pin", "pin"]
    engine.follow(first)
    assert engine.replay.state.revision == 3, "an older state is ignored"


def test_a_pin_that_the_replica_made_does_not_end_what_is_withheld(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    first = WantedState().after("rollback", "v1", OLD)
    engine.follow(first)
    assert engine.replay.withheld.keys() == {"v1"}, "nobody has the version"
    engine.admin.change("pin", "v1", None)
    engine.follow(first.after("pin", "v1", None), done=True)
    assert engine.replay.withheld.keys() == {"v1"}


def test_a_change_that_is_interrupted_is_withheld_and_tried_again(tmp_path: Path) -> None:
    engine, call = Engine(tmp_path), Engine.call
    engine.replay._engine._call = interrupted
    with pytest.raises(asyncio.CancelledError):
        engine.follow(wanted(nice=Wanted(source="v2"), v1=Wanted(pinned=True)))
    assert engine.replay.withheld.keys() == {"nice", "v1"}
    engine.replay._engine._call = call.__get__(engine)
    asyncio.run(engine.replay.settle([*engine.replay.withheld]))
    assert (engine.replay.withheld, engine.admin.current("nice")) == ({}, "v2")


async def interrupted(*_: Any) -> Any:
    raise asyncio.CancelledError


def test_what_is_wanted_after_changes() -> None:
    state = WantedState()
    for action, name, given in [
        ("register", "nice", "v1"),
        ("pin", "nice", None),
        ("rollback", "nice", OLD),
        ("unpin", "v2", None),
        ("unregister", "v3", None),
    ]:
        state = state.after(action, name, given)
    assert state.variants["nice"] == Wanted(source="v1", pinned=True, held=OLD)
    assert (state.variants["v2"], state.variants["v3"]) == (Wanted(pinned=False), Wanted(removed=True))
    assert state.after("reload", "nice", None).variants["nice"].held is None
    assert state.after("register", "v3", "v3").variants["v3"] == Wanted(source="v3")
    assert WantedState.model_validate_json(state.model_dump_json()) == state
    assert state.revision == 5


@pytest.mark.parametrize(
    ("options", "base"),
    [(["--mode", "lora", "--base", "./b"], "./b"), (["--base=./b"], "./b"), (["--swap", "0"], ""), (["--base"], "")],
)
def test_the_base_in_a_command_line(options: list[str], base: str) -> None:
    assert base_of(options) == base


@pytest.mark.parametrize(
    ("digest", "names"),
    [("../" * 13 + "x", ["theta"]), ("f" * 39, ["theta"]), (OLD, ["../theta"]), (OLD, [".."]), (OLD, [""])],
)
def test_nothing_that_a_peer_sends_becomes_a_path(tmp_path: Path, digest: str, names: list[str]) -> None:
    (tmp_path / "theta").mkdir()
    with pytest.raises(ValueError, match="is not a digest, or"):
        add_theta(tmp_path, digest, dict.fromkeys(names, b""))
    assert read_theta(tmp_path, digest) is None
    assert list(tmp_path.rglob("*")) == [tmp_path / "theta"]


def staged(digest: str, replaces: str, **more: Any) -> Release:
    return Release(digest=digest, source="v2", replaces=replaces, replaces_source="v1", **more)


def released(**more: Any) -> Wanted:
    """v1 is held at its own version, and v2's is staged."""
    release = staged("v2", "v1", weight=30, max_error_rate=0.2, min_requests=7)
    return Wanted(held="v1", release=release).model_copy(update=more)


def release_of(engine: Engine, name: str = "v1") -> tuple[str, str, int]:
    found = engine.releases.find(name)
    return found["state"], found["digest"], found["weight"]


def test_a_release_is_brought_to_an_engine_that_starts_later(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.follow(wanted(v1=released()))
    assert engine.replay.withheld == {}
    assert release_of(engine) == ("staged", "v2", 30)
    assert engine.releases.find("v1")["min_requests"] == 7
    assert (engine.admin.current("v1"), engine.admin.current("v1@staged")) == ("v1", "v2")
    calls = list(engine.calls)
    engine.follow(WantedState(revision=8, variants={"v1": released(pinned=True)}))
    assert engine.calls == [*calls, "pin"], "what is as wanted is left alone"


def test_the_same_version_is_staged_though_the_files_have_changed(tmp_path: Path) -> None:
    files(tmp_path, v2=NEW)
    engine = Engine(tmp_path, theta={"theta": b"old"})
    engine.follow(wanted(v1=Wanted(held="v1", release=staged(OLD, "v1"))))
    assert engine.replay.withheld == {}
    assert release_of(engine) == ("staged", OLD, 0)


def test_a_staged_version_that_nobody_has_withholds_only_itself(tmp_path: Path) -> None:
    files(tmp_path, v2=NEW)
    engine = Engine(tmp_path)
    engine.follow(wanted(v1=Wanted(held="v1", release=staged(OLD, "v1"))))
    assert engine.replay.withheld == {"v1@staged": "the files of v2 have another version"}
    assert engine.replay.reason("v1") == "the files of v2 have another version"
    engine.theta = {"theta": b"old"}
    asyncio.run(engine.replay.settle(["v1@staged"]))
    assert engine.replay.withheld == {}


def test_a_version_that_fails_its_canary_set_here_gets_no_share_here(tmp_path: Path) -> None:
    (tmp_path / "canaries.json").write_text(json.dumps({"v2": False}))
    engine = Engine(tmp_path)
    engine.follow(wanted(v1=released()))
    assert engine.replay.withheld == {"v1@staged": "v1 has not passed its canary set"}
    assert release_of(engine) == ("staged", "v2", 0)
    engine.follow(WantedState(revision=8, variants={"v1": released(forced=True)}))
    assert (engine.replay.withheld, release_of(engine)[2]) == ({}, 30)


@pytest.mark.parametrize("is_missed", [False, True])
def test_a_promotion_and_its_rollback_reach_every_engine(tmp_path: Path, is_missed: bool) -> None:
    """Those that were there, and those that have missed the steps in between."""
    engine = Engine(tmp_path)
    open_one, files_of_v1 = released(), "v1"
    promoted = open_one.promoted(open_one.open_release, "")
    rolled_back = promoted.rolled_back(promoted.release, "wrong")
    if not is_missed:
        engine.follow(WantedState(revision=1, variants={"v1": open_one}))
    engine.follow(WantedState(revision=2, variants={"v1": promoted}))
    assert engine.replay.withheld == {}
    assert (engine.admin.current("v1"), engine.admin.records["v1"]["source"]) == ("v2", "v2")
    assert (release_of(engine)[0], "v1@staged" in engine.admin.records) == ("promoted", False)
    again = Engine(tmp_path)
    again.follow(WantedState(revision=2, variants={"v1": promoted}))
    assert again.calls == [], "what is as wanted is left alone"
    again.follow(WantedState(revision=3, variants={"v1": rolled_back}))
    assert again.replay.withheld == {}
    assert (again.admin.current("v1"), again.admin.records["v1"]["source"]) == ("v1", files_of_v1)
    files(tmp_path, v1=NEW)
    assert again.admin.current("v1") == "v1", "it is not held"


def test_a_release_that_has_ended_elsewhere_ends_here(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.follow(WantedState(revision=1, variants={"v1": released()}))
    ended = released().rolled_back(released().open_release, "too many failed")
    restarted = Engine(tmp_path)
    restarted.follow(WantedState(revision=2, variants={"v1": ended}))
    assert restarted.releases.find("v1")["events"][-1]["detail"] == "too many failed"
    assert restarted.calls == ["release rollback"]
    assert restarted.admin.current("v1") == "v1"


def test_a_release_that_nobody_wants_ends_before_another_is_staged(tmp_path: Path) -> None:
    """The front has ended before it could remember what it had asked for."""
    engine = Engine(tmp_path)
    engine.releases.make("stage", "v1", {"source": "v3"})
    asyncio.run(engine.replay.settle(["v1"]))
    assert release_of(engine)[0] == "rolled_back"
    engine.follow(wanted(v1=released()))
    assert release_of(engine) == ("staged", "v2", 30)


def test_a_removed_name_has_no_release_any_more(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.follow(WantedState(revision=1, variants={"v1": released()}))
    engine.follow(WantedState(revision=2, variants={"v1": Wanted(removed=True)}))
    assert (engine.replay.withheld, "v1" in engine.admin.records) == ({}, False)


def test_what_steps_of_a_release_make_of_what_is_wanted() -> None:
    first = Wanted(source="v1", pinned=True).staged("nice", staged("v2", "v1"))
    assert (first.held, first.target, first.open_release) == ("v1", "v1", staged("v2", "v1"))
    with pytest.raises(ReleaseError, match="nice has a release of version v2; promote it or roll it back before"):
        first.staged("nice", staged("v3", "v1"))
    promoted = first.promoted(first.open_release, "")
    assert (promoted.held, promoted.target, promoted.open_release) == ("v2", "v2", None)
    second = promoted.staged("nice", staged("v3", "v2"))
    assert (second.held, second.target) == ("v2", "v2"), "the entry of the first release stays"
    ended = second.rolled_back(second.open_release, None)
    assert (ended.held, ended.target) == ("v2", "v2")
    back = promoted.rolled_back(promoted.release, None)
    assert (back.held, back.target, back.pinned) == ("v1", "v1", True)
