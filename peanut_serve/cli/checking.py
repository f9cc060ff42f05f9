"""What `peanut-serve --check` looks at: all that can be found wrong without an engine."""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from converters import Checkpoint, open_checkpoint
from converters.cli import console
from converters.cli.flags import in_flags
from converters.errors import MissingDependencyError, OptionError, PeanutError
from converters.serving import VLLM_RANKS
from peanut_serve.cli.finding import Found, unserved, usable_names
from peanut_serve.cli.launch import base_names, check_endpoints, server_variables
from peanut_serve.settings.server import ServerSettings
from peanut_serve.settings.serving import ServeOptions
from peanut_serve.tenants.watched import keys_of
from peanut_serve.variants.backup.checking import check_state
from peanut_serve.variants.lora_export import LoraLimits
from peanut_serve.variants.opening import VersionOpener
from peanut_serve.variants.roots import AdapterRoots, looks_merged
from peanut_serve.variants.state_folder import RECORDS
from peanut_serve.variants.version import LoadedModel


def problems(
    options: ServeOptions, found: Found, arguments: Sequence[str], settings: ServerSettings
) -> Iterator[str]:
    """What would make a start fail, or a variant not be served: one text for each.

    Args:
        options: of the command.
        found: the adapters.
        arguments: the options of vLLM.
        settings: of the server.
    """
    yield from (f"{name}: {reason}" for name, reason in found.broken.items())
    names = set(found.names(options.mode))
    said = {*found.broken, *base_names(options.base, options.vllm)}
    asked = {option: {*options.serving.get(option, ())} - said for option in ("pin", "preload")}
    roots = AdapterRoots(settings.roots)
    yield from unserved(asked, usable_names(found, options.mode, roots, settings.state, options.base))
    limits, refused = _limits(options, arguments)
    yield from refused
    for check in (server_variables, keys_of):
        try:
            check(settings)
        except (PeanutError, OSError) as error:
            yield str(error)
    yield from _audit_log(settings)
    base = None
    folder = Path(options.base).expanduser()
    if folder.is_dir():
        try:
            base = open_checkpoint(folder)
        except (PeanutError, OSError) as error:
            yield f"--base {options.base}: {error}"
    if base is not None:
        yield from _variants(options, base, sorted(names), limits)
    yield from _state(options, settings, base)


def _limits(options: ServeOptions, arguments: Sequence[str]) -> tuple[LoraLimits, list[str]]:
    """What vLLM's options allow as LoRA; and why it would not start with them."""
    any_rank = LoraLimits(VLLM_RANKS[-1])
    try:
        check_endpoints(options.allow_untested_vllm)
        read = _read_vllm_options(arguments)
    except PeanutError as error:
        return any_rank, [str(error)]
    targets = getattr(read, "lora_target_modules", None)
    rank = int(getattr(read, "max_lora_rank", None) or VLLM_RANKS[-1])
    return LoraLimits(rank, frozenset(targets) if targets else None), []


def _variants(options: ServeOptions, base: Checkpoint, names: Sequence[str], limits: LoraLimits) -> Iterator[str]:
    """Open every variant as a server would; θ is read, but nothing is evaluated."""
    model = LoadedModel(base, [[name] for name in base.tensors])
    opener = VersionOpener(
        model,
        os.environ.get("PEANUT_DEVICE", "cpu"),
        None if options.mode == "merged" else limits,
        options.mode != "lora",
    )
    roots = AdapterRoots(options.adapters)
    for name in names:
        try:
            if (source := roots.find(name)) is None:
                continue
            if isinstance(source.spec, Path) and looks_merged(source.spec):
                opener.checkpoint(name, source.spec)
            else:
                opener.adapter(name, source.spec)
        except (PeanutError, OSError) as error:
            yield f"{name}: {error}"


def _audit_log(settings: ServerSettings) -> Iterator[str]:
    """Why a start could not write the audit log, if it has a place of its own. Nothing is created."""
    file = settings.audit_log
    if file is None or settings.admin_port is None:
        return
    found = next(path for path in (file, *file.parents) if path.exists())
    if found.is_dir() == (found == file) or not os.access(found, os.W_OK):
        yield f"--audit-log {file}: {found} cannot be written"


def _state(options: ServeOptions, settings: ServerSettings, base: Checkpoint | None) -> Iterator[str]:
    if not (settings.state / RECORDS).exists():
        return
    try:
        report = check_state(settings.state, base.fingerprint if base is not None else None, options.adapters)
    except (PeanutError, OSError) as error:
        yield f"--state {settings.state}: {error}"
        return
    if report.in_use:
        yield f"--state {settings.state}: another server uses it"
    yield from (f"--state {settings.state}: {problem}" for problem in report.problems)


def _read_vllm_options(options: Sequence[str]) -> argparse.Namespace:
    """The options of `vllm serve`, as vLLM reads them.

    Raises `OptionError` if it refuses them, and `MissingDependencyError` if it is not installed.
    """
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise MissingDependencyError(f"serving needs vLLM ({error}): pip install 'peanut-serve[vllm]'") from None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return make_arg_parser(FlexibleArgumentParser(prog="vllm")).parse_args(list(options))  # type: ignore[no-any-return, no-untyped-call]
    except (SystemExit, ValueError) as error:
        last = said.getvalue().strip().splitlines()[-1:] or [str(error)]
        raise OptionError(f"vLLM refuses its options: {last[0].removeprefix('vllm: error: ')}") from None


def show_problems(found: Sequence[str], variants: int) -> None:
    """Print each problem, and how many there are."""
    for one in found:
        console.err.print(f"problem: {in_flags(' '.join(one.split()))}", markup=False)
    console.out.print(
        f"checked {variants} variants: {len(found) or 'no'} problem{'s' * (len(found) != 1)}", markup=False
    )
