"""`peanut-serve` with the invalidation of caches taken out, to see that the test of it can fail."""

from peanut_serve.cli.main import main
from peanut_serve.vllm_plugin.swap.engine import SwapEngine


async def _forget_nothing(self: SwapEngine) -> None:
    pass


if __name__ == "__main__":
    SwapEngine.invalidate = _forget_nothing  # type: ignore[method-assign]
    main()
