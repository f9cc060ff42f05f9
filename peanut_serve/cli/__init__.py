"""The command `peanut-serve`."""

from peanut_serve.vllm_plugin.processes import end_with_server

end_with_server()  # before all else is imported: multiprocessing imports this first in every process that vLLM starts

from peanut_serve.cli.main import main  # noqa: E402

__all__ = ["main"]
