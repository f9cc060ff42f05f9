"""What operators want is changed by two processes at the same time, or by one that stood still for a while."""

import asyncio
from pathlib import Path

import pytest
from support.fleet.key_values import Store

from peanut_serve.errors import EngineDownError, ReleaseError
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.wanted import WantedState


@pytest.fixture
def kv(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store.instead_of_rays(monkeypatch)


def pin(store: WantedStore, name: str) -> WantedState:
    return asyncio.run(store.change(lambda state: state.after("pin", name, None)))


def test_a_change_between_reading_and_writing_is_not_lost(kv: Store) -> None:
    one, other = WantedStore("app", "base", None), WantedStore("app", "base", None)
    pin(one, "v0")
    kv.between = lambda: pin(other, "v1")
    state = pin(one, "v2")
    assert (state.revision, set(state.variants)) == (3, {"v0", "v1", "v2"})
    assert asyncio.run(other.newest()) == state


def test_a_change_that_another_one_forbids_is_not_made(kv: Store) -> None:
    one, other = WantedStore("app", "base", None), WantedStore("app", "base", None)

    def only_first(state: WantedState) -> WantedState:
        if state.variants:
            raise ReleaseError("somebody was faster")
        return state.after("pin", "v0", None)

    kv.between = lambda: pin(other, "v1")
    with pytest.raises(ReleaseError, match="somebody was faster"):
        asyncio.run(one.change(only_first))
    assert set(asyncio.run(one.newest()).variants) == {"v1"}


def test_a_process_that_stood_still_finds_that_its_number_was_dropped(kv: Store) -> None:
    one, other = WantedStore("app", "base", None), WantedStore("app", "base", None)
    pin(one, "v0")

    def meanwhile() -> None:
        for number in range(20):
            pin(other, f"other{number}")

    kv.between = meanwhile
    state = pin(one, "late")
    assert (state.revision, len(state.variants)) == (22, 22)
    assert asyncio.run(other.newest()) == state
    assert len(kv.values) < 12, "old states stay for ever"


def test_who_is_never_fast_enough_is_told(kv: Store) -> None:
    one, other = WantedStore("app", "base", None), WantedStore("app", "base", None)
    numbers = iter(range(10_000))

    def always() -> None:
        pin(other, f"other{next(numbers)}")
        kv.between = always

    kv.between = always
    with pytest.raises(EngineDownError, match="is being changed by others all the time"):
        pin(one, "v0")


def test_the_state_of_an_earlier_cluster_does_not_replace_a_change_meanwhile(kv: Store, tmp_path: Path) -> None:
    earlier = WantedStore("app", "base", tmp_path)
    for name in ("v0", "v1", "v2"):
        pin(earlier, name)
    asyncio.run(earlier.newest())  # which writes the file
    kv.values.clear()
    node, front = WantedStore("app", "base", tmp_path), WantedStore("app", "base", None)
    kv.between = lambda: pin(front, "new")
    found = asyncio.run(node.newest())
    assert found.revision == 3
    assert asyncio.run(front.newest()) == found, "the highest revision counts"
    assert pin(front, "after").revision == 4


def test_of_two_states_with_one_revision_that_of_the_cluster_counts(kv: Store, tmp_path: Path) -> None:
    """Or replicas on a node with a file of an earlier cluster would have another state than their peers."""
    earlier = WantedStore("app", "base", tmp_path)
    pin(earlier, "old")
    asyncio.run(earlier.newest())
    kv.values.clear()
    wanted = pin(WantedStore("app", "base", None), "new")
    assert asyncio.run(earlier.newest()) == wanted
    kv.values.clear()
    assert asyncio.run(earlier.newest()) == wanted, "the file still has the state of the earlier cluster"
