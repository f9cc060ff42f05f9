"""What the CPU operators for LoRA take of one decoding step, without the model around them.

    python benchmarks/lora_operators.py

The linear layers of SmolLM2-135M that the examples' adapters update, 8 tokens, 4 slots of rank 32, float32, on one
thread: of two cores vLLM keeps one for the server. `cached`: one layer's factors over and over; `all layers`: every
layer has its own, as in a step. Medians.
"""

import statistics
import time

import torch
from measure import machine
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from peanut_serve.vllm_plugin.lora.cpu_operators import GroupedPunicaWrapperCPU

LAYERS, SLOTS, R, STEPS = 30, 4, 32, 30
LINEARS = ((576, (576, 192, 192)), (576, (1536, 1536)), (1536, (576,)))  # qkv_proj, gate_up_proj, down_proj
MIXES = {"one adapter": [1] * 8, "three adapters and the base": [1, 2, 3, 0] * 2}
Layer = list[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]


def layer() -> Layer:
    """Factors of every slot for each linear."""
    return [
        (tuple(torch.randn(SLOTS, 1, R, width) for _ in outs), tuple(torch.randn(SLOTS, 1, o, R) for o in outs))
        for width, outs in LINEARS
    ]


def step(kind: type[PunicaWrapperCPU], mix: list[int], layers: list[Layer]) -> float:
    """Seconds of a step."""
    wrapper = kind(2048, 256, torch.device("cpu"))
    wrapper.update_metadata(LoRAMapping(tuple(mix), tuple(mix), is_prefill=False), [1, 2, 3, None], SLOTS + 1, 49152)
    inputs = [(torch.randn(len(mix), width), torch.zeros(len(mix), sum(outs)), outs) for width, outs in LINEARS]
    seconds = []
    for _ in range(STEPS + 3):
        start = time.perf_counter()
        for factors in layers:
            for (x, y, outs), (a, b) in zip(inputs, factors, strict=True):
                wrapper.add_lora_linear(y, x, a, b, 1.0, outs)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def main() -> None:
    """Measure, and print the table that stands in benchmarks/README.md."""
    torch.set_num_threads(1)
    every = [layer() for _ in range(LAYERS)]
    size = sum(t.nbytes for linears in every for pair in linears for several in pair for t in several)
    print(f"{machine()}, torch {torch.__version__}; {size / 1e6:.0f} MB of factors; medians of {STEPS}\n")
    print("| | operators | cached | all layers |\n|---|---|---|---|")
    for name, mix in MIXES.items():
        for whose, kind in (("peanut-serve's", GroupedPunicaWrapperCPU), ("vLLM's", PunicaWrapperCPU)):
            cached, cold = step(kind, mix, every[:1] * LAYERS), step(kind, mix, every)
            print(f"| {name} | {whose} | {cached * 1e3:.0f} ms | {cold * 1e3:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
