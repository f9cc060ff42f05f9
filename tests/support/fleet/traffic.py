"""Clients of a fleet that ask without pause, and know which tokens only the right weights say."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

SILENCE = 300.0  # seconds after which a request counts as never answered
TOKENS = 6


@dataclass(frozen=True)
class Truth:
    """What each variant answers.

    Attributes:
        prompts: prompts of token ids.
        tokens: for every name in `model`, the answer to each prompt, by its index.
    """

    prompts: Sequence[list[int]]
    tokens: Mapping[str, Mapping[int, list[int]]]


class Traffic:
    """Many clients; half of their requests stream.

    `outcomes` counts right answers, errors by status, `event` for streams that ended with an error event, and
    `broken` for connections that were cut visibly. Everything else ends the traffic: other tokens than the truth, an
    end of a stream that is neither `[DONE]` nor an error, a request that never ends.
    """

    def __init__(self, url: str, truth: Truth, may_break: bool = False) -> None:
        self.url, self.truth, self.may_break = url, truth, may_break
        self.outcomes = Counter[str]()
        self.asked = 0
        self._over = False
        self._clients: list[asyncio.Task[None]] = []

    def start(self, clients: int) -> None:
        """Within an event loop."""
        self._clients = [asyncio.create_task(self._ask_for_ever(number)) for number in range(clients)]

    async def stop(self) -> None:
        """Let every client finish its request; raises what one has found wrong."""
        self._over = True
        await asyncio.gather(*self._clients)
        assert self.asked == self.outcomes.total(), "a request ended without an outcome"

    async def until(self, what: str, is_so: Callable[[], bool], within: float) -> None:
        """Wait until something is so; raises what a client has found wrong, or if it takes too long."""
        deadline = time.monotonic() + within
        while not await asyncio.to_thread(is_so):
            for client in self._clients:
                if client.done():
                    client.result()
            assert time.monotonic() < deadline, f"not within {within:.0f} s: {what} ({dict(self.outcomes)})"
            await asyncio.sleep(0.1)

    async def until_right(self, count: int, within: float) -> None:
        """Wait for `count` more right answers."""
        wanted = self.outcomes["right"] + count
        await self.until(f"{count} right answers", lambda: self.outcomes["right"] >= wanted, within)

    async def _ask_for_ever(self, number: int) -> None:
        generator = random.Random(number)
        async with httpx.AsyncClient(base_url=self.url, timeout=httpx.Timeout(SILENCE, connect=30)) as client:
            while not self._over:
                name = generator.choice(sorted(self.truth.tokens))
                prompt = generator.choice(sorted(self.truth.tokens[name]))
                self.asked += 1
                try:
                    async with asyncio.timeout(SILENCE):
                        outcome = await self._ask(client, name, prompt, streams=generator.random() < 0.5)
                except TimeoutError:
                    raise AssertionError(f"a request for {name} was neither answered nor refused") from None
                except httpx.TransportError as error:
                    assert self.may_break, repr(error)
                    outcome = "broken"
                self.outcomes[outcome] += 1
                if outcome != "right":
                    await asyncio.sleep(0.2)

    async def _ask(self, client: httpx.AsyncClient, name: str, prompt: int, streams: bool) -> str:
        body = {"model": name, "prompt": self.truth.prompts[prompt], "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True, "stream": streams}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            text = (await answer.aread()).decode()
        if answer.status_code != 200:
            assert answer.status_code in (429, 500, 502, 503, 504), (answer.status_code, text)
            return str(answer.status_code)
        tokens = streamed_tokens(text) if streams else _tokens(json.loads(text))
        if tokens is None:
            return "event"
        assert tokens == self.truth.tokens[name][prompt], (name, prompt, tokens)
        return "right"


def streamed_tokens(text: str) -> list[int] | None:
    """The tokens of a whole stream, or None if an error ends it. Any other end is not one.

    After the error of an engine that died, vLLM ends the stream as any other.
    """
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events, "a stream without any event"
    if events[-1] != "[DONE]":
        assert "error" in json.loads(events[-1]), f"a stream was cut after {events[-1]}"
        return None
    found = [json.loads(event) for event in events[:-1]]
    if found and "error" in found[-1]:
        return None
    return [token for body in found for token in _tokens(body)]


def _tokens(body: dict[str, Any]) -> list[int]:
    return [token for choice in body["choices"] for token in choice["token_ids"] or ()]
