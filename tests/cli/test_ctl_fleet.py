"""`peanut-serve ctl` against what a fleet answers; tests/ray/test_operating.py has a fleet."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import Response
from support.server.admin import FakeControl, serving_app

from peanut_serve.cli.ctl import command as ctl_command
from peanut_serve.ray.fleet.joint import joint_engine, joint_variants
from peanut_serve.ray.fleet_admin import of_all

Ctl = Callable[..., tuple[int, str, str]]


class Replicas:
    """What two replicas have of the variant `v`, and how they answer changes."""

    def __init__(self) -> None:
        self.digests, self.change = ["a1" * 20, "a1" * 20], [200, 200]

    def entries(self, answers: list[Any]) -> list[dict[str, Any]]:
        pairs = zip(("one", "two"), answers, strict=True)
        return [{"replica": name, "status": 200, "answer": answer} for name, answer in pairs]

    def variants(self) -> list[dict[str, Any]]:
        control = FakeControl()
        control.names = ["v"]
        found = [[control.variant("v").model_copy(update={"digest": digest}).model_dump()] for digest in self.digests]
        return [one.model_dump(mode="json") for one in joint_variants(self.entries(found))]

    def variant(self) -> dict[str, Any]:
        return self.variants()[0]

    def engine(self) -> dict[str, Any]:
        return joint_engine(self.entries([FakeControl().engine().model_dump()] * 2)).model_dump(mode="json")

    def changed(self) -> Response:
        answers = {
            200: {"name": "v", "digest": "a1" * 20},
            422: {"error": {"type": "VariantError", "message": "broken"}},
        }
        entries = self.entries([answers[status] for status in self.change])
        return of_all([entry | {"status": status} for entry, status in zip(entries, self.change, strict=True)])


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def ctl(replicas: Replicas, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Ctl]:
    app = FastAPI()
    app.add_api_route("/admin/v1/variants", replicas.variants)
    app.add_api_route("/admin/v1/variants/v", replicas.variant)
    app.add_api_route("/admin/v1/engine", replicas.engine)
    app.add_api_route("/admin/v1/variants/v/reload", replicas.changed, methods=["POST"], response_model=None)
    app.add_api_route("/admin/v1/variants/v", replicas.changed, methods=["DELETE"], response_model=None)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            ctl_command.main(list(arguments))
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    monkeypatch.setenv("PEANUT_ADMIN_KEY", "key")
    with serving_app(app) as url:
        monkeypatch.setenv("PEANUT_ADMIN_URL", url)
        yield call


def test_replicas_that_agree(ctl: Ctl) -> None:
    code, out, err = ctl("list")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[-1] == "REPLICAS"
    assert " ".join(out.splitlines()[1].split()) == "v adapter ready 2 4 60 5.00 GB 0.12 s 2 of 2"
    code, out, _ = ctl("show", "v")
    assert code == 0
    assert {"one", "two"} < {line.split()[0] for line in out.splitlines()}
    code, out, _ = ctl("engine")
    assert code == 0
    assert "host cache limit 40.00 GB" in [" ".join(line.split()) for line in out.splitlines()]
    assert ctl("reload", "v") == (0, f"v: 2 of 2 replicas, digest {'a1' * 20}\n", "")
    assert ctl("unregister", "v")[0] == 0
    assert [one["replica"] for one in json.loads(ctl("show", "v", "--json")[1])["replicas"]] == ["one", "two"]


@pytest.mark.parametrize("command", [("list",), ("show", "v"), ("list", "--json"), ("show", "v", "--json")])
def test_replicas_with_different_versions(ctl: Ctl, replicas: Replicas, command: tuple[str, ...]) -> None:
    replicas.digests[1] = "b2" * 20
    code, out, err = ctl(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert "b2" * 20 in out or "2 of 2, differ" in out
    assert "versions differ: one has a1a1a1a1a1a1, two has b2b2b2b2b2b2" in err


def test_a_change_that_one_replica_refuses(ctl: Ctl, replicas: Replicas) -> None:
    replicas.change[1] = 422
    code, out, err = ctl("reload", "v")
    assert code == 1
    assert out.splitlines()[0] == f"v: 1 of 2 replicas, digest {'a1' * 20}"
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [["one", "200"], ["two", "422"]]
    assert err.endswith("the replicas do not agree: 1 of 2 replicas did not make the change: two: broken\n")


def test_a_change_that_all_replicas_refuse(ctl: Ctl, replicas: Replicas) -> None:
    replicas.change = [422, 422]
    assert ctl("reload", "v") == (1, "", "peanut-serve ctl: broken\n")
