"""The formats. Adding one is one file or folder beside this file, and one row here."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from converters.errors import OptionError
from converters.outputs.base import Format


@dataclass(frozen=True)
class FormatRow:
    """What has to be known of a format before its module is imported.

    Attributes:
        name: what `format=` and the manifest call it.
        module: the module below `converters.outputs` that holds it, as `FORMAT`.
        summary: what is written, for help texts.
        takes: the options it takes, of those that not every format takes.
        auto_dtype: what the dtype `auto` stands for.
        joins_outputs: with `each=`, it can still write a single folder.
    """

    name: str
    module: str
    summary: str
    takes: frozenset[str] = frozenset()
    auto_dtype: str = "auto"
    joins_outputs: bool = False

    def load(self) -> Format[Any, Any]:
        """The format itself; imports its module."""
        found: Format[Any, Any] = import_module(f"converters.outputs.{self.module}").FORMAT
        return found

    def dtype(self, asked: str) -> str:
        """The dtype to plan with."""
        return self.auto_dtype if asked == "auto" else asked

    def check_options(self, given: Iterable[str]) -> None:
        """Raise `OptionError` if one of the options, all of them of some format, is not for this one."""
        for name in given:
            if name not in self.takes:
                others = _joined([f"format={row.name!r}" for row in FORMATS.values() if name in row.takes])
                raise OptionError(f"{name}= is for {others}, not for format={self.name!r}")


_ONNX_OPTIONS = (
    "each", "share", "opset", "quantize", "eval_data", "interpolate_pos_encoding", "transformersjs", "swappable",
    "self_merging",
)  # fmt: skip
_ROWS = (
    FormatRow("merged", "checkpoint.format", "a checkpoint", frozenset({"each", "share", "resume", "stream"})),
    FormatRow(
        "onnx",
        "onnx.format",
        "ONNX graphs",
        frozenset(_ONNX_OPTIONS),
        auto_dtype="fp32",
        joins_outputs=True,
    ),
    FormatRow("lora", "lora.format", "a LoRA adapter", frozenset({"rank", "max_error", "runtime"})),
    FormatRow("peft", "peft_format", "a PEANuT adapter of HF PEFT"),
)
FORMATS = {row.name: row for row in _ROWS}


def find_format(name: str) -> FormatRow:
    """The row of a format. Raises `OptionError` for an unknown name."""
    if name not in FORMATS:
        raise OptionError(f"format={name!r} is unknown; expected {_joined(list(FORMATS))}")
    return FORMATS[name]


def format_summaries() -> str:
    """All formats, for help texts."""
    return _joined([f"{row.name} ({row.summary})" for row in FORMATS.values()])


def _joined(names: list[str]) -> str:
    return " or ".join([part for part in (", ".join(names[:-1]), names[-1]) if part])
