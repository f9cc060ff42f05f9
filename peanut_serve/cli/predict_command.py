"""The command `peanut-serve predict`: what an ONNX export says of images, sounds or texts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from converters.cli.flags import in_flags
from converters.cli.numbers import COUNT
from converters.cli.options import Json
from converters.errors import OptionError, PeanutError
from peanut_serve.cli.server_options import Precision

if TYPE_CHECKING:
    from peanut_serve.classify.engine import OnnxEngine

HELP = """Predict labels with an ONNX model that `peanut-merge --format onnx` wrote, on ONNX Runtime.

Examples:

  peanut-serve predict ./pets-onnx beagle.png pug.jpg

  peanut-serve predict ./tasks-onnx beagle.png --task pets --top-k 1

  peanut-serve predict ./keywords-onnx yes.wav no.wav

  peanut-serve predict ./sentiment-onnx 'A well executed spy thriller.' --precision int8

  peanut-serve predict ./sentiment-onnx --text-file reviews.txt --json

  peanut-serve predict ./squad-onnx --pairs 'Who wrote it?' 'It was written by Ada Lovelace in 1843.'

For token classifiers, it shows the labelled parts of a text (labels other than O); for question answering, the parts
that answer; for models of sentence-transformers, embeddings; for language models, the next token.
"""


def _predict(
    folder: Annotated[Path, typer.Argument(help="Folder of an ONNX export.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="Image files, WAV files, or texts, as the model takes.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Name of the task, if the folder has several.")] = None,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Precision of the graph to run.")
    ] = Precision.FP32,
    top_k: Annotated[
        int, typer.Option("--top-k", min=1, max=COUNT, help="Number of labels to show per input, best first.")
    ] = 5,
    text_file: Annotated[Path | None, typer.Option("--text-file", help="File with one text per line.")] = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Inputs are pairs of texts, one after the other; in a file, with a tab between."
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=1024, help="Number of threads (default: all cores).")
    ] = None,
    as_json: Json = False,
) -> None:
    from peanut_serve.classify.engine import OnnxEngine

    lines = _lines(text_file) if text_file is not None else []
    given: list[str | tuple[str, str]] = [*_pairs(inputs or [], lines)] if pairs else [*(inputs or []), *lines]
    if not given:
        raise OptionError("nothing to predict; give image files, sound files, texts, or --text-file")
    engine = OnnxEngine(folder, precision=precision.value, threads=threads)
    name, found, columns = _run(engine, given, task, top_k)
    if as_json:
        answers = [{"input": one, name: rows} for one, rows in zip(given, found, strict=True)]
        print(json.dumps(answers, indent=2, ensure_ascii=False))
    else:
        _print_table([one if isinstance(one, str) else " | ".join(one) for one in given], found, columns)


def _run(
    engine: "OnnxEngine", given: Sequence[str | tuple[str, str]], task: str | None, top_k: int
) -> tuple[str, list[list[Any]], tuple[str, ...]]:
    """What the results are, those of each input, and the columns that show them."""
    kind = engine.find(task).kind
    if kind.task == "question-answering":
        asked = [one for one in given if isinstance(one, tuple)]
        if len(asked) < len(given):
            raise OptionError("the model answers questions; give --pairs, each a question and a text")
        return "answers", _rows(engine.answers(asked, task, top_k)), ("text",)
    if kind.task in ("image-classification", "text-classification") or kind.takes_files:
        examples = [Path(one) if kind.takes_files and isinstance(one, str) else one for one in given]
        return "predictions", _rows(engine.predict(examples, task, top_k)), ("label",)
    texts = [one for one in given if isinstance(one, str)]
    if len(texts) < len(given):
        raise OptionError(f"the model takes single texts ({kind.task}); leave --pairs out")
    if kind.task == "sentence-similarity":
        return "embedding", [one.tolist() for one in engine.embeddings(texts, task)], ()
    if kind.task == "text-generation":
        return "next_token", _rows(engine.next_tokens(texts, task, top_k)), ("label",)
    return "entities", _rows(engine.entities(texts, task)), ("text", "label")


def _rows(found: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[asdict(one) for one in rows] for rows in found]


def _pairs(inputs: Sequence[str], lines: Sequence[str]) -> list[tuple[str, str]]:
    if len(inputs) % 2:
        raise OptionError(f"--pairs needs an even number of texts, found {len(inputs)}")
    cut = [line.split("\t") for line in lines]
    if wrong := next((line for line, parts in zip(lines, cut, strict=True) if len(parts) != 2), None):
        raise OptionError(f"--pairs needs two texts with a tab between them in each line, found {wrong[:80]!r}")
    return [*zip(inputs[::2], inputs[1::2], strict=True), *((first, second) for first, second in cut)]


def _print_table(given: Sequence[str], found: Sequence[Sequence[Any]], columns: Sequence[str]) -> None:
    """Print one row per prediction, grouped by input; without columns, the numbers of each input."""
    from rich.console import Console
    from rich.table import Column, Table

    from converters.cli import console

    if not columns:
        for one, numbers in zip(given, found, strict=True):
            print(f"{one}\t{' '.join(f'{number:.6g}' for number in numbers)}")
        return
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
