"""Releases of a fleet on Ray Serve with fake engines: all replicas, those that start later, the share, failures."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.engines.remains import until
from support.fleet.fake_admin import digest_of
from support.fleet.operated import REPLICAS, Ctl, OperatedFleet, ctl_for, operated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OLD, NEW, NEWER = (digest_of(name) for name in ("old", "new", "newer"))


class Fleet(OperatedFleet):
    def step(self, name: str, verb: str, **body: Any) -> httpx.Response:
        return self.client.post(f"/admin/v1/releases/{name}/{verb}", json=body or None)

    def show(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/admin/v1/releases/{name}").json()
        return found

    def ask(self, model: str, **more: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"model": model, **more})

    def answers(self, model: str, **more: Any) -> tuple[str, str]:
        """The name and the version that answered."""
        found = self.ask(model, **more)
        assert found.status_code == 200, found.text
        return found.headers["x-peanut-variant"], found.headers["x-peanut-digest"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("released")
    with operated(folder) as address:
        yield Fleet(address, folder)


@pytest.fixture
def ctl(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return ctl_for(fleet, monkeypatch, capsys, "release")


def test_from_staging_to_promotion_and_back(fleet: Fleet, ctl: Ctl) -> None:
    fleet.files(v1=OLD, v2=NEW)
    code, out, err = ctl("stage", "v1", "--source", "v2")
    assert (code, err) == (0, "")
    assert out == f"v1: staged, digest {NEW}, 0 % of the requests, canary none\n"
    shown = fleet.show("v1")
    assert (shown["agree"], shown["replaces"], len(shown["replicas"])) == (True, OLD, REPLICAS)
    assert {one["status"]["digest"] for one in shown["replicas"]} == {NEW}
    fleet.files(v1=NEWER)
    assert fleet.answers("v1") == ("v1", OLD), "it is not held"
    assert fleet.answers("v1@staged") == ("v1@staged", NEW)
    assert ctl("weight", "v1", "100")[0] == 0
    assert until(lambda: fleet.answers("v1") == ("v1@staged", NEW), 10)
    assert fleet.answers("v1@current") == ("v1", OLD)
    assert fleet.client.delete("/admin/v1/variants/v1").status_code == 409
    reload = fleet.client.post("/admin/v1/variants/v1/reload")
    assert (reload.status_code, reload.json()["error"]["type"]) == (409, "VariantInUseError")
    assert ctl("promote", "v1")[:2] == (0, f"v1: promoted, digest {NEW}, canary none\n")
    for _ in range(4):
        assert fleet.answers("v1") == ("v1", NEW)
    assert fleet.ask("v1@staged").status_code == 404
    assert ctl("rollback", "v1", "--reason", "wrong units")[0] == 0
    assert until(lambda: fleet.client.get("/admin/v1/fleet").json()["agree"], 30)
    for _ in range(4):
        assert fleet.answers("v1") == ("v1", OLD)
    assert "wrong units" in ctl("show", "v1")[1]
    assert ctl("list")[1].splitlines()[1].split()[:2] == ["v1", "rolled_back"]
    actions = [(one["action"], one["outcome"]) for one in fleet.audit()]
    verbs = ("stage", "weight", "promote", "rollback")
    assert [one for one in actions if one[0].startswith("release")] == [(f"release {verb}", "done") for verb in verbs]
    back = fleet.audit()[-1]
    assert (back["old"], back["new"], back["reason"]) == (NEW, OLD, "wrong units")
    assert ctl("rollback", "v1")[0] == 1


def test_a_replica_that_starts_later_has_the_release(fleet: Fleet) -> None:
    fleet.files(v3=OLD, v4=NEW)
    assert fleet.step("v3", "stage", source="v4").status_code == 200
    assert fleet.step("v3", "weight", weight=100).status_code == 200
    fleet.files(v3=NEWER, v4=NEWER)
    fleet.restart("0")
    assert until(lambda: fleet.show("v3")["agree"], 30), fleet.show("v3")
    assert {one["status"]["weight"] for one in fleet.show("v3")["replicas"]} == {100}
    for _ in range(6):
        assert fleet.answers("v3") == ("v3@staged", NEW)
    assert fleet.step("v3", "promote").status_code == 200
    fleet.restart("1")
    for _ in range(6):
        assert fleet.answers("v3") == ("v3", NEW)
    assert fleet.client.get("/admin/v1/fleet").json()["agree"]


def test_sessions_stay_with_their_version_at_every_replica(fleet: Fleet) -> None:
    fleet.files(v5=OLD, v6=NEW)
    fleet.step("v5", "stage", source="v6")
    assert fleet.step("v5", "weight", weight=40, min_requests=1000).status_code == 200
    assert until(lambda: {fleet.answers("v5")[0] for _ in range(20)} == {"v5", "v5@staged"}, 20)
    first = {f"user{number}": fleet.answers("v5", user=f"user{number}") for number in range(60)}
    assert 10 < sum(name == "v5@staged" for name, _ in first.values()) < 40
    for _ in range(2):
        assert {user: fleet.answers("v5", user=user) for user in first} == first
    drawn = Counter(fleet.answers("v5")[0] for _ in range(100))
    assert 20 < drawn["v5@staged"] < 60
    assert fleet.step("v5", "rollback").status_code == 200
    assert {fleet.answers("v5", user=user) for user in first} == {("v5", OLD)}


def test_a_share_goes_where_its_weights_are(fleet: Fleet) -> None:
    """With swapped weights, the versions of a release do not take turns at one replica."""
    fleet.files(v0=OLD, v9=NEW)
    fleet.step("v0", "stage", source="v2")
    fleet.step("v0", "weight", weight=50, min_requests=1000)
    assert until(lambda: {fleet.answers("v0")[0] for _ in range(20)} == {"v0", "v0@staged"}, 20)
    engines = set()

    def swaps() -> int:
        """How many there were in so many requests."""
        journal = fleet.folder / "journal"
        before = journal.read_text().count("swapped")
        engines.update(fleet.ask("v0").json()["pid"] for _ in range(40))
        return journal.read_text().count("swapped") - before

    assert until(lambda: swaps() == 0, 30), "they do, also after the front has learned where they are"
    assert len(engines) == REPLICAS
    assert fleet.step("v0", "rollback").status_code == 200


def test_failures_at_all_replicas_together_end_the_release(fleet: Fleet) -> None:
    fleet.files(v7=OLD, v8=NEW)
    fleet.step("v7", "stage", source="v8")
    fleet.step("v7", "weight", weight=100, max_error_rate=0.2, min_requests=24)
    assert until(lambda: fleet.answers("v7")[0] == "v7@staged", 20)
    (fleet.folder / "broken").write_text(NEW)
    try:
        for number in range(60):
            fleet.ask("v7", user=f"user{number}")
            if fleet.show("v7")["state"] != "staged":
                break
        assert until(lambda: fleet.show("v7")["state"] == "rolled_back", 30)
        shown = fleet.show("v7")
        assert "requests failed, at most 20.0% may" in shown["events"][-1]["detail"]
        assert until(lambda: fleet.show("v7")["agree"], 30)
        assert {fleet.answers("v7") for _ in range(6)} == {("v7", OLD)}
        line = next(one for one in reversed(fleet.audit()) if one["variant"] == "v7")
        assert (line["action"], line["key"], line["outcome"]) == ("release rollback", "peanut-serve", "done")
    finally:
        (fleet.folder / "broken").unlink()


def test_a_canary_set_is_asked_everywhere_and_forbids_the_next_step(fleet: Fleet, ctl: Ctl) -> None:
    bad = digest_of("bad")
    fleet.files(v9=bad, v2=OLD)
    (fleet.folder / "canaries.json").write_text(json.dumps({bad: False}))
    code, out, err = ctl("stage", "v2", "--source", "v9")
    assert (code, "canary 1 of 1 failed" in out) == (1, True), err
    assert [one["status"]["passed"] for one in fleet.show("v2")["replicas"]] == [False] * REPLICAS
    for command in (("weight", "v2", "10"), ("promote", "v2")):
        code, _, err = ctl(*command)
        assert (code, "has not passed its canary set at" in err) == (1, True)
    (fleet.folder / "canaries.json").write_text(json.dumps({bad: True}))
    assert ctl("check", "v2")[0] == 0
    assert ctl("weight", "v2", "10")[0] == ctl("rollback", "v2")[0] == 0


def test_a_replica_that_cannot_have_the_version_is_told_and_gets_no_share(fleet: Fleet, ctl: Ctl) -> None:
    fleet.files(v2=OLD, v4=NEWER)
    for number in ("1", "0"):
        refuses = fleet.state / number / "refuses"
        refuses.write_text("v2@staged")
        if fleet.step("v2", "stage", source="v4").status_code == 207:
            break
        refuses.unlink()  # it was asked first, so that nothing was staged
    try:
        assert fleet.step("v2", "weight", weight=100).status_code == 207
        code, _, err = ctl("show", "v2")
        assert (code, "cannot be changed here" in err) == (1, True)
        assert until(lambda: {fleet.answers("v2") for _ in range(10)} == {("v2@staged", NEWER)}, 30)
        code, _, err = ctl("promote", "v2")
        assert (code, "does not have version" in err) == (1, True)
    finally:
        refuses.unlink()
    assert until(lambda: fleet.show("v2")["agree"], 60)
    assert ctl("promote", "v2")[0] == 0


@pytest.mark.parametrize(
    ("name", "verb", "body", "status"),
    [
        ("nobody", "stage", {}, 404),
        ("v1", "stage", {"source": "nothing"}, 404),
        ("v1", "stage", {"digest": "abc"}, 422),
        ("v1", "weight", {}, 422),
        ("v1", "weight", {"weight": 101}, 422),
        ("nobody", "promote", {}, 404),
        ("v1", "check", {}, 409),
        ("v1", "unknown", {}, 404),
    ],
)
def test_refusals(fleet: Fleet, name: str, verb: str, body: dict[str, Any], status: int) -> None:
    found = fleet.step(name, verb, **body)
    assert found.status_code == status, found.text
    assert found.json()["error"]["message"]


def test_only_operators_make_releases(fleet: Fleet) -> None:
    for headers in ({"Authorization": "Basic none"}, {"Authorization": "Bearer wrong"}):
        for path, method in (("/releases", "GET"), ("/releases/v1/stage", "POST")):
            assert fleet.client.request(method, f"/admin/v1{path}", headers=headers).status_code == 401
