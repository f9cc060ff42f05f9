"""A fleet on Ray Serve with fake engines, as operators see it: changes, replicas that start later, `ctl`, metrics."""

import asyncio
import http.client
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from support.engines.remains import until
from support.fleet.fake_admin import digest_of
from support.fleet.operated import ADMIN_KEY, REPLICAS, Ctl, OperatedFleet, ctl_for, operated

from converters.errors import OptionError
from peanut_serve.ray.fleet.store import WantedStore
from peanut_serve.ray.fleet.theta import FleetTheta
from peanut_serve.variants.kept_theta import has_theta

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FIRST, SECOND, THIRD = (digest_of(name) for name in ("first", "second", "third"))


class Fleet(OperatedFleet):
    def digests(self, name: str) -> list[str | None]:
        """What the replicas that run have."""
        return [one["digests"].get(name) for one in self.report()["replicas"] if one["status"] == 200]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("operating")
    with operated(folder) as address:
        yield Fleet(address, folder)


@pytest.fixture
def ctl(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ctl:
    return ctl_for(fleet, monkeypatch, capsys)


def test_ctl_works_as_with_a_single_server(fleet: Fleet, ctl: Ctl) -> None:
    code, out, err = ctl("list")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][-2:] == ["SWAP", "REPLICAS"]
    assert lines[1][:4] == ["base", "base", "ready", "0"]
    assert all(line[-3:] == ["2", "of", "2"] for line in lines[1:])
    replicas = {one["replica"] for one in fleet.report()["replicas"]}
    code, out, _ = ctl("show", "v1")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} > replicas
    code, out, _ = ctl("engine")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} > replicas
    assert ctl("register", "nice", "v2") == (0, "nice: 2 of 2 replicas, digest v2\n", "")
    assert ctl("pin", "v4")[:2] == (0, "v4: 2 of 2 replicas, digest v4\n")
    assert "ready, pinned at replica" in ctl("activate", "v4")[1]
    assert ctl("unpin", "v4")[0] == ctl("unregister", "--drain", "nice")[0] == 0
    code, out, err = ctl("reload", "nobody")
    assert (code, out, err) == (1, "", "peanut-serve ctl: no nobody\n")
    assert len(json.loads(ctl("list", "--json")[1])) == len(lines) - 1


def test_a_rollback_goes_to_the_same_version_everywhere(fleet: Fleet) -> None:
    for digest in (FIRST, SECOND, THIRD):
        fleet.files(v1=digest)
        if digest != SECOND:  # which only one replica has ever had
            assert fleet.admin("POST", "/variants/v1/reload").status_code == 200
            continue
        assert fleet.client.post("/v1/completions", json={"model": "v1"}).json()["variant"] == SECOND
    assert fleet.digests("v1") == [THIRD] * REPLICAS
    answer = fleet.admin("POST", "/variants/v1/rollback").json()
    assert answer["agree"], answer
    assert fleet.digests("v1") == [SECOND] * REPLICAS
    fleet.files(v1=digest_of("fourth"))
    for _ in range(4):
        assert fleet.client.post("/v1/completions", json={"model": "v1"}).json()["variant"] == SECOND


def test_replicas_that_start_later_are_told_what_is_wanted(fleet: Fleet) -> None:
    assert fleet.admin("POST", "/variants", {"name": "alias", "source": "v5"}).status_code == 200
    assert fleet.admin("POST", "/variants/v6/pin").status_code == 200
    assert fleet.admin("DELETE", "/variants/v7").status_code == 200
    for number in sorted(fleet.engines()):
        fleet.restart(number)
        assert fleet.digests("v1") == [SECOND] * REPLICAS
    found = fleet.report()
    assert (found["agree"], found["disputed"]) == (True, []), found
    variants = {one["name"]: one for one in fleet.admin("GET", "/variants").json()}
    assert "v7" not in variants
    assert all(one["agree"] for one in variants.values())
    assert (variants["alias"]["source"], variants["v6"]["pinned"], variants["v1"]["held"]) == ("v5", True, True)
    assert list(fleet.state.glob("wanted-*.json")), "a later cluster would not know"


def test_a_replica_that_cannot_follow_refuses_requests_and_is_told(fleet: Fleet, ctl: Ctl) -> None:
    (fleet.state / "1" / "refuses").write_text("v1")
    fleet.restart("1")
    found = fleet.report()
    assert (found["agree"], found["disputed"]) == (False, ["v1"])
    (withheld,) = [one["withheld"] for one in found["replicas"] if one["withheld"]]
    assert withheld == {"v1": "v1 cannot be changed here"}
    for command in (("list",), ("show", "v1")):
        code, out, err = ctl(*command)
        assert (code, bool(out), err.count("\n")) == (1, True, 1)
        assert "refuses requests (v1 cannot be changed here)" in err
    for _ in range(10):
        assert fleet.client.post("/v1/completions", json={"model": "v1"}).json()["variant"] == SECOND
    (fleet.state / "0" / "refuses").write_text("v1")
    fleet.restart("0")
    answer = fleet.client.post("/v1/completions", json={"model": "v1"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "does not have the wanted version of v1" in answer.json()["error"]["message"]
    for number in ("0", "1"):
        (fleet.state / number / "refuses").unlink()
    assert until(lambda: fleet.report()["disputed"] == ["v1"], 60)  # nobody has its θ any more
    assert fleet.admin("POST", "/variants/v1/reload").status_code == 200
    assert fleet.report()["agree"]
    assert fleet.client.post("/v1/completions", json={"model": "v1"}).json()["variant"] == digest_of("fourth")


def test_theta_comes_from_a_replica_of_another_machine(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "0" / "theta").mkdir(parents=True)
    theta = FleetTheta(tmp_path / "0", serve.get_deployment_handle("Engine", "default"))
    fleet.files(v1=digest_of("fifth"))
    assert fleet.admin("POST", "/variants/v1/reload").status_code == 200
    assert asyncio.run(theta.fetch(digest_of("fifth")))
    assert has_theta(tmp_path / "0", digest_of("fifth"))
    assert not asyncio.run(theta.fetch(digest_of("nobody has it")))


def test_the_audit_log_says_who_did_what_at_which_replica(fleet: Fleet) -> None:
    fleet.admin("POST", "/variants/v8/reload")
    fleet.admin("POST", "/variants/nobody/pin")
    done, refused = fleet.audit()[-2:]
    assert (done["action"], done["variant"], done["outcome"], done["from"]) == ("reload", "v8", "done", "127.0.0.1")
    assert [(one["status"], one["new"]) for one in done["replicas"]] == [(200, "v8")] * REPLICAS
    assert (refused["outcome"], refused["replicas"][0]["error"]) == ("refused", "no nobody")
    back = next(one for one in fleet.audit() if one["action"] == "rollback")
    assert [(one["old"], one["new"]) for one in back["replicas"]] == [(THIRD, SECOND)] * REPLICAS
    assert {one["key"] for one in fleet.audit()} == {done["key"]}
    assert ADMIN_KEY not in (fleet.state / "audit.jsonl").read_text()


def test_bodies_are_bounded_and_checked(fleet: Fleet) -> None:
    large = fleet.client.post("/admin/v1/variants", content=b" " * 100_000)
    assert (large.status_code, large.json()["error"]["type"]) == (413, "RequestTooLargeError")
    wrong = [("/variants", {"name": "x"}), ("/variants", {"name": "x", "source": "y", "z": 1}), ("/variants", 3)]
    for path, body in [*wrong, ("/variants/v1/rollback", {"to": "d0"})]:
        assert fleet.admin("POST", path, body).status_code == 422
    assert fleet.admin("DELETE", "/variants/v2?drain=perhaps").status_code == 422


def test_a_caller_that_goes_away_does_not_leave_half_a_change(fleet: Fleet) -> None:
    before, slow = len(fleet.audit()), fleet.folder / "slow"
    slow.touch()
    connection = http.client.HTTPConnection(fleet.address.removeprefix("http://"), timeout=60)
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    connection.request("POST", "/admin/v1/variants/v2/pin", headers=headers)
    assert until(lambda: "pin v2" in (fleet.folder / "journal").read_text(), 60)
    connection.close()
    slow.unlink()
    assert until(lambda: len(fleet.audit()) > before, 60)
    assert fleet.audit()[-1]["outcome"] == "done", fleet.audit()[-1]
    assert fleet.admin("GET", "/variants/v2").json()["pinned"]


def test_metrics_of_all_replicas_are_on_one_page(fleet: Fleet) -> None:
    def page() -> dict[tuple[str, str], float]:
        text = httpx.get(f"{fleet.address}/metrics", timeout=60).text
        families = list(text_string_to_metric_families(text))
        assert len({family.name for family in families}) == len(families)
        return {(one.name, one.labels["replica"]): one.value for family in families for one in family.samples}

    replicas = {one["replica"] for one in fleet.report()["replicas"]}
    assert until(lambda: len({name for name, value in page().items() if name[0] == "peanut_ready"}) == REPLICAS, 30)
    assert {replica for name, replica in page() if name == "peanut_requests_total"} == replicas
    stopped = fleet.engines()["0"]
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert until(lambda: 0.0 in page().values() and 1.0 in page().values(), 60)
        up = {replica: value for (name, replica), value in page().items() if name == "peanut_replica_up"}
        assert sorted(up.values())[:2] == [0.0, 1.0]
    finally:
        os.kill(stopped, signal.SIGCONT)


def test_the_next_cluster_gets_what_was_wanted_from_a_file(fleet: Fleet, tmp_path: Path) -> None:
    """Each `application` here stands for a cluster whose store is empty."""
    node = WantedStore("first", "base", tmp_path)
    state = asyncio.run(WantedStore("first", "base", None).change(lambda state: state.after("pin", "v1", None)))
    assert (state.revision, asyncio.run(node.newest())) == (1, state)
    assert asyncio.run(WantedStore("second", "base", tmp_path).newest()) == state
    assert asyncio.run(WantedStore("second", "base", None).newest()) == state, "Ray's store did not get it"
    assert asyncio.run(WantedStore("second", "another base", tmp_path).newest()).revision == 0
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("{")
    with pytest.raises(OptionError, match=r"wanted-.* is damaged .* remove it to start without"):
        asyncio.run(node.newest())
