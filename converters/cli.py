"""The commands `peanut-merge` and `peanut-inspect`: parse, call, print. Results on stdout, the rest on stderr."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from converters._version import __version__
from converters.errors import OptionError, PeanutError

_MERGE_HELP = """Merge a trained PEANuT adapter into its base model: W = W0 + f(W0; θ).

Writes a checkpoint that transformers and vLLM load as any other model. Nothing is written until everything
that can be refused was refused, and the output appears whole or not at all.

Examples:

  peanut-merge --base llama2-7b --adapter ./gsm8k

  peanut-merge --base ./smollm2 --adapter ./json -o ./smollm2-json --dtype bf16

  peanut-merge --base org/model --revision v1.0 --adapter ./a --dry-run
"""

_INSPECT_HELP = """Show what an adapter is; with a base, how strongly it acts where.

Examples:

  peanut-inspect ./gsm8k

  peanut-inspect ./gsm8k --base llama2-7b

  peanut-inspect ./gsm8k --base llama2-7b --record-base
"""

_Base = Annotated[str, typer.Option("--base", help="Folder, Hub id, or llama2-7b, llama3-8b, qwen3-8b, ...")]
_Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the base on the Hub.")]
_Token = Annotated[str | None, typer.Option("--token", help="Hub token; HF_TOKEN works as well.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peanut-serve {__version__}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


def _merge(
    base: _Base,
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the trained adapter.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: ./<base>-<adapter>")] = None,
    revision: _Revision = None,
    token: _Token = None,
    dtype: Annotated[str, typer.Option(help="auto (as the base), bf16, fp16 or fp32.")] = "auto",
    device: Annotated[str, typer.Option(help="Where f is evaluated: auto, cpu, cuda, cuda:N.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Like 5GB; 'base' keeps the base's sharding.")] = "5GB",
    labels: Annotated[
        Path | None, typer.Option(help="JSON list of class labels, for a head that comes with the adapter.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output, at the end.")] = False,
    force_base: Annotated[bool, typer.Option("--force-base", help="Merge although the base is another.")] = False,
    verify: Annotated[bool, typer.Option(help="Check the written files before they are published.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and the sizes; write nothing.")] = False,
    as_json: _Json = False,
    version: _Version = False,
) -> None:
    from converters import console
    from converters.executor import check_merge, default_output, find_device, prepare_merge, run_merge

    plan = prepare_merge(
        base, adapter, revision=revision, token=token, dtype=dtype, max_shard_size=max_shard_size,
        labels=read_labels(labels) if labels else None, force_base=force_base,
    )  # fmt: skip
    target = output or default_output(plan)
    find_device(device)
    check_merge(plan, target, overwrite)
    for note in plan.notes:
        console.err.print(f"note: {note}", markup=False)
    if dry_run:
        console.print_plan(plan, target, as_json)
        return
    with console.Progress(plan.total_size * (2 if verify else 1), "merging", as_bytes=True) as advance:
        result = run_merge(plan, target, device=device, overwrite=overwrite, verify=verify, advance=advance)
    console.print_result(result, as_json)


def _inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder of the trained adapter.")],
    base: Annotated[str | None, typer.Option("--base", help="The base it was trained on: adds the norms.")] = None,
    revision: _Revision = None,
    token: _Token = None,
    record_base: Annotated[
        bool, typer.Option("--record-base", help="Write the base's fingerprint beside the adapter.")
    ] = False,
    as_json: _Json = False,
    version: _Version = False,
) -> None:
    from converters import console, inspection
    from converters.checkpoint import open_checkpoint
    from converters.hub import find_base
    from converters.layouts import load_adapter

    if record_base and base is None:
        raise OptionError("--record-base needs --base")
    opened = load_adapter(adapter)
    facts = inspection.describe(opened)
    norms: list[inspection.DeltaNorm] = []
    if base is not None:
        source = find_base(base, revision, token)
        checkpoint = open_checkpoint(source.folder, source.repo_id, source.revision)
        if source.note:
            console.err.print(f"note: {source.note}", markup=False)
        if record_base:
            console.err.print(f"recorded the base in {inspection.record_base(opened, checkpoint)}", markup=False)
            opened = load_adapter(adapter)
        with console.Progress(len(opened.modules), "evaluating f", as_bytes=False) as advance:
            norms = inspection.delta_norms(opened, checkpoint, advance)
    if as_json:
        rows = [{"module": n.module, "shape": n.shape, "delta": n.delta, "weight": n.weight} for n in norms]
        print(json.dumps({**facts, **({"norms": rows} if base else {})}, indent=2))
        return
    console.print_facts(facts)
    if norms:
        console.print_norms(norms)


def read_labels(path: Path) -> list[str]:
    """Class labels from a JSON list, or from an id2label object. Raises `OptionError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            value = [value[str(i)] for i in range(len(value))]
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"{path}: wanted a JSON list of labels, or an object from '0', '1', ... ({error})"
        ) from None
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value) or not value:
        raise OptionError(f"{path}: wanted a JSON list of strings")
    if len(set(value)) != len(value):
        raise OptionError(f"{path}: a label stands twice")
    return value


class _Stopped(BaseException):
    """SIGINT or SIGTERM; not a KeyboardInterrupt, which typer would answer by itself."""


def _run(name: str, command: Callable[..., None], help_text: str) -> NoReturn:
    """Run one command: a refusal is one line on stderr and exit code 1."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name=name, help=help_text)(command)

    def stop(number: int, frame: object) -> NoReturn:
        raise _Stopped(number)

    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        app(prog_name=name)
    except PeanutError as error:
        message = " ".join(str(error).split())
        print(f"{name}: {message}", file=sys.stderr)
        sys.exit(1)
    except _Stopped as stopped:
        print(f"{name}: stopped; nothing half-written was left", file=sys.stderr)
        sys.exit(128 + int(stopped.args[0]))
    sys.exit(0)


def merge_main() -> NoReturn:
    """Entry point of `peanut-merge`."""
    _run("peanut-merge", _merge, _MERGE_HELP)


def inspect_main() -> NoReturn:
    """Entry point of `peanut-inspect`."""
    _run("peanut-inspect", _inspect, _INSPECT_HELP)
