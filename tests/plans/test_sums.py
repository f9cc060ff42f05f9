"""Several adapters at once: every delta from the original W0, weighted, summed; heads from one only."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import run
from support.golden import CASES, VISION, Golden
from support.native_variants import MODULE, variants
from support.tiny_models import Pair, tiny_llama, unmerged
from support.tiny_models import save_adapter as save_peft_adapter
from transformers import LlamaForCausalLM

from converters import Weighted, load_adapter, merge, prepare_merge, save_adapter
from converters.adapters.opening import parse_weight
from converters.errors import OptionError

THETA = Golden(VISION / "multilayer_depth6_qv", "theta.safetensors")


def delta_of(base: Path, adapter: Path, name: str) -> torch.Tensor:
    """PEFT's own delta weight in float64, from the original W0."""
    model = unmerged(LlamaForCausalLM, base, adapter).double()
    module = dict(model.named_modules())[f"base_model.model.{name}"]
    return module.get_delta_weight("default").detach()


@pytest.fixture
def two(pair: Pair) -> tuple[Pair, Path]:
    """An adapter of q_proj, v_proj and one of q_proj, down_proj, another in everything."""
    style = pair.adapter.with_name("style")
    torch.manual_seed(0)
    save_peft_adapter(
        tiny_llama(), style, seed=5, r=3, depth=1, act_fn="tanh", target_modules=["q_proj", "down_proj"]
    )
    return pair, style


@pytest.mark.parametrize("weight", [1.0, 0.5, -2.0])
def test_a_sum_is_the_sum_of_pefts_deltas(two: tuple[Pair, Path], weight: float) -> None:
    pair, style = two
    result = merge(pair.base, [pair.adapter, Weighted(load_adapter(style), weight)], pair.output)
    before, after = (load_file(f / "model.safetensors") for f in (pair.base, pair.output))
    seen = set()
    for layer in range(2):
        for kind, adapters in {
            "self_attn.q_proj": {pair.adapter: 1.0, style: weight},
            "self_attn.v_proj": {pair.adapter: 1.0},
            "mlp.down_proj": {style: weight},
        }.items():
            name = f"model.layers.{layer}.{kind}"
            delta = sum(w * delta_of(pair.base, adapter, name) for adapter, w in adapters.items())
            expected = before[f"{name}.weight"].double() + delta
            assert (after[f"{name}.weight"] - expected).abs().max() <= 1e-7
            seen.add(f"{name}.weight")
    assert {n for n in before if not torch.equal(before[n], after[n])} == seen
    assert result.verification.max_ulp <= 0.5 + 2.0**-11


def test_orientations_and_layouts_mix(pair: Pair, tmp_path: Path) -> None:
    """Columns, rows, free and an output activation on one weight."""
    names = ["deep", "sine", "lora", "output activation"]
    expected = load_file(pair.base / "model.safetensors")[f"{MODULE}.weight"].double()
    for name in names:
        tweaker, delta = variants()[name]
        save_adapter(tmp_path / name, {MODULE: tweaker})
        expected = expected + delta
    result = merge(pair.base, [tmp_path / name for name in names], pair.output)
    found = load_file(pair.output / "model.safetensors")[f"{MODULE}.weight"]
    assert (found - expected).abs().max() <= 2.0**-23 * expected.abs().max()
    assert result.verification.recomputed == 8 * 8


@pytest.mark.parametrize("kinds", [("deep", "lora"), ("sine", "lora"), ("sine", "deep")])
def test_a_wrong_sum_is_found_by_the_verification(
    pair: Pair, tmp_path: Path, kinds: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters.errors import VerificationError
    from converters.evaluation import blocks as tensor_blocks

    for name in kinds:
        save_adapter(tmp_path / name, {MODULE: variants()[name][0]})
    right = tensor_blocks.merge_rows
    monkeypatch.setattr(tensor_blocks, "merge_rows", lambda w, updates, start: right(w, updates[:1], start))
    with pytest.raises(VerificationError, match="recomputed numbers are wrong"):
        merge(pair.base, [tmp_path / name for name in kinds], pair.output)


@pytest.mark.slow
def test_the_order_does_not_matter_and_manifest_and_card_tell_of_all(two: tuple[Pair, Path]) -> None:
    pair, style = two
    done = run(
        "peanut-merge", "--base", pair.base, "--adapter", pair.adapter, "--adapter", f"{style}=0.5",
        "-o", pair.output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    merge(pair.base, [Weighted(load_adapter(style), 0.5), pair.adapter], pair.output.with_name("turned"))
    one, other = (load_file(f / "model.safetensors") for f in (pair.output, pair.output.with_name("turned")))
    assert all(torch.allclose(one[n], other[n], rtol=0, atol=2e-8) for n in one)
    manifest = (pair.output / "peanut_manifest.json").read_text()
    assert '"weight": 0.5' in manifest
    assert load_adapter(style).digest in manifest
    card = (pair.output / "README.md").read_text()
    assert "with adapter-style" in card
    assert "0.5 times style: r = 3, depth = 1, act_fn = tanh, scaling = 0.5" in card


def test_a_head_can_come_from_one_only(tmp_path: Path) -> None:
    other = next(c for c in CASES if c.folder.name == "vanilla_qv" and c.file == "theta.safetensors")
    with pytest.raises(OptionError, match="both replace tensors .* a head can come from one adapter only"):
        prepare_merge(THETA.base, [THETA.adapter, other.adapter])
    headless = {m: load_adapter(other.adapter).tweaker(m) for m in load_adapter(other.adapter).modules}
    save_adapter(tmp_path / "headless", headless)
    plan = prepare_merge(THETA.base, [tmp_path / "headless", THETA.adapter])
    assert plan.head.path == THETA.adapter
    assert all(len(t.terms) == 2 for t in plan.tensors if t.terms)


@pytest.mark.parametrize(("text", "expected"), [
    ("gsm8k", ("gsm8k", 1.0)),
    ("style=0.5", ("style", 0.5)),
    ("user/name=-1e-2", ("user/name", -0.01)),
    ("./a=b/c", ("./a=b/c", 1.0)),
    ("./a=b/c=2", ("./a=b/c", 2.0)),
])  # fmt: skip
def test_weights_on_the_command_line(text: str, expected: tuple[str, float]) -> None:
    assert parse_weight(text) == expected


@pytest.mark.parametrize("text", ["style=half", "style=nan", "style=inf"])
def test_what_is_no_weight(text: str) -> None:
    with pytest.raises(OptionError, match="is not a valid weight; expected a finite number"):
        parse_weight(text)


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=0.5").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_weight("lr=0.5") == ("lr=0.5", 1.0)


def test_options_apply_to_those_that_need_them(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """A scale for the adapter that stores none; an option nobody needs is refused."""
    stated = {m: load_adapter(THETA.adapter).tweaker(m) for m in load_adapter(THETA.adapter).modules}
    save_adapter(tmp_path / "stated", stated)
    plan = prepare_merge(THETA.base, [tmp_path / "stated", THETA.adapter], scaling=0.25)
    scalings = {w.adapter.path: {t.settings["scaling"] for t in w.adapter.modules.values()} for w in plan.adapters}
    assert scalings == {tmp_path / "stated": {1.0}, THETA.adapter: {0.25}}
    with pytest.raises(OptionError, match="scaling=0.25 applies to none of the adapters"):
        prepare_merge(THETA.base, [tmp_path / "stated", tmp_path / "stated"], scaling=0.25)
    with pytest.raises(OptionError, match="layout='lora' applies to none of the adapters"):
        prepare_merge(THETA.base, [tmp_path / "stated", THETA.adapter], layout="lora")
    with pytest.raises(OptionError, match="no adapter was given"):
        prepare_merge(THETA.base, [])
