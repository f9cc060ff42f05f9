"""The vLLM plugin; `register` is its entry point."""

import logging
import multiprocessing
import os

from peanut_serve.settings.environment import ADAPTERS, ALLOW_UNTESTED
from peanut_serve.settings.server import VARIABLE

logger = logging.getLogger("vllm.peanut_serve")


def register() -> None:
    """Entry point in `vllm.general_plugins`, which the server, the engine and every worker call, sometimes twice.

    Ends the process with its parent. Fixes two bugs of LoRA in vLLM: on the CPU, and when an adapter is replaced. If
    PEANUT_ADAPTERS is set, serves the adapters in it by name, as `peanut-serve --mode lora` does.
    """
    from peanut_serve.vllm_plugin.lora.identity import distinguish_versions
    from peanut_serve.vllm_plugin.processes import end_with_parent

    end_with_parent()
    distinguish_versions()
    _fix_cpu_lora()
    if multiprocessing.parent_process() is None and os.environ.get(ADAPTERS) and not os.environ.get(VARIABLE):
        _serve_adapters()


def _fix_cpu_lora() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    name = "peanut_serve.vllm_plugin.lora.cpu_operators.GroupedPunicaWrapperCPU"
    setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: name))  # noqa: B010


def _serve_adapters() -> None:
    """Set up `vllm serve` as peanut-serve does before it starts vLLM."""
    from peanut_serve.settings.launching import variables_of_environment
    from peanut_serve.vllm_plugin.contract import check_vllm
    from peanut_serve.vllm_plugin.processes import own_everything

    for change in check_vllm(allow_untested=os.environ.get(ALLOW_UNTESTED) == "1"):
        logger.warning("untested vLLM: %s", change)
    own_everything()
    os.environ.update(variables_of_environment())
