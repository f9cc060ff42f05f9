"""Asks a version its canary set, by the server's own route, and compares the answers with what is expected."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from peanut_serve.releases.canary_set import CanaryPrompt, CanarySet
from peanut_serve.releases.patterns import is_found
from peanut_serve.variants.release import CanaryAnswer
from peanut_serve.web.console.data_route import Head, RouteError

_SECONDS = 300.0  # for an answer, with a swap and the evaluation of what was evicted
_SHOWN = 500  # characters of a prompt or an answer that are recorded


class Route(Protocol):
    """See `DataRoute`."""

    def ask(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Head | dict[str, Any], None]:
        """The beginning of a streamed answer, then its events."""
        ...


@dataclass(frozen=True)
class Spoken:
    """An answer.

    Attributes:
        text: it.
        digest: of the weights that gave it.
        has_ended: whether it ended by itself.
        error: why there is none.
    """

    text: str = ""
    digest: str | None = None
    has_ended: bool = False
    error: str | None = None


async def ask(route: Route, model: str, prompt: CanaryPrompt) -> Spoken:
    """Ask one prompt; an error is an answer, too."""
    try:
        return await asyncio.wait_for(_ask(route, model, prompt), _SECONDS)
    except RouteError as error:
        return Spoken(error=str(error))
    except asyncio.TimeoutError:
        return Spoken(error=f"there was no complete answer within {_SECONDS:.0f} s")


async def _ask(route: Route, model: str, prompt: CanaryPrompt) -> Spoken:
    text, digest, reason = "", None, None
    path, body = prompt.request(model)
    async with aclosing(route.ask(path, body)) as events:
        async for event in events:
            if isinstance(event, Head):
                digest = event.headers.get("x-peanut-digest")
                continue
            choice: dict[str, Any] = next(iter(event.get("choices") or ()), {})
            text += str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
            reason = choice.get("finish_reason") or reason
    return Spoken(text, digest, reason == "stop")


async def judge(prompt: CanaryPrompt, spoken: Spoken, digest: str) -> CanaryAnswer:
    """Compare an answer with what is expected of it.

    Args:
        prompt: what was asked.
        spoken: the answer.
        digest: of the weights that should have given it.
    """
    problems = [problem async for problem in _problems(prompt, spoken, digest)]
    return CanaryAnswer(prompt=prompt.text[:_SHOWN], answer=spoken.text[:_SHOWN], problems=problems)


async def _problems(prompt: CanaryPrompt, spoken: Spoken, digest: str) -> AsyncGenerator[str, None]:
    if spoken.error is not None:
        yield spoken.error
        return
    if spoken.digest != digest:
        yield f"version {(spoken.digest or 'unknown')[:12]} answered, expected {digest[:12]}"
    for text in prompt.contains:
        if text not in spoken.text:
            yield f"{text!r} is not in the answer"
    for text in prompt.not_contains:
        if text in spoken.text:
            yield f"{text!r} is in the answer"
    if prompt.matches is not None:
        found = await is_found(prompt.matches, spoken.text)
        if found is None:
            yield f"{prompt.matches!r} takes too long to be searched; write a simpler expression"
        elif not found:
            yield f"{prompt.matches!r} is not found in the answer"
    if prompt.valid_json and not _is_json(spoken.text):
        yield "the answer is not JSON"
    if prompt.ends and not spoken.has_ended:
        yield f"the answer does not end within {prompt.max_tokens} tokens"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


async def ask_all(route: Route, canaries: CanarySet, staged: tuple[str, str], current: str) -> list[CanaryAnswer]:
    """Ask a whole set, of one version and then of the other: with merged weights, that takes one swap each.

    Args:
        route: the server's own.
        canaries: the set.
        staged: the name of the new version, and its digest.
        current: the name of the version to compare with.
    """
    name, digest = staged
    spoken = [await ask(route, name, prompt) for prompt in canaries.prompts]
    answers = [await judge(*pair, digest) for pair in zip(canaries.prompts, spoken, strict=True)]
    if canaries.same_as_current:
        others = [await ask(route, current, prompt) for prompt in canaries.prompts]
        answers.append(_compared(spoken, others, canaries.same_as_current))
    return answers


def _compared(spoken: list[Spoken], others: list[Spoken], least: float) -> CanaryAnswer:
    same = sum(one.error is None and one.text == other.text for one, other in zip(spoken, others, strict=True))
    told = f"{same} of {len(spoken)} answers are those of the current version"
    failed = next((f" ({other.error})" for other in others if other.error), "")
    is_enough = same / len(spoken) >= least
    problems = [] if is_enough else [f"{told}, expected at least {least:.0%}{failed}"]
    return CanaryAnswer(prompt="same_as_current", answer=told, problems=problems)
