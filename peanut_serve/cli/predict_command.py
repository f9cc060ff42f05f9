"""The command `peanut-serve predict`: labels of images, sounds or texts, from an ONNX export."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from converters.cli.flags import in_flags
from converters.cli.options import Json
from converters.errors import OptionError, PeanutError

HELP = """Predict labels with an ONNX model that `peanut-merge --format onnx` wrote, on ONNX Runtime.

Examples:

  peanut-serve predict ./pets-onnx beagle.png pug.jpg

  peanut-serve predict ./tasks-onnx beagle.png --task pets --top-k 1

  peanut-serve predict ./keywords-onnx yes.wav no.wav

  peanut-serve predict ./sentiment-onnx 'A well executed spy thriller.' --precision int8

  peanut-serve predict ./sentiment-onnx --text-file reviews.txt --json

For token classifiers, it shows the labelled parts of a text (labels other than O).
"""


class _Precision(str, Enum):
    FP32, FP16, INT8 = "fp32", "fp16", "int8"


def _predict(
    folder: Annotated[Path, typer.Argument(help="Folder of an ONNX export.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Image files, WAV files, or texts, as the model takes.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Name of the task, if the folder has several.")] = None,
    precision: Annotated[
        _Precision, typer.Option("--precision", help="Precision of the graph to run.")
    ] = _Precision.FP32,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Number of labels to show per input, best first.")] = 5,
    text_file: Annotated[Path | None, typer.Option("--text-file", help="File with one text per line.")] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Number of threads (default: all cores).")
    ] = None,
    as_json: Json = False,
) -> None:
    from peanut_serve.classify.engine import OnnxEngine

    given = [*(inputs or []), *(_lines(text_file) if text_file is not None else [])]
    if not given:
        raise OptionError("nothing to predict; give image files, sound files, texts, or --text-file")
    engine = OnnxEngine(folder, precision=precision.value, threads=threads)
    kind = engine.find(task).kind
    if kind.task == "token-classification":
        name, found = "entities", [list(map(asdict, entities)) for entities in engine.entities(given, task)]
    else:
        examples = [Path(one) if kind.takes_files else one for one in given]
        name, found = "predictions", [list(map(asdict, bests)) for bests in engine.predict(examples, task, top_k)]
    if as_json:
        answers = [{"input": one, name: rows} for one, rows in zip(given, found, strict=True)]
        print(json.dumps(answers, indent=2, ensure_ascii=False))
    else:
        _print_table(given, found, ("text", "label") if name == "entities" else ("label",))


def _print_table(given: Sequence[str], found: Sequence[Sequence[dict[str, Any]]], columns: Sequence[str]) -> None:
    """Print one row per prediction, grouped by input."""
    from rich.console import Console
    from rich.table import Column, Table

    from converters.cli import console

    table = Table(Column("input", overflow="fold"), *(Column(one, overflow="fold") for one in columns), "score")
    for one, rows in zip(given, found, strict=True):
        if not rows:
            table.add_row(one, end_section=True)
        for index, row in enumerate(rows):
            cells = [row[column] for column in columns]
            table.add_row("" if index else one, *cells, f"{row['score']:.4f}", end_section=index == len(rows) - 1)
    width = None if console.out.is_terminal else 500  # a pipe has no width to fold at
    Console(highlight=False, width=width).print(table, markup=False)


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} is not UTF-8 ({error}); expected one text per line") from None


def main(argv: list[str]) -> NoReturn:
    """Run `peanut-serve predict` with these arguments: an error is one line on stderr and exit code 1."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name="predict", help=HELP)(_predict)
    try:
        app(argv, prog_name="peanut-serve predict")
    except (PeanutError, OSError) as error:
        print(f"peanut-serve predict: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
