"""The command `peanut-serve deploy`: many engines behind one address, on Ray Serve."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import typer

from converters.cli.flags import in_flags
from converters.errors import OptionError, PeanutError
from peanut_serve.cli import deploy_classifiers
from peanut_serve.cli import fleet_options as fleet
from peanut_serve.cli import server_options as options
from peanut_serve.cli.launch import check_endpoints, option_names, value_of
from peanut_serve.cli.serve import checked
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
    base: options.Base,
    adapters: options.Adapters,
    mode: options.ModeOption = options.Mode.LORA,
    replicas: fleet.Replicas = 1,
    gpus: fleet.Gpus = 0.0,
    cpus: fleet.Cpus = 1.0,
    max_waiting: fleet.MaxWaiting = 1024,
    api_key_file: options.ApiKeyFile = None,
    admin_key_file: fleet.AdminKeyFile = None,
    keys_file: options.Keys = None,
    state: fleet.State = None,
    audit_log: options.AuditLog = None,
    host: fleet.Host = None,
    port: fleet.Port = 8000,
    output: fleet.Output = Path("fleet.yaml"),
    overwrite: fleet.Overwrite = False,
    local: fleet.Local = False,
) -> None:
    # its own options, and those of an engine
    engine = _engine([*_sources(base, adapters), "--mode", mode.value, *_absolute(context.args)], context.obj)
    if not gpus and replicas > 1:  # by itself, each engine binds its threads to the first cores of a machine
        engine = engine.model_copy(update={"variables": {_BINDING: os.environ.get(_BINDING, "nobind")}})
    keys, admin_keys = fleet.absolute(api_key_file), fleet.absolute(admin_key_file)
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
        keys=fleet.absolute(keys_file),
        state=fleet.absolute(state),
        audit_log=fleet.absolute(audit_log),
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
    asked = read(arguments)
    for name in sorted((option_names(arguments) | option_names(asked.vllm)) & _REFUSED.keys()):
        raise OptionError(f"{name} cannot be used with deploy: {_REFUSED[name]}")
    # what the environment says of the admin API does not count: each replica has its own
    serving = {name: value for name, value in asked.serving.items() if name not in OF_ADMIN}
    _, vllm, _ = checked(replace(asked, serving=serving))
    # 1 is vLLM's default, if a --config file has the option
    slots = value_of(vllm, "--max-loras") or "1" if asked.mode == "lora" else "1"
    if not slots.isdecimal() or slots == "0":
        raise OptionError(f"--max-loras is {slots}; expected a positive number")
    return EngineSettings(options=tuple(arguments), slots=int(slots), log_format=asked.log_format)


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
