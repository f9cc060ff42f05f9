"""What an operator is told of a change that went to all replicas; test_fleet.py has real ones."""

import json
from typing import Any

import pytest

from peanut_serve.ray.fleet_admin import of_all

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
    assert json.loads(bytes(answer.body)) == {"agree": agree, "replicas": entries}


def test_without_a_replica_nothing_was_changed() -> None:
    assert of_all([]).status_code == 503
