"""The command `peanut-serve`."""

from peanut_serve.vllm_plugin.processes import end_with_parent

# Python imports this first in every process that vLLM starts: from here on it ends with its parent, not only after it
# has imported torch and vLLM, which takes long on a busy machine. In the server itself this does nothing
end_with_parent()

from peanut_serve.cli.main import main  # noqa: E402

__all__ = ["main"]
