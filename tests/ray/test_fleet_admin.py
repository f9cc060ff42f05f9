"""What an operator is told of a change that went to all replicas; test_fleet.py has real ones."""

import json
from typing import Any

import pytest

from peanut_serve.errors import UnknownVariantError, VariantError
from peanut_serve.ray.fleet.joint import joint_variants, rollback_target
from peanut_serve.ray.fleet_admin import of_all
from peanut_serve.web.schema import VariantStatus

DONE = {"replica": "a", "status": 200, "answer": {"name": "v", "digest": "1"}}
OTHER = {"replica": "b", "status": 200, "answer": {"name": "v", "digest": "2"}}
REMOVED = {"replica": "a", "status": 204, "answer": None}
REFUSED = {"replica": "c", "status": 404, "answer": {"error": {"message": "no v"}}}
LOST = {"replica": None, "status": 503, "error": "the replica did not answer (ActorDiedError)"}


@pytest.mark.parametrize(
    ("entries", "status", "agree"),
    [
        ([DONE, DONE], 200, True),
        ([REMOVED, REMOVED], 200, True),
        ([DONE, OTHER], 207, False),
        ([DONE, REFUSED], 207, False),
        ([DONE, LOST], 207, False),
        ([REFUSED, REFUSED], 404, False),
        ([LOST], 503, False),
    ],
)
def test_the_status_of_a_change(entries: list[dict[str, Any]], status: int, agree: bool) -> None:
    answer = of_all(entries)
    assert answer.status_code == status
    body = json.loads(bytes(answer.body))
    assert body["agree"] is agree
    assert bool(body["message"]) is not agree
    assert [one["replica"] for one in body["replicas"]] == [entry["replica"] for entry in entries]
    assert ("error" in body) == (status >= 400)


def test_without_a_replica_nothing_was_changed() -> None:
    assert of_all([]).status_code == 503


def status(name: str, digest: str | None, *previous: str, **facts: Any) -> dict[str, Any]:
    counts = {"host_bytes": 10, "running": 1, "waiting": 0, "requests": 2, "swaps": 1}
    known = {"last_used": None, "last_swap_seconds": None, "error": None, "source": name, "pinned": False}
    found = {"name": name, "kind": "adapter", "state": "ready", "digest": digest, "previous": list(previous)}
    return {**found, **counts, **known, **facts}


def test_variants_have_what_is_true_of_the_fleet_and_an_entry_per_replica() -> None:
    base = status("base", "b", kind="base")
    entries = [
        {"replica": "a", "status": 200, "answer": [base, status("v", "1", state="active"), status("w", None)]},
        {"replica": "b", "status": 200, "answer": [base, status("v", "1", running=4), status("w", "2")]},
    ]
    base_of_all, same, seen_by_one = joint_variants(entries)
    assert (base_of_all.name, base_of_all.agree) == ("base", True)
    assert (same.state, same.digest, same.running, same.host_bytes) == ("active", "1", 5, 20)
    assert [one.replica for one in same.replicas] == ["a", "b"]
    assert (seen_by_one.digest, seen_by_one.agree) == ("2", True), "a replica that was not asked does not disagree"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"answer": [status("v", "2")]}, "versions differ: a has 1, b has 2"),
        ({"answer": []}, "b has no status (the replica does not have it)"),
        ({"status": 503, "error": "it is down"}, "b has no status (it is down)"),
        ({"answer": [status("v", "1", pinned=True)]}, "some pin it, others do not"),
        ({"answer": [status("v", "1")], "withheld": {"v": "no θ"}}, "b refuses requests (no θ)"),
    ],
)
def test_what_differs_between_replicas_is_told(other: dict[str, Any], told: str) -> None:
    entries = [
        {"replica": "a", "status": 200, "answer": [status("v", "1")]},
        {"replica": "b", "status": 200, **other},
    ]
    (found,) = joint_variants(entries)
    assert (found.agree, found.message) == (False, told)


def test_the_replica_that_was_asked_knows_the_kind() -> None:
    """The other has judged it by its files."""
    answers = [status("v", "1", requests=0), status("v", "1", requests=1, kind="lora")]
    entries = [
        {"replica": replica, "status": 200, "answer": [one]} for replica, one in zip("ab", answers, strict=True)
    ]
    assert [one.kind for one in joint_variants(entries)] == ["lora"]


def test_a_variant_that_no_replica_has_though_it_is_wanted() -> None:
    (found,) = joint_variants([{"replica": "a", "status": 200, "answer": [], "withheld": {"v": "no files"}}])
    assert (found.name, found.state, found.agree, found.error) == ("v", "failed", False, "no files")


@pytest.mark.parametrize(
    ("chains", "asked", "found"),
    [
        ([["2", "1"], ["2", "1"]], None, "1"),
        ([["2", "1"], ["2"]], None, "1"),  # started later
        ([["2", "1", "0"], ["1", "0"]], None, "1"),  # the second was not asked since the files changed
        ([["3", "2", "1"], ["3", "1"]], None, "2"),
        ([["21", "11"], ["20"]], "1", "11"),
        ([["2"]], "f" * 40, "f" * 40),  # perhaps a replica that is down has it
    ],
)
def test_all_replicas_are_rolled_back_to_the_same_version(
    chains: list[list[str]], asked: str | None, found: str
) -> None:
    statuses = [VariantStatus(**status("v", *chain)) for chain in chains]
    assert rollback_target("v", statuses, asked) == found


@pytest.mark.parametrize(
    ("chains", "asked", "message"),
    [
        ([["3", "1"], ["3", "2"]], None, "several versions of v may be meant: 1, 2; give the digest of one"),
        ([["1", "2"], ["2", "1"]], None, "no such earlier version; its versions are 1, 2"),
        ([["1"], ["1"]], None, "no such earlier version; its versions are 1"),
        ([["21", "20"]], "2", "several versions of v may be meant: 20, 21"),
        ([["21", "20"]], "3", "no such earlier version"),
    ],
)
def test_a_rollback_that_could_differ_is_refused(chains: list[list[str]], asked: str | None, message: str) -> None:
    with pytest.raises(VariantError, match=message):
        rollback_target("v", [VariantStatus(**status("v", *chain)) for chain in chains], asked)
    with pytest.raises(UnknownVariantError):
        rollback_target("v", [], asked)
