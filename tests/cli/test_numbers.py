"""No number of an option ends in a traceback: what cannot be meant is a usage error, in a sentence."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from support.commands import Run
from support.tiny_models import Pair
from typer.main import get_command

from converters.cli.merge_command import run_command
from converters.errors import OptionError
from converters.files.sizes import parse_size
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


def numbers(function: Callable[..., None]) -> list[tuple[Any, Any]]:
    """(command, option) of each option that takes a number."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    command, hints = get_command(app), get_type_hints(function)
    return [
        (command, one)
        for one in command.params
        if {hints.get(str(one.name)), *get_args(hints.get(str(one.name)))} & {int, float}
    ]


EVERY = [(function.__name__, *found) for function in COMMANDS for found in numbers(function)]


def test_the_options_are_found() -> None:
    assert len(EVERY) >= 30
    assert {option.opts[0] for _, option in numbers(run_command)} == OF_THE_LIBRARY


@pytest.mark.parametrize(("name", "command", "option"), EVERY)
def test_numbers_that_cannot_be_meant(name: str, command: Any, option: Any) -> None:
    context = typer.Context(command)
    for text in WRONG:
        with pytest.raises(typer.BadParameter):
            option.process_value(context, text)
    with suppress(typer.BadParameter):
        assert math.isfinite(option.process_value(context, "0"))


@pytest.mark.parametrize("text", ["0", "-1GB", "nan", "infGB", "1e9GB", "9" * 400 + "GB", "0B", "1", "0.5B", ""])
def test_sizes_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(OptionError, match="is not a valid size; expected something like 5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scaling nan", "nan"),
        ("--scaling inf", "inf"),
        ("--format lora --rank 0", "--rank 0 is not a rank"),
        ("--format lora --rank -1", "--rank -1 is not a rank"),
        ("--format lora --rank 2 --max-error nan", "is not a relative error"),
        ("--format lora --rank 2 --max-error inf", "is not a relative error"),
        ("--format onnx --opset 0", "--opset 0 is older than what torch writes"),
        ("--format onnx --opset 1" + "0" * 40, "cannot be run by ONNX Runtime"),
        ("--max-shard-size 0", "'0' is not a valid size"),
        ("--max-shard-size " + "9" * 400 + "GB", "is not a valid size"),
    ],
)
def test_what_the_library_says(pair: Pair, tmp_path: Path, run_here: Run, options: str, message: str) -> None:
    command = ("peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "-o", tmp_path / "out")
    done = run_here(*command, *options.split())
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("classify . --timeout inf", "Invalid value for '--timeout'"),
        ("classify . --max-delay nan", "Invalid value for '--max-delay'"),
        ("classify . --max-body 0", "'0' is not a valid size"),
        ("deploy --classify . --batch-wait inf", "Invalid value for '--batch-wait'"),
        ("deploy --classify . --batch-wait nan", "Invalid value for '--batch-wait'"),
        ("deploy --classify . --max-body 0", "'0' is not a valid size"),
        ("deploy --classify . --max-body base", "--max-body is base; expected a size like 16MiB"),
        ("deploy --classify . --cpus-per-replica inf", "Invalid value for '--cpus-per-replica'"),
        ("deploy --base . --adapters . --gpus-per-replica nan", "Invalid value for '--gpus-per-replica'"),
        ("size --base . --adapters . --gpu-memory-utilization nan", "Invalid value for '--gpu-memory-util"),
        ("--base . --adapters . --drain-timeout nan", "Invalid value for '--drain-timeout'"),
        ("--base . --adapters . --max-queue 0", "Invalid value for '--max-queue'"),
        ("--base . --adapters . --admin-port 65536", "Invalid value for '--admin-port'"),
    ],
)
def test_what_a_command_says(run_here: Run, command: str, message: str) -> None:
    done = run_here("peanut-serve", *command.split())
    told = " ".join(done.stderr.replace("│", " ").split())
    assert done.returncode == (2 if message.startswith("Invalid") else 1)
    assert message in told
    assert "Traceback" not in told
