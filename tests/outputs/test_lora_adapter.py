"""`--format lora`: exact LoRA adapters, held against PEFT's own forward pass and against the merge."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.commands import Run
from support.golden import CASES, Golden
from support.peft_oracle import logits_in_peft
from support.tiny_models import Pair, edit_weights, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from converters import Orientation, Tweaker, Weighted, load_adapter, merge, prepare_merge
from converters import save_adapter as save_native
from converters.errors import ConversionError, NonFiniteError, VerificationError
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter


def convert(base: Path, adapter: object, output: Path, **options: object) -> Path:
    converted = plan_lora_adapter(prepare_merge(base, adapter, **options), output)
    check = write_lora_adapter(converted, device="cpu")
    assert check.recomputed > 0
    return converted.output


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> lora_B @ lora_A, as PEFT would add it, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    state = {
        k.removeprefix("base_model.model."): v.double()
        for k, v in load_file(folder / "adapter_model.safetensors").items()
    }
    found = {}
    for name in [name for name in state if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        a, b = state[name], state[f"{module}.lora_B.weight"]
        r = config["rank_pattern"].get(module, config["r"])
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        assert a.shape[0] == b.shape[1] == r
        found[module] = alpha / r * b @ a
    return found


def logits(model_class: type, base: Path, adapter: Path | None) -> torch.Tensor:
    model = model_class.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12)).logits


@pytest.mark.parametrize(
    "settings", [{}, {"depth": 2, "act_fn": "tanh"}, {"target_modules": ["down_proj", "lm_head"]}]
)
def test_peft_computes_the_same_with_the_lora_as_with_peanut(make_pair: Callable[..., Pair], settings: dict) -> None:
    pair = make_pair(**settings)
    convert(pair.base, pair.adapter, pair.output)
    lora, peanut = (logits(AutoModelForCausalLM, pair.base, folder) for folder in (pair.output, pair.adapter))
    assert (lora - peanut).abs().max() <= 1e-5
    assert (lora - logits(AutoModelForCausalLM, pair.base, None)).abs().max() > 1e-2


@pytest.mark.parametrize("case", [c for c in CASES if c.folder.parent.name != "authors-llm"], ids=lambda c: c.name)
def test_the_authors_models_in_peft(case: Golden, tmp_path: Path) -> None:
    convert(case.base, case.adapter, tmp_path / "lora", **case.options)
    found, expected = logits_in_peft(case, tmp_path / "lora")
    assert (found - expected).abs().max() <= 1e-5


def test_every_orientation_and_their_sum(pair: Pair, tmp_path: Path) -> None:
    """Ranks add, and differ between modules; the sum is that of the merge in float64."""
    theta = torch.randn(3, 32), torch.randn(32, 3)
    rows = Tweaker(Orientation.ROWS, *theta, act_fn="sin_2pi", scaling=0.3)
    free = Tweaker(Orientation.FREE, torch.randn(2, 32), torch.randn(16, 2), act_fn="relu")
    save_native(tmp_path / "rows", {"model.layers.0.self_attn.q_proj": rows})
    save_native(tmp_path / "free", {"model.layers.1.self_attn.v_proj": free})
    adapters = [pair.adapter, Weighted(load_adapter(tmp_path / "rows"), -0.5), tmp_path / "free"]
    found = deltas(convert(pair.base, adapters, tmp_path / "lora"))
    merge(pair.base, adapters, pair.output)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    ranks = {"model.layers.0.self_attn.q_proj": 7, "model.layers.1.self_attn.v_proj": 6}
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    base, merged = (load_file(folder / "model.safetensors") for folder in (pair.base, pair.output))
    for module, delta in found.items():
        name = f"{module}.weight"
        assert (base[name].double() + delta - merged[name].double()).abs().max() <= 1e-6, module
    lora = logits(AutoModelForCausalLM, pair.base, tmp_path / "lora")
    assert (lora - logits(AutoModelForCausalLM, pair.output, None)).abs().max() <= 1e-5


def test_transposed_weights(make_pair: Callable[..., Pair]) -> None:
    """GPT-2 stores (in, out): the LoRA is of the weight as the model sees it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32))
    base, theta = make_pair(model=tiny_llama()).base.with_name("gpt2"), (torch.randn(3, 32), torch.randn(32, 3))
    model.save_pretrained(base)
    folder = base.with_name("theta")
    save_native(folder, {"transformer.h.0.attn.c_attn": Tweaker(Orientation.ROWS, *theta, scaling=0.1)})
    convert(base, folder, base.with_name("lora"))
    merge(base, folder, base.with_name("merged-gpt2"))
    lora = logits(AutoModelForCausalLM, base, base.with_name("lora"))
    assert (lora - logits(AutoModelForCausalLM, base.with_name("merged-gpt2"), None)).abs().max() <= 1e-5


def test_the_dtype(pair: Pair) -> None:
    convert(pair.base, pair.adapter, pair.output, dtype="bf16")
    assert {t.dtype for t in load_file(pair.output / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_a_factor_that_does_not_fit(pair: Pair) -> None:
    edit_weights(
        pair.adapter / "adapter_model.safetensors",
        lambda w: {k: v * 1e8 if "peanut_B" in k else v for k, v in w.items()},
    )
    with pytest.raises(NonFiniteError, match="does not fit F16 .*write it with dtype='fp32'"):
        convert(pair.base, pair.adapter, pair.output, dtype="fp16")
    assert not pair.output.exists()


def test_what_lora_cannot_say(pair: Pair, tmp_path: Path) -> None:
    theta = torch.randn(3, 32), torch.randn(32, 3)
    last = Tweaker(Orientation.ROWS, *theta, output_act_fn="tanh")
    save_native(tmp_path / "last", {"model.layers.0.self_attn.q_proj": last})
    with pytest.raises(ConversionError, match="ends in an activation .tanh.*merge it"):
        convert(pair.base, tmp_path / "last", pair.output)


def test_only_the_targets_are_read(make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.files.reader import TensorReader

    pair = make_pair()
    read: set[str] = set()
    original = TensorReader.row_blocks
    monkeypatch.setattr(
        TensorReader, "row_blocks", lambda self, info, rows: read.add(info.name) or original(self, info, rows)
    )
    convert(pair.base, pair.adapter, pair.output)
    base_tensors = set(load_file(pair.base / "model.safetensors"))
    assert {name.split(".")[-2] for name in read & base_tensors} == {"q_proj", "v_proj"}


def test_a_wrong_factor_is_caught(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.methods.factors import Factors
    from converters.methods.peanut.update import TweakerUpdate

    original = TweakerUpdate.factors

    def wrong(self: object, blocks: object) -> object:
        found = original(self, blocks)
        down = found.down.clone()
        down[0, 0] *= 1.00001
        return Factors(found.up, down)

    monkeypatch.setattr(TweakerUpdate, "factors", wrong)
    with pytest.raises(VerificationError, match="recomputed deltas are wrong"):
        convert(pair.base, pair.adapter, pair.output)
    assert not pair.output.exists()


def test_the_command(pair: Pair, run_here: Run) -> None:
    command = ["peanut-merge", "--format", "lora", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output]
    done = run_here(*command, "--dry-run")
    assert (done.returncode, pair.output.exists()) == (0, False)
    assert "would write" in done.stdout
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    assert "a LoRA adapter, r = 4, F32" in done.stdout
    assert "4 modules, whole: none" in done.stdout
    assert "--enable-lora --max-lora-rank 8 --lora-modules" in done.stdout
    facts = json.loads(run_here(*command, "--overwrite", "--json").stdout)
    assert (facts["r"], facts["max_lora_rank"], facts["verification"]["recomputed"] > 0) == (4, 8, True)
    for option in ("--each", "--share", "--resume", "--stream"):
        done = run_here(*command, option)
        assert (done.returncode, f"{option} is for --format merged" in done.stderr) == (1, True)
        assert "not for --format lora" in done.stderr
