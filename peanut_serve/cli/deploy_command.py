"""The command `peanut-serve deploy`: many engines behind one address, on Ray Serve."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from converters.cli.flags import in_flags
from converters.cli.numbers import COUNT, finite
from converters.errors import OptionError, PeanutError
from peanut_serve.cli import deploy_classifiers
from peanut_serve.cli.launch import check_endpoints, option_names, value_of
from peanut_serve.cli.serve import checked
from peanut_serve.cli.server_options import Mode
from peanut_serve.errors import EngineStartError
from peanut_serve.ray.deploying import Target, deploy
from peanut_serve.ray.settings import EngineSettings, FleetSettings
from peanut_serve.settings.server import OF_ADMIN
from peanut_serve.settings.serving import ServeOptions
from peanut_serve.web.audit import AuditLog
from peanut_serve.web.bearer import read_keys

HELP = """Serve from many engines behind one address, on a Ray Serve cluster (needs pip install 'peanut-serve[ray]').

Each engine is a `peanut-serve`, and a request goes where the weights of its variant are. All options of
`peanut-serve` and of vLLM are taken for the engines. Everything is checked, then written as Serve's config, which
`serve deploy` applies. The base and the adapters have to be at the same place on all nodes.

Examples:

  peanut-serve deploy --base ./smollm2 --adapters ./tasks --mode merged --replicas 4 --gpus-per-replica 1

  peanut-serve deploy --base ./smollm2 --adapters ./tasks --replicas 2 --local --port 8000

With --classify FOLDER instead of a base, it serves classifiers of ONNX exports; see
`peanut-serve deploy --classify FOLDER --help`.
"""

Reader = Callable[[Sequence[str]], ServeOptions]

_EACH = "each replica has its own"
_HOP = "only the front talks to the engines, over http on their machine"
_REFUSED = {
    "--api-key": "give the keys of clients as --api-key-file",
    "--api-key-file": "give it to deploy, not in the --config of its engines",
    "--admin-key-file": "give it to deploy, not in the --config of its engines",
    "--keys": "give it to deploy, not in the --config of its engines",
    "--audit-log": "give it to deploy, not in the --config of its engines",
    "--admin-port": _EACH,
    "--admin-host": _EACH,
    "--admin-ssl-certfile": _EACH,
    "--admin-ssl-keyfile": _EACH,
    "--console-host": _EACH,
    "--uds": _HOP,
    "--ssl-keyfile": _HOP,
    "--ssl-certfile": _HOP,
    "--ssl-ca-certs": _HOP,
    "--root-path": _HOP,
    "--headless": "every replica answers requests",
    "--dry-run": "without --local, nothing is started",
    "--check": "run peanut-serve --check with the options of an engine",
}
_FILES = ("--cache", "--config", "--chat-template", "--tokenizer")  # engines run in another folder
_BINDING = "VLLM_CPU_OMP_THREADS_BIND"


def _deploy(
    context: typer.Context,
    base: Annotated[str, typer.Option("--base", help="Base model: folder, Hub id, llama2-7b, ...")],
    adapters: Annotated[
        list[str], typer.Option("--adapters", help="Folder of adapters, or a Hub id to allow. Can be repeated.")
    ],
    mode: Annotated[Mode, typer.Option("--mode", help="How to serve variants.")] = Mode.LORA,
    replicas: Annotated[int, typer.Option("--replicas", min=1, max=10_000, help="Number of engines.")] = 1,
    gpus: Annotated[
        float,
        typer.Option("--gpus-per-replica", min=0, max=1024, callback=finite, help="GPUs of each engine."),
    ] = 0.0,
    cpus: Annotated[
        float,
        typer.Option(
            "--cpus-per-replica",
            min=0,
            max=1024,
            callback=finite,
            help="CPUs of each engine, and threads if it has no GPU.",
        ),
    ] = 1.0,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting", min=1, max=COUNT, help="Requests that may wait for an engine before 429 is answered."
        ),
    ] = 1024,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File with the API keys of clients, one per line.")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option("--admin-key-file", help="File with the admin key; turns the admin API on.")
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option("--keys", help="File of the keys of many teams and operators, with their rights and limits."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", help="Folder of each node for what survives a restart; every engine has a folder in it."
        ),
    ] = None,
    audit_log: Annotated[
        Path | None,
        typer.Option(
            "--audit-log", help="File that gets a line for each change through the admin API (default: in --state)."
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host", help="Address to listen on (default: 127.0.0.1; with --api-key-file, all of each node)."
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write Serve's config to.")] = Path(
        "fleet.yaml"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that file if it exists.")] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Write nothing; serve on this machine until Ctrl-C or SIGTERM.")
    ] = False,
) -> None:
    # its own options, and those of an engine
    engine = _engine([*_sources(base, adapters), "--mode", mode.value, *_absolute(context.args)], context.obj)
    if not gpus and replicas > 1:  # by itself, each engine binds its threads to the first cores of a machine
        engine = engine.model_copy(update={"variables": {_BINDING: os.environ.get(_BINDING, "nobind")}})
    keys, admin_keys = _absolute_path(api_key_file), _absolute_path(admin_key_file)
    if set(read_keys(keys)) & set(read_keys(admin_keys)):
        raise OptionError(f"a key in {admin_keys} is also in {keys}; clients must not have the key of operators")
    if gpus > 1 and not gpus.is_integer():
        raise OptionError(f"--gpus-per-replica is {gpus:g}; expected a whole number, or a share of one GPU")
    settings = FleetSettings(
        engine=engine,
        replicas=replicas,
        gpus=gpus,
        cpus=cpus,
        most_waiting=max_waiting,
        key_file=keys,
        admin_key_file=admin_keys,
        keys=_absolute_path(keys_file),
        state=_absolute_path(state),
        audit_log=_absolute_path(audit_log),
    )
    has_admin = settings.has_admin  # a keys file that cannot be used is refused now
    if audit_log is not None and not has_admin:
        raise OptionError(
            "--audit-log is for the admin API, which is off; give --admin-key-file too, or a key in --keys the role "
            "admin"
        )
    if local:
        check_endpoints("--allow-untested-vllm" in context.args)
        if has_admin:
            AuditLog(settings.audit_file).close()
    deploy(settings, Target(host, port, output, overwrite, local))


def _sources(base: str, adapters: Sequence[str]) -> list[str]:
    """The base and the adapters as options; folders by their absolute paths."""

    def absolute(given: str) -> str:
        folder = Path(given).expanduser()
        return str(folder.absolute()) if folder.is_dir() else given

    return ["--base", absolute(base), *(part for one in adapters for part in ("--adapters", absolute(one)))]


def _absolute_path(given: Path | None) -> Path | None:
    return given.expanduser().absolute() if given else None


def _absolute(given: Sequence[str]) -> list[str]:
    """The options with the absolute paths of files."""
    result = list(given)
    for index, (option, value) in enumerate(pairwise(given), 1):
        if option in _FILES and Path(value).expanduser().exists():
            result[index] = str(Path(value).expanduser().absolute())
    for index, option in enumerate(result):
        name, equals, value = option.partition("=")
        if equals and name in _FILES and Path(value).expanduser().exists():
            result[index] = f"{name}={Path(value).expanduser().absolute()}"
    return result


def _engine(arguments: Sequence[str], read: Reader) -> EngineSettings:
    """Check what an engine would be started with. Raises `PeanutError`."""
    options = read(arguments)
    for name in sorted((option_names(arguments) | option_names(options.vllm)) & _REFUSED.keys()):
        raise OptionError(f"{name} cannot be used with deploy: {_REFUSED[name]}")
    # what the environment says of the admin API does not count: each replica has its own
    serving = {name: value for name, value in options.serving.items() if name not in OF_ADMIN}
    _, vllm, _ = checked(replace(options, serving=serving))
    # 1 is vLLM's default, if a --config file has the option
    slots = value_of(vllm, "--max-loras") or "1" if options.mode == "lora" else "1"
    if not slots.isdecimal() or slots == "0":
        raise OptionError(f"--max-loras is {slots}; expected a positive number")
    return EngineSettings(options=tuple(arguments), slots=int(slots), log_format=options.log_format)


def main(argv: list[str], read: Reader) -> NoReturn:
    """Run `peanut-serve deploy` with these arguments: an error is one line on stderr and exit code 1.

    Args:
        argv: the arguments.
        read: gives the options of `peanut-serve` that are in a command line.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    if any(one.partition("=")[0] == deploy_classifiers.OPTION for one in argv):
        app.command(name="deploy", help=deploy_classifiers.HELP)(deploy_classifiers.deploy_classifiers)
    else:
        pass_through = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command(name="deploy", help=HELP, context_settings=pass_through)(_deploy)
    try:
        app(argv, prog_name="peanut-serve deploy", obj=read)
    except EngineStartError as error:
        print(f"peanut-serve deploy: {error}", file=sys.stderr)  # with lines of the engine's log
        sys.exit(1)
    except (PeanutError, OSError) as error:
        print(f"peanut-serve deploy: {in_flags(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
