"""The CPU operators for LoRA, compared with the formula row by row; and the bug in vLLM's own operators."""

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from peanut_serve.vllm_plugin.lora.cpu_operators import GroupedPunicaWrapperCPU, group_rows, is_affected
from peanut_serve.vllm_plugin.lora.unpadded import FactorStore

SLOTS, RANK, WIDTH, OUT = 4, 3, 10, (6, 5)
NONE = 0  # LoRAMapping's id for a request without an adapter
MIXES = {
    "base alone": [NONE] * 5,
    "one adapter": [7] * 5,
    "runs": [7, 7, NONE, NONE, 9, 9, 9],
    "scattered": [9, NONE, 7, 9, NONE, 7, 7, 11],
    "all slots, no base": [11, 9, 7, 11, 9],
    "one adapter and the base": [NONE, 9, NONE, 9],
    "one token": [7],
}


def wrapper(kind: type[PunicaWrapperCPU], mix: list[int], prefill: bool) -> PunicaWrapperCPU:
    made = kind(256, 256, torch.device("cpu"))
    mapping = LoRAMapping(tuple(mix), tuple(mix), is_prefill=prefill)
    slots = [11, 7, None, 9]  # the adapter in each
    made.update_metadata(mapping, slots, SLOTS + 1, 100)  # one more, as in vLLM's model_manager.py
    return made


def expected(mix: list[int], y: torch.Tensor, x: torch.Tensor, a: list, b: list, scale: float) -> torch.Tensor:
    slot_of, start, y = {11: 0, 7: 1, 9: 3}, 0, y.double().clone()
    for a_part, b_part in zip(a, b, strict=True):
        size = b_part.shape[2]
        for row, adapter in enumerate(mix):
            if adapter != NONE:
                slot = slot_of[adapter]
                h = a_part[slot, 0].double() @ x[row].double()
                y[row, start : start + size] += scale * (b_part[slot, 0].double() @ h)
        start += size
    return y


def factors() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    a = [torch.randn(SLOTS, 1, RANK, WIDTH) for _ in OUT]
    return a, [torch.randn(SLOTS, 1, size, RANK) for size in OUT]


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [1, 20])  # few tokens, and many
def test_linear_layers(name: str, prefill: bool, dtype: torch.dtype, times: int) -> None:
    mix, (a, b) = MIXES[name] * times, factors()
    a, b = [t.to(dtype) for t in a], [t.to(dtype) for t in b]
    x, y = torch.randn(len(mix), WIDTH, dtype=dtype), torch.randn(len(mix), sum(OUT), dtype=dtype)
    found = y.clone()
    wrapper(GroupedPunicaWrapperCPU, mix, prefill).add_lora_linear(found, x, tuple(a), tuple(b), 0.5, OUT)
    wanted = expected(mix, y, x, a, b, 0.5)
    assert (found.double() - wanted).abs().max() <= (1e-5 if dtype is torch.float32 else 0.1)
    without = torch.tensor([adapter == NONE for adapter in mix])
    assert torch.equal(found[without], y[without])


def pad(a: list[torch.Tensor], b: list[torch.Tensor], ranks: tuple[tuple[int, ...], ...]) -> None:
    """Leave so many rows of each slot in each linear layer, as vLLM does with smaller adapters."""
    for a_part, b_part, own in zip(a, b, ranks, strict=True):
        for slot, rank in enumerate(own):
            a_part[slot, :, rank:] = 0
            b_part[slot, :, :, rank:] = 0


@pytest.mark.parametrize("ranks", [((1, 3, 0, 2), (3, 1, 0, 2)), ((0, 0, 0, 0), (3, 2, 0, 1)), ((0, 2, 0, 0),) * 2])
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_differ_and_slots_are_empty(name: str, ranks: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    mix, (a, b) = MIXES[name], factors()
    pad(a, b, ranks)
    a, b = [t.to(dtype) for t in a], [t.to(dtype) for t in b]
    x, y = torch.randn(len(mix), WIDTH, dtype=dtype), torch.randn(len(mix), sum(OUT), dtype=dtype)
    found = y.clone()
    wrapper(GroupedPunicaWrapperCPU, mix, False).add_lora_linear(found, x, tuple(a), tuple(b), 0.5, OUT)
    assert (found.double() - expected(mix, y, x, a, b, 0.5)).abs().max() <= (1e-5 if dtype is torch.float32 else 0.1)


@pytest.mark.parametrize("written", ["a", "b", "both"])
def test_a_slot_that_is_written_again(written: str) -> None:
    """As vLLM does, in inference mode, when an adapter is replaced: nothing of the old one is left."""
    mix, (a, b) = MIXES["scattered"], factors()
    operators = wrapper(GroupedPunicaWrapperCPU, mix, False)
    x, y = torch.randn(len(mix), WIDTH), torch.randn(len(mix), sum(OUT))
    operators.add_lora_linear(y.clone(), x, tuple(a), tuple(b), 0.5, OUT)
    with torch.inference_mode():
        for part in {"a": a, "b": b, "both": a + b}[written]:
            part[1] = 0
            part[1, 0, :2, :2].copy_(torch.ones(2, 2))
        found = y.clone()
        operators.add_lora_linear(found, x, tuple(a), tuple(b), 0.5, OUT)
    assert (found.double() - expected(mix, y, x, a, b, 0.5)).abs().max() <= 1e-5


@pytest.mark.parametrize("broken", ["a", "b"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_factors_that_are_not_finite_spoil_no_other_answer(broken: str, number: float) -> None:
    """Nor that of a request without an adapter in the same step."""
    mix, (a, b) = MIXES["scattered"], factors()
    x, y = torch.randn(len(mix), WIDTH), torch.randn(len(mix), sum(OUT))
    wanted = expected(mix, y, x, a, b, 0.5)
    for part in {"a": a, "b": b}[broken]:
        part[1, 0, 0, 0] = number  # of adapter 7
    found = y.clone()
    wrapper(GroupedPunicaWrapperCPU, mix, False).add_lora_linear(found, x, tuple(a), tuple(b), 0.5, OUT)
    others = torch.tensor([adapter != 7 for adapter in mix])
    assert (found.double() - wanted)[others].abs().max() <= 1e-5
    assert not found[~others].isfinite().all()


def test_steps_of_few_and_of_many_tokens_in_turn() -> None:
    """Prefill mixed with decoding has many tokens; the steps before and after it have few."""
    a, b = factors()
    operators = GroupedPunicaWrapperCPU(256, 256, torch.device("cpu"))
    many = MIXES["one adapter"] * 20 + MIXES["scattered"]
    for mix in (MIXES["runs"], many, MIXES["base alone"], MIXES["scattered"]):
        mapping = LoRAMapping(tuple(mix), tuple(mix), is_prefill=len(mix) > 64)
        operators.update_metadata(mapping, [11, 7, None, 9], SLOTS + 1, 100)
        x, y = torch.randn(len(mix), WIDTH), torch.randn(len(mix), sum(OUT))
        found = y.clone()
        operators.add_lora_linear(found, x, tuple(a), tuple(b), 0.5, OUT)
        assert (found.double() - expected(mix, y, x, a, b, 0.5)).abs().max() <= 1e-5


def test_copies_of_factors_have_no_padding_and_are_dropped_with_them() -> None:
    (a, *_), (b, *_) = factors()
    pad([a], [b], ((1, 3, 0, 2),))
    store = FactorStore()
    made = store.unpadded(a, b)
    assert made.ranks == (1, 3, 0, 2)
    assert (made.a.shape, made.b.shape) == ((6, WIDTH), (6, OUT[0]))
    assert store.unpadded(a, b) is made
    assert len(store) == 1
    del a
    assert len(store) == 0


@pytest.mark.parametrize("name", MIXES)
def test_logits(name: str) -> None:
    mix, (a, b) = MIXES[name], factors()
    x, y = torch.randn(len(mix), WIDTH), torch.randn(len(mix), OUT[0])
    found = y.clone()
    wrapper(GroupedPunicaWrapperCPU, mix, False).add_lora_logits(found, x, a[0], b[0], 2.0)
    assert (found.double() - expected(mix, y, x, a[:1], b[:1], 2.0)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["base alone", "runs", "scattered"])
def test_this_vllm_is_affected(name: str) -> None:
    """If this fails, vLLM has fixed the bug, and the plugin's operators are only faster."""
    assert is_affected()
    mix, (a, b) = MIXES[name], factors()
    x, y = torch.randn(len(mix), WIDTH), torch.randn(len(mix), sum(OUT))
    found = y.clone()
    wrapper(PunicaWrapperCPU, mix, False).add_lora_linear(found, x, tuple(a), tuple(b), 0.5, OUT)
    without = torch.tensor([adapter == NONE for adapter in mix])
    assert not torch.equal(found[without], y[without])


def test_vllm_uses_the_plugins_operators() -> None:
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    assert current_platform.get_punica_wrapper().endswith("cpu_operators.GroupedPunicaWrapperCPU")


def test_rows_of_a_slot() -> None:
    groups = group_rows(torch.tensor([2, 2, -1, 0, -1, 0]))
    assert [slot for slot, _ in groups] == [0, 2]
    assert groups[0][1].tolist() == [3, 5]
    assert groups[1][1] == slice(0, 2)
