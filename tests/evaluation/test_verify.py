"""The verification: it has to notice what is wrong with the written files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import Pair

from converters import load_adapter, merge, prepare_merge, run_merge
from converters.errors import VerificationError
from converters.files import writer as shard_writer
from converters.methods.peanut.update import TweakerUpdate
from converters.outputs.checkpoint import draft


def test_reports_what_it_checked(pair: Pair) -> None:
    result = merge(pair.base, pair.adapter, pair.output)
    assert result.verification.tensors == len(load_file(pair.output / "model.safetensors"))
    assert result.verification.recomputed == 2 * 8 * (32 + 16)  # 8 columns of q_proj and v_proj in two layers
    assert 0.4 < result.verification.max_ulp <= 0.5
    without = merge(pair.base, pair.adapter, pair.output.with_name("fast"), verify=False)
    assert without.verification is None


def damaged(pair: Pair, change: Callable[[dict[str, torch.Tensor]], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """Merge with the written file damaged before its header is verified; the message."""
    check = draft.check_headers

    def damage_and_check(folder: Path, *arguments: object) -> object:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return check(folder, *arguments)

    monkeypatch.setattr(draft, "check_headers", damage_and_check)
    with pytest.raises(VerificationError) as caught:
        merge(pair.base, pair.adapter, pair.output)
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base"]
    return str(caught.value)


def test_a_flipped_bit_in_an_untouched_tensor(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between writing and reading back."""
    start_writeback = shard_writer.ShardWriter.start_writeback

    def flip_and_start(self: shard_writer.ShardWriter, name: str) -> None:
        start_writeback(self, name)
        if name == "lm_head.weight":
            place = self.places[name]
            with place.file.open("r+b") as file:
                file.seek(place.offset + 1001)
                byte = file.read(1)
                file.seek(place.offset + 1001)
                file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(shard_writer.ShardWriter, "start_writeback", flip_and_start)
    with pytest.raises(VerificationError, match=r"lm_head.weight: the bytes on disk differ from those"):
        merge(pair.base, pair.adapter, pair.output)
    assert sorted(p.name for p in pair.output.parent.iterdir()) == ["adapter", "base"]


def test_a_missing_tensor(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model.norm.weight" in damaged(pair, lambda w: w.pop("model.norm.weight"), monkeypatch)


def test_another_dtype(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def cast(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()

    assert "model.norm.weight was written as BF16 (32,), expected F32 (32,)" in damaged(pair, cast, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_formula(make_pair: Callable[..., Pair], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the executor writes consistently, but wrongly, is found by recomputing it."""
    pair = make_pair(dtype=dtype)
    plan = prepare_merge(pair.base, pair.adapter)
    right = TweakerUpdate.prepare
    monkeypatch.setattr(TweakerUpdate, "prepare", lambda self, w0, start: right(self, w0, start) * 1.01)
    with pytest.raises(VerificationError, match=r"recomputed numbers are wrong, for example .* was expected"):
        run_merge(plan, pair.output)
    assert not pair.output.exists()


def test_rows_orientation(make_pair: Callable[..., Pair]) -> None:
    """θ of a square weight, taken the other way round."""
    pair = make_pair(target_modules=["q_proj"], act_fn="tanh")
    adapter = load_adapter(pair.adapter)
    turned = {
        name: replace(theta, settings={**theta.settings, "orientation": "rows"})
        for name, theta in adapter.modules.items()
    }
    result = merge(pair.base, replace(adapter, modules=turned), pair.output)
    assert result.verification.max_ulp <= 0.5
    name = "model.layers.1.self_attn.q_proj"
    theta = adapter.tweaker(name)
    before, after = (load_file(f / "model.safetensors")[f"{name}.weight"] for f in (pair.base, pair.output))
    expected = before.double() + 0.5 * torch.tanh(before.double() @ theta.a.double().T) @ theta.b.double().T
    assert torch.equal(after, expected.float())
