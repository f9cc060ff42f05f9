"""One prompt, answered by two or three variants side by side."""

import asyncio
import difflib
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from converters.errors import PeanutError
from peanut_serve.web.console.data_route import DataRoute, Head, RouteError
from peanut_serve.web.schema import Control

_LONGEST_SECONDS = 300.0  # of one answer, its swap included
_FAREWELL_SECONDS = 10.0  # for answers that nobody reads any more to be given up
_MOST_QUEUED = 64
_MOST_COMPARED = 400_000  # pairs of words; the worst of them take 3 s
# how an answer is computed, in the header of its response -> as people read it
_PATHS = {"base": "base weights", "merged": "merged", "lora": "LoRA"}

Event = dict[str, Any]


class Trial(BaseModel):
    """What to ask, and whom.

    Attributes:
        prompt: the text.
        variants: names.
        max_tokens: of each answer.
        temperature: 0 for the likeliest tokens.
        chat: ask as a message of a chat, with the base's template; else as a text to complete.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(min_length=1, max_length=32768)
    variants: list[str] = Field(min_length=1, max_length=3)
    max_tokens: int = Field(128, ge=1, le=2048)
    temperature: float = Field(0.0, ge=0, le=2)
    chat: bool = True

    def body(self, name: str) -> tuple[str, Event]:
        """The route and the body of the request to one variant."""
        options: Event = {"model": name, "max_tokens": self.max_tokens, "temperature": self.temperature}
        options["stream"] = True
        if self.chat:
            return "/v1/chat/completions", {**options, "messages": [{"role": "user", "content": self.prompt}]}
        return "/v1/completions", {**options, "prompt": self.prompt}


async def compare(route: DataRoute, control: Control, trial: Trial) -> AsyncIterator[Event]:
    """What the variants answer, event by event; each has the index of its variant as `of`.

    `start` has digest and path, `text` a part of an answer, `end` the times, `error` a sentence. `diff`, at last, has
    the differences of each complete answer from the first.
    """
    queue: asyncio.Queue[Event] = asyncio.Queue(_MOST_QUEUED)
    answers, failed = ["" for _ in trial.variants], set[int]()
    tasks = [asyncio.create_task(_answer(route, control, trial, i, queue)) for i in range(len(answers))]
    try:
        open_answers = len(answers)
        while open_answers:
            event = await queue.get()
            if event["event"] == "text":
                answers[event["of"]] += event["text"]
            if event["event"] == "error":
                failed.add(event["of"])
            open_answers -= event["event"] in ("end", "error")
            yield event
        complete = [index for index in range(len(answers)) if index not in failed]
        for index in complete[1:] if 0 in complete else ():
            # in a thread, as the loop is that of the server of completions
            parts = await asyncio.to_thread(difference, answers[0], answers[index])
            yield {"of": index, "event": "diff", "parts": parts}
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_FAREWELL_SECONDS)


async def _answer(route: DataRoute, control: Control, trial: Trial, of: int, queue: "asyncio.Queue[Event]") -> None:
    try:
        end = await asyncio.wait_for(_stream(route, control, trial, of, queue), _LONGEST_SECONDS)
    except (RouteError, PeanutError) as error:
        end = {"event": "error", "message": str(error)}
    except asyncio.TimeoutError:
        end = {"event": "error", "message": f"there was no complete answer within {_LONGEST_SECONDS:.0f} s"}
    except Exception as error:
        end = {"event": "error", "message": f"unexpected {type(error).__name__}; see the server's log"}
    await queue.put({"of": of, **end})


async def _stream(route: DataRoute, control: Control, trial: Trial, of: int, queue: "asyncio.Queue[Event]") -> Event:
    """Put an answer into the queue; its end, with the times."""
    name = trial.variants[of]
    control.variant(name)  # one that there is not is refused in the control's words
    start, first = time.perf_counter(), None
    path, body = trial.body(name)
    async with aclosing(route.ask(path, body)) as events:
        async for event in events:
            if isinstance(event, Head):
                digest = event.headers.get("x-peanut-digest")
                computed = _PATHS.get(event.headers.get("x-peanut-path", ""), "unknown")
                await queue.put({"of": of, "event": "start", "digest": digest, "path": computed})
            elif text := _text(event):
                first = first if first is not None else time.perf_counter() - start
                await queue.put({"of": of, "event": "text", "text": text})
    return {"event": "end", "first_seconds": first, "seconds": time.perf_counter() - start}


def _text(event: Event) -> str:
    """The text in one event of a stream, of a chat or of a completion."""
    choice: Event = next(iter(event.get("choices") or ()), {})
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def difference(one: str, other: str) -> list[tuple[str, str]]:
    """How to get from one text to another: parts that are the `same`, `gone` or `new`, word by word.

    Between the words that both begin and end with, texts that are too long to compare are replaced as a whole: where
    a model repeats itself, a comparison takes time that grows with the cube of the length.
    """
    old, new = _words(one), _words(other)
    head = _alike(old, new)
    tail = _alike(old[head:][::-1], new[head:][::-1])
    first, last = old[:head], old[len(old) - tail :]
    old, new = old[head : len(old) - tail], new[head : len(new) - tail]
    parts = [("same", "".join(first))]
    opcodes = [("replace", 0, len(old), 0, len(new))]
    if len(old) * len(new) <= _MOST_COMPARED:
        opcodes = list(difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes())
    for kind, i, j, k, m in opcodes:
        gone, fresh = "".join(old[i:j]), "".join(new[k:m])
        parts += [("same", gone)] if kind == "equal" else [("gone", gone), ("new", fresh)]
    return [(what, text) for what, text in [*parts, ("same", "".join(last))] if text]


def _alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many words both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _words(text: str) -> Sequence[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)
