"""What the CPU operators for LoRA take of one decoding step, without the model around them.

    python benchmarks/lora_operators.py

The linear layers of SmolLM2-135M, 8 tokens, 4 slots of rank 32 with the ranks and targets of the examples' adapters,
on one thread: of two cores vLLM keeps one for the server. `cached`: one layer's factors over and over; `all layers`:
every layer has its own, as in a step. Milliseconds of processor time, which other processes disturb less; medians.
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
# of each slot: (json, math, upper, empty), in each part of the linears
RANKS = (((16, 32, 8, 0), (16, 32, 0, 0), (16, 32, 8, 0)), ((0, 0, 0, 0), (16, 32, 0, 0)), ((16, 32, 8, 0),))
Layer = list[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]


def layer(dtype: torch.dtype) -> Layer:
    """Factors of every slot for each linear."""
    made: Layer = []
    for (width, outs), ranks in zip(LINEARS, RANKS, strict=True):
        a, b = torch.zeros(len(outs), SLOTS, 1, R, width), [torch.zeros(SLOTS, 1, o, R) for o in outs]
        for part, own in enumerate(ranks):
            for slot, r in enumerate(own):
                a[part, slot, :, :r].normal_()
                b[part][slot, ..., :r].normal_()
        made.append((tuple(part.to(dtype, copy=True) for part in a), tuple(part.to(dtype) for part in b)))
    return made


def step(kind: type[PunicaWrapperCPU], mix: list[int], layers: list[Layer]) -> float:
    """Seconds of a step."""
    wrapper = kind(2048, 256, torch.device("cpu"))
    wrapper.update_metadata(LoRAMapping(tuple(mix), tuple(mix), is_prefill=False), [1, 2, 3, None], SLOTS + 1, 49152)
    dtype = layers[0][0][0][0].dtype
    inputs = [
        (torch.randn(len(mix), width, dtype=dtype), torch.zeros(len(mix), sum(outs), dtype=dtype), outs)
        for width, outs in LINEARS
    ]
    seconds = []
    for _ in range(STEPS + 3):
        start = time.thread_time()
        for factors in layers:
            for (x, y, outs), (a, b) in zip(inputs, factors, strict=True):
                wrapper.add_lora_linear(y, x, a, b, 1.0, outs)
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds[3:])


def main() -> None:
    """Measure, and print the table that stands in benchmarks/README.md."""
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}; medians of {STEPS}\n")
    print("| dtype | | operators | cached | all layers |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        every = [layer(dtype) for _ in range(LAYERS)]
        for name, mix in MIXES.items():
            for whose, kind in (("peanut-serve's", GroupedPunicaWrapperCPU), ("vLLM's", PunicaWrapperCPU)):
                cached, cold = step(kind, mix, every[:1] * LAYERS), step(kind, mix, every)
                of = f"{str(dtype).removeprefix('torch.')} | {name} | {whose}"
                print(f"| {of} | {cached * 1e3:.0f} ms | {cold * 1e3:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
