"""Errors of the library name parameters, those of the commands name flags."""

import re

import pytest
import typer
from support.commands import Run
from support.tiny_models import Pair

from converters import merge
from converters.cli import inspect_command, merge_command
from converters.cli.console import print_shown
from converters.cli.flags import FLAGS, in_flags
from converters.errors import OptionError
from converters.outputs.base import Shown


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("stream= is for a base on the Hub", "--stream is for a base on the Hub"),
        ("pass force_base=True", "pass --force-base"),
        ("opset=17 is too old; not opset=17.", "--opset 17 is too old; not --opset 17."),
        ("scaling=0.25: leave it out", "--scaling 0.25: leave it out"),
        ("scaling=1e-05 applies to none", "--scaling 1e-05 applies to none"),
        ("not for format='lora'", "not for --format lora"),
        ("it is public; leave out private=", "it is public; leave out --private"),
        ("(see quantize=)", "(see --quantize)"),
        ("branch= needs repo_id=", "--push-revision needs --push-to-hub"),
        ("/tmp/dtype=fp16/x is not there", "/tmp/dtype=fp16/x is not there"),
        ("--adapter share=0.5: no weight", "--adapter share=0.5: no weight"),
        ("the adapter has r = 4, scaling = 0.5", "the adapter has r = 4, scaling = 0.5"),
        ("unstream= and my_dtype= are others'", "unstream= and my_dtype= are others'"),
    ],
)
def test_in_flags(message: str, shown: str) -> None:
    assert in_flags(message) == shown


def test_results_name_flags_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    print_shown(Shown({}, ("vLLM refuses it: write it with runtime='vllm'",)), as_json=False)
    assert "write it with --for vllm" in capsys.readouterr().out


def test_every_flag_exists() -> None:
    known = set()
    for command in (merge_command.run_command, inspect_command.run_command):
        app = typer.Typer()
        app.command()(command)
        known |= {flag for parameter in typer.main.get_command(app).params for flag in parameter.opts}
    assert set(FLAGS.values()) <= known
    assert all(re.fullmatch(r"--[a-z-]+", flag) for flag in FLAGS.values())


def test_one_error_in_both_spellings(pair: Pair, run_here: Run) -> None:
    with pytest.raises(OptionError, match=r"^stream= is for a base on the Hub, not for base='self'$"):
        merge("self", pair.adapter, stream=True)
    done = run_here("peanut-merge", "--base", "self", "--adapter", pair.adapter, "--stream")
    assert done.stderr == "peanut-merge: --stream is for a base on the Hub, not for --base self\n"
