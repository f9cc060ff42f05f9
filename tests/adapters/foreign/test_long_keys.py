"""A key of any length is looked at in a time that grows with its length, not with the square of it."""

import time

import pytest

from converters.adapters.foreign.keys import explain_keys

COUNT = 6000  # repetitions: what is quadratic takes many seconds

PARTS = (
    *(".processor.", ".processor.lora", "lora", ".adapter.linear_in.weight", ".adapter_layer.adapter", "adapter"),
    *(".loras.x.lora_A", ".adapters.", "rotate_layer.", ".prefix_encoder.", "_", "a_", "layers.1.", "lora_a.weight"),
    *(".lora_linear_layer.up.weight", ".lora_A", ".lora_down.weight", "transformer.h.0.attn.attn.lora_A", "1", "."),
)
STARTS = ("", "x", "lora_prior", "lora_unet_", "lycoris_", "layers.0.", "x.processor.", "x.adapter_layer.")


def within(key: str, unclaimed: bool) -> float:
    began = time.perf_counter()
    explain_keys([key], unclaimed)
    return time.perf_counter() - began


@pytest.mark.parametrize("unclaimed", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_long_keys(start: str, unclaimed: bool) -> None:
    keys = [start + part * COUNT + end for part in PARTS for end in ("", "\n", "!")]
    assert [key[:40] for key in keys if within(key, unclaimed) > 1] == []


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("unet.down.attn.processor.to_q_lora.up", "diffusers"),
        ("down.processor.processor.x.lora.y", "diffusers"),
        ("down.processor.to_q.lora", None),
        (".processor.lora_x", None),
        (".processor.processor.lora_x", "diffusers"),
        ("lora_prior_blocks_0.alpha", "kohya"),
        ("lora_prior2_blocks_0.alpha", "kohya"),
        ("lora_prior_.alpha", None),
        ("lora_prior__.alpha", "kohya"),
        ("lora_prior.alpha", None),
    ],
)
def test_what_is_recognised_is_the_same(key: str, told: str | None) -> None:
    found = explain_keys([key])
    assert found is None if told is None else found is not None and told in found
