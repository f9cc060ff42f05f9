"""The canary set of a version: prompts, and the properties that are expected of the answers to them."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from converters.errors import OptionError
from peanut_serve.errors import VariantError
from peanut_serve.settings.small_file import read_small

FILE = "canary.json"  # in the folder of an adapter or of a merged model
_MOST_BYTES = 64 << 10

_Texts = list[str]


class _Written(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CanaryMessage(_Written):
    """A message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class CanaryPrompt(_Written):
    """A prompt, and what its greedy answer has to be like. That it is answered at all is always expected.

    Attributes:
        prompt: a text to complete.
        messages: a chat, instead of a text.
        max_tokens: length at which the answer is cut.
        contains: texts that are in the answer.
        not_contains: texts that are not.
        matches: a regular expression of Python's that is found in the answer.
        valid_json: whether the answer, without space around it, is JSON.
        ends: whether the answer ends before it is cut.
    """

    prompt: str | None = None
    messages: list[CanaryMessage] | None = Field(None, min_length=1)
    max_tokens: int = Field(64, ge=1, le=1024)
    contains: _Texts = []
    not_contains: _Texts = []
    matches: str | None = Field(None, max_length=500)
    valid_json: bool = False
    ends: bool = False

    @model_validator(mode="after")
    def _check(self) -> "CanaryPrompt":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected either prompt or messages")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"matches is not a regular expression: {error}") from None
        return self

    @property
    def text(self) -> str:
        """What is asked, for people."""
        return self.prompt if self.prompt is not None else (self.messages or [])[-1].content

    def request(self, model: str) -> tuple[str, dict[str, Any]]:
        """The route to ask, and the body of the request."""
        body: dict[str, Any] = {"model": model, "max_tokens": self.max_tokens, "temperature": 0, "stream": True}
        if self.messages is None:
            return "/v1/completions", {**body, "prompt": self.prompt}
        return "/v1/chat/completions", {**body, "messages": [one.model_dump() for one in self.messages]}


class CanarySet(_Written):
    """The contents of canary.json.

    Attributes:
        prompts: asked one after another.
        same_as_current: the share of prompts that the current version has to answer in the same words.
    """

    prompts: list[CanaryPrompt] = Field(min_length=1, max_length=64)
    same_as_current: float = Field(0.0, ge=0, le=1)


def read_canary_set(folder: Path) -> CanarySet | None:
    """The canary set in the folder of a version; None if there is none. Raises `VariantError` if it is not valid."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        text = read_small(file, _MOST_BYTES, str(file), "; shorten the canary set")
    except OptionError as error:
        raise VariantError(str(error)) from None
    try:
        return CanarySet.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise VariantError(f"{file} is not a canary set: {place}: {first['msg'].lower()}") from None
    except (ValueError, RecursionError) as error:
        raise VariantError(f"{file} is not JSON: {error}") from None
