"""Errors of the library name parameters (`force_base=`); a command names its flags (`--force-base`)."""

import re

_WITH_VALUES = (
    *("base", "adapter", "layout", "scaling", "revision", "adapter_revision", "token", "labels"),
    *("output", "format", "dtype", "device", "max_shard_size", "repo_id", "branch", "plot"),
    *("rank", "max_error", "runtime"),
    *("opset", "quantize", "eval_data"),
)
_SWITCHES = (
    *("force_base", "stream", "overwrite", "each", "share", "resume", "full", "private"),
    *("transformersjs", "swappable", "self_merging", "interpolate_pos_encoding"),
)
# parameters whose flag has another name
_RENAMED = {"branch": "--push-revision", "repo_id": "--push-to-hub", "runtime": "--for"}
FLAGS = {name: _RENAMED.get(name, f"--{name.replace('_', '-')}") for name in (*_WITH_VALUES, *_SWITCHES)}

# `stream=`, `force_base=True`, `opset=17`, `format='lora'`, as words of their own: a path may have a = in it, too
_PARAMETER = re.compile(
    rf"""(?<![^\s(])(?:
        (?P<name>{"|".join(_WITH_VALUES)})=
            (?:'(?P<text>[^']*)' | (?P<number>-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?!\.?\w) | (?=[\s,;:.)]|$))
        | (?P<switch>{"|".join(_SWITCHES)})=(?:True\b | (?=[\s,;:.)]|$))
    )""",
    re.VERBOSE,
)


def in_flags(message: str) -> str:
    """A message with the names of flags instead of the names of parameters."""

    def flag(found: re.Match[str]) -> str:
        value = found["text"] or found["number"]
        return FLAGS[found["name"] or found["switch"]] + (f" {value}" if value else "")

    return _PARAMETER.sub(flag, message)
