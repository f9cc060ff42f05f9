"""No number of an option ends in a traceback: what cannot be meant is a usage error, in a sentence."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from support.commands import Run
from typer.main import get_command

from converters.cli.merge_command import run_command
from converters.errors import OptionError
from converters.files.sizes import parse_size
from peanut_serve.cli import ctl_command, state_command
from peanut_serve.cli.classify_command import _classify
from peanut_serve.cli.deploy_classifiers import deploy_classifiers
from peanut_serve.cli.deploy_command import _deploy
from peanut_serve.cli.main import _serve
from peanut_serve.cli.predict_command import _predict
from peanut_serve.cli.size_command import _size

COMMANDS = (_serve, _classify, _deploy, deploy_classifiers, _predict, _size)
WRONG = ("nan", "inf", "-inf", "-1", "1e308", "1" + "0" * 400, "x")
# checked by the library, whose errors name them; see tests/outputs
OF_THE_LIBRARY = {"--scaling", "--rank", "--max-error", "--opset"}


def command_of(function: Any) -> Any:
    app = typer.Typer()
    app.command()(function)
    return get_command(app)


def numbers(command: Any) -> Iterator[Any]:
    """The options that take a number, by what their default or their help says of their type."""
    for option in command.params:
        if option.type.name.partition(" ")[0].removesuffix("range").strip() in ("integer", "float", "int"):
            yield option


def every_number() -> list[tuple[str, Any, Any]]:
    commands = {function.__name__: command_of(function) for function in COMMANDS}
    commands |= {f"ctl {name}": one for name, one in get_command(ctl_command.app).commands.items()}  # type: ignore[attr-defined]
    commands |= {f"state {name}": one for name, one in get_command(state_command.app).commands.items()}  # type: ignore[attr-defined]
    return [(name, command, option) for name, command in commands.items() for option in numbers(command)]


def test_the_options_are_found() -> None:
    assert len(every_number()) >= 30
    assert {option.opts[0] for option in numbers(command_of(run_command))} == OF_THE_LIBRARY


@pytest.mark.parametrize(("name", "command", "option"), every_number())
def test_numbers_that_cannot_be_meant(name: str, command: Any, option: Any) -> None:
    context = typer.Context(command)
    for text in WRONG:
        with pytest.raises(typer.BadParameter):
            option.process_value(context, text)
    try:
        assert math.isfinite(option.process_value(context, "0"))
    except typer.BadParameter:
        pass


@pytest.mark.parametrize("text", ["0", "-1GB", "nan", "infGB", "1e9GB", "9" * 400 + "GB", "0B", "1", "0.5B", ""])
def test_sizes_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(OptionError, match="is not a valid size; expected something like 5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("classify . --timeout inf", "inf"),
        ("classify . --max-delay nan", "nan is not a finite number"),
        ("classify . --max-body 0", "'0' is not a valid size"),
        ("deploy --classify . --batch-wait inf", "inf"),
        ("deploy --classify . --batch-wait nan", "nan is not a finite number"),
        ("deploy --classify . --max-body 0", "'0' is not a valid size"),
        ("deploy --classify . --max-body base", "--max-body is base; expected a size like 16MiB"),
        ("deploy --classify . --cpus-per-replica inf", "inf"),
        ("deploy --base . --adapters . --gpus-per-replica nan", "nan is not a finite number"),
        ("size --base . --adapters . --gpu-memory-utilization nan", "nan is not a finite number"),
        ("--base . --adapters . --drain-timeout nan", "nan is not a finite number"),
        ("--base . --adapters . --max-queue 0", "0 is not in the range"),
        ("--base . --adapters . --admin-port 65536", "65536 is not in the range"),
    ],
)
def test_what_a_command_says(run_here: Run, command: str, message: str) -> None:
    done = run_here("peanut-serve", *command.split())
    told = " ".join(done.stderr.replace("│", " ").split())
    assert (done.returncode in (1, 2), "Traceback" in told) == (True, False), told
    assert message in told
