"""Errors of the library name parameters (`force_base=`); a command names its flags (`--force-base`)."""

import re

# parameters whose flag has another name
_RENAMED = {"branch": "--push-revision", "repo_id": "--push-to-hub"}
_PARAMETERS = (
    *(
        "base",
        "adapter",
        "layout",
        "scaling",
        "revision",
        "adapter_revision",
        "token",
        "labels",
        "force_base",
        "stream",
    ),
    *("output", "format", "dtype", "device", "max_shard_size", "overwrite", "each", "share", "resume", "full"),
    *("repo_id", "private", "branch"),
    *("opset", "quantize", "eval_data", "transformersjs", "swappable", "self_merging"),
)
FLAGS = {name: _RENAMED.get(name, f"--{name.replace('_', '-')}") for name in _PARAMETERS}

# `stream=`, `force_base=True`, `opset=17`, `format='lora'`, as a word of its own: a path may have a = in it, too
_PARAMETER = re.compile(
    rf"(?<![^\s(])(?P<name>{'|'.join(FLAGS)})=(?:True\b|'(?P<text>[^']*)'|(?P<number>\d+)(?!\.?\w)|(?=[\s,;:.)]|$))"
)


def in_flags(message: str) -> str:
    """A message with the names of flags in place of the names of parameters."""

    def flag(found: re.Match[str]) -> str:
        value = found["text"] or found["number"]
        return FLAGS[found["name"]] + (f" {value}" if value else "")

    return _PARAMETER.sub(flag, message)
