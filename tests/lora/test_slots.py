"""Which adapters are in the slots of the engine."""

from peanut_serve.lora.slots import AdapterSlots


def test_those_in_use_come_first_then_those_used_last() -> None:
    slots = AdapterSlots(2, lambda: 0)
    for digest in ("a", "b", "a", "c"):
        with slots.using(digest):
            pass
    assert slots.loaded() == ["c", "a"]
    with slots.using("b"), slots.using("b"):
        assert slots.loaded() == ["b", "c"]
        with slots.using("d"), slots.using("e"):
            assert (slots.loaded(), slots.waiting()) == (["b", "d"], ["e"])
    assert (slots.loaded(), slots.waiting()) == (["b", "d"], [])  # e came and went, but d went after it


def test_a_new_engine_has_none() -> None:
    starts = 0
    slots = AdapterSlots(2, lambda: starts)
    with slots.using("a"):
        with slots.using("b"):
            pass
        starts = 1
        assert slots.loaded() == ["a"]  # its request has not noticed yet
    assert slots.loaded() == []
    with slots.using("c"):
        pass
    assert slots.loaded() == ["c"]


def test_without_slots_nothing_is_loaded() -> None:
    slots = AdapterSlots(0, lambda: 0)
    with slots.using("a"):
        assert (slots.loaded(), slots.waiting()) == ([], ["a"])
    assert slots.loaded() == []
