"""Options of `peanut-serve` from a file and from the environment.

The command line goes before the environment, which goes before the file. A key of the file that is not an option is
refused, with the name that was probably meant.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
import yaml  # type: ignore[import-untyped]

from converters.cli import console
from converters.errors import OptionError

PREFIX = "PEANUT_"
VLLM = "vllm"  # the section with the options of vLLM
_BELONGS = f"options of vLLM belong below {VLLM}:"

# what is done once, not configured
_NOT_CONFIGURED = ("config", "check", "dry_run", "version", "help", "api_key")
# variables with this prefix that are no options
_OTHER_VARIABLES = ("ADMIN_KEY", "ADMIN_URL", "ADMIN_CA_FILE", "BEHIND_FRONT", "DEVICE", "SERVER_SETTINGS")
_OF_KUBERNETES = "tcp://"  # it sets PEANUT_PORT in every pod if there is a service with the name peanut
# options of vLLM that may not be in a file, and why
_NOT_IN_A_FILE = {
    "model": "the model is --base",
    "model-tag": "the model is --base",
    "api-key": "a key does not belong in a configuration; name its file as api-key-file",
    "hf-token": "a token does not belong in a configuration; set HF_TOKEN",
}


def use_configuration(context: typer.Context, file: Path | None) -> Path | None:
    """The callback of --config: make the options of the file and of the environment the defaults of the command.

    Raises `OptionError` for a file that cannot be read, and for anything in it that is not an option.
    """
    options = settable(context.command)
    values, vllm = _in_file(file, options) if file is not None else ({}, [])
    context.default_map = {**values, **_in_environment(options, os.environ)}
    context.meta[VLLM] = vllm
    return file


def use_own_configuration(context: typer.Context, file: Path | None) -> Path | None:
    """The same for a command that starts no vLLM. Raises as `use_configuration`, and for options of vLLM."""
    use_configuration(context, file)
    if context.meta[VLLM]:
        raise OptionError(f"--config {file} has a section {VLLM}, but {context.info_name} starts no vLLM; remove it")
    return file


def settable(command: Any) -> dict[str, Any]:
    """Name, as in a file -> option, of all options of a command of typer that can be configured."""
    return {
        str(option.name).replace("_", "-"): option
        for option in command.params
        if option.name is not None and option.name not in _NOT_CONFIGURED
    }


def variable_of(name: str) -> str:
    """The environment variable of an option."""
    return PREFIX + name.upper().replace("-", "_")


def with_vllm_options(context: typer.Context) -> list[str]:
    """The options of vLLM: those of the command line, and those of the file that it does not have."""
    from peanut_serve.cli.launch import option_names

    given = list(context.args)
    own = option_names(given)
    configured: list[tuple[str, list[str]]] = context.meta.get(VLLM, [])
    return [
        *given,
        *(part for name, parts in configured if not own & {f"--{name}", f"--no-{name}"} for part in parts),
    ]


def _in_file(file: Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
    try:
        found = yaml.safe_load(file.expanduser().read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise OptionError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise OptionError(f"--config {file} is not a mapping; expected lines like base: ./model")
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("_", "-")
        if name == VLLM:
            continue
        option = options.get(name)
        if option is None:
            raise OptionError(f"--config {file} has the unknown key {key}{_meant(name, options)}; {_BELONGS}")
        if str(option.name) in values:
            raise OptionError(f"--config {file} has {name} twice, also as {name.replace('-', '_')}; keep one")
        values[str(option.name)] = _value(f"--config {file}: {key}", option, value)
    return values, list(_vllm(file, found.get(VLLM)))


def _meant(name: str, options: Mapping[str, Any]) -> str:
    close = get_close_matches(name, options, 1)
    return f", probably meant as {close[0]}" if close else ""


def _value(where: str, option: Any, value: Any) -> Any:
    """A value as the command line would have it. Raises `OptionError` if it has another form."""
    if _is_flag(option):
        if not isinstance(value, bool):
            raise OptionError(f"{where} is {value!r}; expected true or false")
        return value
    if _is_list(option):
        return [_text(where, one) for one in (value if isinstance(value, list) else [value])]
    return _text(where, value)


def _is_flag(option: Any) -> bool:
    return bool(getattr(option, "is_flag", False))  # an argument has none


def _is_list(option: Any) -> bool:
    return option.nargs == -1 or bool(getattr(option, "multiple", False))


def _text(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise OptionError(f"{where} is {value!r}; expected one text or number")
    return str(value)


def _vllm(file: Path, section: Any) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of each option of vLLM in a file."""
    if section is None:
        return
    if not isinstance(section, dict):
        raise OptionError(f"--config {file}: {VLLM} is {section!r}; expected its options, as max-model-len: 4096")
    for key, value in section.items():
        name = str(key).replace("_", "-")
        if (why := _NOT_IN_A_FILE.get(name)) is not None:
            raise OptionError(f"--config {file} sets {key} below {VLLM}: {why}")
        yield name, list(_arguments(f"--config {file}: {VLLM}: {key}", name, value))


def _arguments(where: str, name: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield f"--{name}" if value else f"--no-{name}"
        return
    yield f"--{name}"
    if isinstance(value, dict):
        yield json.dumps(value)
    else:
        yield from (_text(where, one) for one in (value if isinstance(value, list) else [value]))


def _in_environment(options: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    by_variable = {variable_of(name): option for name, option in options.items()}
    for variable, text in environment.items():
        option = by_variable.get(variable)
        if option is None:
            _note_misspelt(variable, [*by_variable])
        elif text and not text.startswith(_OF_KUBERNETES):
            values[str(option.name)] = _from_variable(variable, option, text)
    return values


def _from_variable(variable: str, option: Any, text: str) -> Any:
    if _is_flag(option):
        if (value := {"1": True, "true": True, "0": False, "false": False}.get(text.lower())) is None:
            raise OptionError(f"{variable} is {text}; expected 1 or 0")
        return value
    if _is_list(option):
        return [part for part in text.split(os.pathsep) if part]
    return text


def _note_misspelt(variable: str, known: Sequence[str]) -> None:
    name = variable.removeprefix(PREFIX)
    if name == variable or name in _OTHER_VARIABLES:
        return
    if close := get_close_matches(name, [one.removeprefix(PREFIX) for one in known], 1, 0.8):
        console.err.print(f"note: {variable} is not used; did you mean {PREFIX}{close[0]}?", markup=False)
