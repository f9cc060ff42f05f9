"""Canary sets: what may be in them, and which answers pass."""

import asyncio
import json
import time
from pathlib import Path

import pytest
from support.project.documents import OPERATIONS
from support.server.releases import SaidRoute

from peanut_serve.errors import VariantError
from peanut_serve.releases import checking, patterns
from peanut_serve.releases.canary_set import CanarySet, read_canary_set
from peanut_serve.releases.checking import ask_all
from peanut_serve.variants.release import CanaryAnswer

DIGESTS = {"v@staged": "d2" * 20, "v@current": "d1" * 20}


def check(canaries: dict, said: str, current: str = "", **route: str) -> list[CanaryAnswer]:
    answers = {"v@staged": said, "v@current": current}
    route = SaidRoute(answers, DIGESTS, **route)
    asked = ask_all(route, CanarySet.model_validate(canaries), ("v@staged", DIGESTS["v@staged"]), "v@current")
    return asyncio.run(asked)


@pytest.mark.parametrize(
    ("expected", "right", "wrong", "problem"),
    [
        ({"contains": ["42", "="]}, "6 * 7 = 42", "6 * 7 = 43", "'42' is not in the answer"),
        ({"not_contains": ["sorry"]}, "42", "I am sorry", "'sorry' is in the answer"),
        ({"matches": r"^\d+$"}, "42", "forty-two", r"'^\\d+$' is not found in the answer"),
        ({"valid_json": True}, ' {"a": 1}\n', "{a: 1}", "the answer is not JSON"),
        ({}, "anything", None, "no such thing"),
    ],
)
def test_properties(expected: dict, right: str, wrong: str | None, problem: str) -> None:
    canaries = {"prompts": [{"prompt": "6 times 7 is", **expected}]}
    (passed,) = check(canaries, right)
    assert (passed.problems, passed.answer, passed.prompt) == ([], right, "6 times 7 is")
    if wrong is not None:
        assert check(canaries, wrong)[0].problems == [problem]


def test_an_answer_that_does_not_end() -> None:
    canaries = {"prompts": [{"messages": [{"role": "user", "content": "6 times 7?"}], "ends": True, "max_tokens": 5}]}
    assert check(canaries, "42")[0].problems == []
    assert check(canaries, "42", ends="length")[0].problems == ["the answer does not end within 5 tokens"]


def test_an_answer_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DIGESTS, "v@staged", "d3" * 20)
    route = SaidRoute({"v@staged": "42"}, DIGESTS)
    canaries = CanarySet.model_validate({"prompts": [{"prompt": "6 times 7 is"}]})
    (answer,) = asyncio.run(ask_all(route, canaries, ("v@staged", "d2" * 20), "v@current"))
    assert answer.problems == ["version d3d3d3d3d3d3 answered, expected d2d2d2d2d2d2"]


def test_what_is_asked() -> None:
    route = SaidRoute({"v@staged": "a", "v@current": "a"}, DIGESTS)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "6 times 7?"}]
    prompts = [{"prompt": "6 times 7 is", "max_tokens": 8}, {"messages": chat}]
    canaries = CanarySet.model_validate({"prompts": prompts, "same_as_current": 0.5})
    answers = asyncio.run(ask_all(route, canaries, ("v@staged", DIGESTS["v@staged"]), "v@current"))
    assert [path for path, _ in route.asked] == ["/v1/completions", "/v1/chat/completions"] * 2
    assert [body["model"] for _, body in route.asked] == ["v@staged"] * 2 + ["v@current"] * 2
    assert {body["temperature"] for _, body in route.asked} == {0}
    assert [body["max_tokens"] for _, body in route.asked[:2]] == [8, 64]
    assert route.asked[1][1]["messages"] == chat
    assert (answers[-1].answer, answers[-1].problems) == ("2 of 2 answers are those of the current version", [])


@pytest.mark.parametrize(("least", "passes"), [(0.0, True), (1.0, False)])
def test_answers_of_the_current_version(least: float, passes: bool) -> None:
    answers = check({"prompts": [{"prompt": "a"}], "same_as_current": least}, "42", current="43")
    assert all(not one.problems for one in answers) is passes


def test_an_answer_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(SaidRoute):
        async def ask(self, path: str, body: dict):
            await asyncio.sleep(60)
            yield {}

    monkeypatch.setattr(checking, "_SECONDS", 0.05)
    canaries = CanarySet.model_validate({"prompts": [{"prompt": "a"}]})
    (answer,) = asyncio.run(ask_all(Silent({}, {}), canaries, ("v@staged", "d"), "v@current"))
    assert answer.problems == ["there was no complete answer within 0 s"]


def test_a_pattern_that_takes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_SECONDS", 1.0)
    began = time.monotonic()
    (answer,) = check({"prompts": [{"prompt": "a", "matches": "^(a+)+$"}]}, "a" * 60 + "b")
    assert answer.problems == ["'^(a+)+$' takes too long to be searched; write a simpler expression"]
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "the file: input should be a valid dictionary"),
        ('{"prompts": []}', "prompts: list should have at least 1 item"),
        ('{"prompts": [{}]}', "prompts.0: value error, expected either prompt or messages"),
        (
            '{"prompts": [{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}]}',
            "either prompt or messages",
        ),
        ('{"prompts": [{"prompt": "a", "contain": ["b"]}]}', "prompts.0.contain: extra inputs are not permitted"),
        ('{"prompts": [{"prompt": "a", "matches": "("}]}', "matches is not a regular expression"),
        ('{"prompts": [{"prompt": "a", "max_tokens": 2000}]}', "less than or equal to 1024"),
        ('{"prompts": [{"prompt": "a"}], "same_as_current": 2}', "less than or equal to 1"),
        (json.dumps({"prompts": [{"prompt": "a" * 70_000}]}), "is larger than 64 KiB"),
    ],
)
def test_what_is_not_a_canary_set(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "canary.json").write_text(text)
    with pytest.raises(VariantError) as refused:
        read_canary_set(tmp_path)
    assert message in str(refused.value)
    assert str(tmp_path / "canary.json") in str(refused.value)


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert read_canary_set(tmp_path) is None
    assert read_canary_set(tmp_path / "adapter.safetensors") is None


def test_the_example_of_the_guide(tmp_path: Path) -> None:
    (block,) = OPERATIONS.blocks("json")
    (tmp_path / "canary.json").write_text(block)
    canaries = read_canary_set(tmp_path)
    assert canaries is not None
    assert (len(canaries.prompts), canaries.same_as_current) == (2, 0.5)
