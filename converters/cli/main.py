"""Running `peanut-merge` and `peanut-inspect`: results on stdout, the rest on stderr, an error in one line."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

import typer

from converters.cli import inspect_command, merge_command
from converters.cli.flags import in_flags
from converters.errors import PeanutError


class _Stopped(BaseException):
    """SIGINT or SIGTERM; not a KeyboardInterrupt, which typer would handle itself."""


def _run(name: str, command: Callable[..., None], help_text: str) -> NoReturn:
    """Run one command: an error is one line on stderr and exit code 1."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=name, help=help_text)(command)

    signals: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        signals.append(number)
        raise _Stopped(number)

    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        app(prog_name=name)
    except (_Stopped, Exception) as error:
        if signals:  # C code that was interrupted may have raised something else instead of _Stopped
            kept = "--resume" in sys.argv
            left = "--resume continues from here" if kept else "nothing incomplete was left"
            print(f"{name}: stopped; {left}", file=sys.stderr)
            sys.exit(128 + signals[0])
        if not isinstance(error, PeanutError | OSError):
            raise
        print(f"{name}: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


def merge_main() -> NoReturn:
    """Entry point of `peanut-merge`."""
    _run("peanut-merge", merge_command.run_command, merge_command.HELP)


def inspect_main() -> NoReturn:
    """Entry point of `peanut-inspect`."""
    _run("peanut-inspect", inspect_command.run_command, inspect_command.HELP)
