"""(IA)³, against HF PEFT's unmerged forward pass and its formula in float64."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file
from support.commands import Run
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_weights

from converters import Weighted, load_adapter, merge
from converters.errors import LayoutError, OptionError, ThetaError, VerificationError
from converters.methods.multiplicative.ia3 import Ia3, Ia3Update

TARGETS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
}


def config(model: str, **changes: object) -> IA3Config:
    targets, feedforward = TARGETS[model]
    settings = {
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": model == "gpt2",
        "modules_to_save": ["classifier"] if model == "bert" else None,
        "task_type": "SEQ_CLS" if model == "bert" else "CAUSAL_LM",
    }
    return IA3Config(**{**settings, **changes})


def trained(tmp_path: Path, name: str = "llama", **changes: object) -> tuple[Path, Path]:
    train(MODELS[name](), config(name, **changes), tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize("name", MODELS)
def test_merged_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """Linear layers, Conv1D, biases (scaled with the outputs), a head."""
    model = MODELS[name]()
    base, adapter = trained(tmp_path, name)
    wanted = logits(reloaded(model, base, adapter))
    result = merge(base, adapter, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.recomputed > 0
    found = logits(type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert close(found, wanted)
    assert not close(logits(type(model).from_pretrained(base, dtype=torch.float32).eval()), wanted)


def test_outputs_include_the_bias_and_inputs_do_not(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, "bert")
    merge(base, adapter, tmp_path / "merged")
    before, after, theta = (
        load_file(file)
        for file in (base / "model.safetensors", tmp_path / "merged" / "model.safetensors",
                     adapter / "adapter_model.safetensors")
    )  # fmt: skip
    layer = "bert.encoder.layer.1"
    key = theta[f"base_model.model.{layer}.attention.self.key.ia3_l"].double()
    name = f"{layer}.attention.self.key"
    assert torch.equal(after[f"{name}.weight"], (before[f"{name}.weight"].double() * key).float())
    assert torch.equal(after[f"{name}.bias"], (before[f"{name}.bias"].double() * key[:, 0]).float())
    assert not torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])
    dense = theta[f"base_model.model.{layer}.output.dense.ia3_l"].double()
    name = f"{layer}.output.dense"
    assert dense.shape == (1, 48)
    assert torch.equal(after[f"{name}.weight"], (before[f"{name}.weight"].double() * dense).float())
    assert torch.equal(after[f"{name}.bias"], before[f"{name}.bias"])


@pytest.mark.parametrize("scales", ["outputs", "inputs"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_blocks_give_the_whole_delta(scales: str, is_transposed: bool) -> None:
    torch.manual_seed(0)
    vector = torch.randn(10, 1) if scales == "outputs" else torch.randn(1, 14)
    plain = Ia3(vector, scales)
    theta = (plain.transposed() if is_transposed else plain).to("cpu", torch.float64)
    weight = torch.randn(10, 14).double()
    w0 = weight.T.contiguous() if is_transposed else weight
    update = theta.update((w0.shape[0], w0.shape[1]), torch.float64, torch.device("cpu"))
    assert isinstance(update, Ia3Update)
    assert not update.needs_pass
    merged = weight * vector.double()
    wanted = (merged.T if is_transposed else merged) - w0
    found = torch.cat(
        [update.add_to(torch.zeros_like(b), update.prepare(b, 4 * i)) for i, b in enumerate(torch.split(w0, 4))]
    )
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13)
    rows, columns = torch.tensor([1, 5]), torch.tensor([0, 3, 9])
    assert torch.allclose(
        theta.delta_at(w0[rows], rows, columns)[0], wanted[rows][:, columns], rtol=1e-12, atol=1e-13
    )


def test_a_wrong_vector_is_caught_in_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = trained(tmp_path, "bert")
    right = Ia3Update.prepare
    for bad in (lambda w0: w0.shape[1] == 1, lambda w0: w0.shape[1] > 1):
        wrong = lambda self, w0, start, bad=bad: right(self, w0, start) * (1.001 if bad(w0) else 1)  # noqa: E731
        monkeypatch.setattr(Ia3Update, "prepare", wrong)
        with pytest.raises(VerificationError, match="recomputed numbers are wrong"):
            merge(base, adapter, tmp_path / "merged")


def test_sums_resume_and_recheck(tmp_path: Path, run_here: Run) -> None:
    no_head = {"modules_to_save": None, "task_type": None}
    base, first = trained(tmp_path, "bert", **no_head)
    train(MODELS["bert"](), config("bert", **no_head), tmp_path / "other", tmp_path / "second", seed=7)
    merge(
        base, [Weighted(load_adapter(first), 0.5), Weighted(load_adapter(tmp_path / "second"), -0.25)], tmp_path / "s"
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "s"))
    module = "bert.encoder.layer.0.attention.self.value"
    one, two = (load_adapter(f).method(module).parts["l"].double() for f in (first, tmp_path / "second"))
    for name, change in (("weight", 0.5 * (one - 1) - 0.25 * (two - 1)),
                         ("bias", (0.5 * (one - 1) - 0.25 * (two - 1))[:, 0])):  # fmt: skip
        wanted = before[f"{module}.{name}"].double() * (1 + change)
        assert (after[f"{module}.{name}"].double() - wanted).abs().max() <= 1e-7 * wanted.abs().max()
    summed = ("--adapter", f"{first}=0.5", "--adapter", f"{tmp_path / 'second'}=-0.25")
    done = run_here("peanut-merge", "--base", base, *summed, "-o", tmp_path / "resumed", "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (
        tmp_path / "s" / "model.safetensors"
    ).read_bytes()
    done = run_here("peanut-inspect", tmp_path / "resumed", "--verify", "--full", "--base", base, *summed)
    assert done.returncode == 0, done.stderr


def test_it_cannot_be_expressed_as_lora(tmp_path: Path, run_here: Run) -> None:
    base, adapter = trained(tmp_path)
    done = run_here("peanut-merge", "--base", base, "--adapter", adapter, "--format", "lora", "-o", tmp_path / "lora")
    assert done.returncode == 1
    assert "(IA3), so it is not of low rank: it cannot be expressed as LoRA; merge it" in done.stderr
    shown = run_here("peanut-inspect", adapter, "--base", base)
    assert shown.returncode == 0, shown.stderr
    assert "ia3" in shown.stdout


def test_what_is_refused(tmp_path: Path) -> None:
    _, adapter = trained(tmp_path)
    with pytest.raises(OptionError, match="IA3 needs; leave it out"):
        load_adapter(adapter, scaling=0.5)
    (adapter / "adapter_config.json").rename(tmp_path / "aside.json")
    with pytest.raises(LayoutError, match=r"there is no adapter_config\.json next to it"):
        load_adapter(adapter)
    (tmp_path / "aside.json").rename(adapter / "adapter_config.json")
    edit_weights(
        adapter / "adapter_model.safetensors",
        lambda weights: {k: v.reshape(-1) if "layers.1" in k else v for k, v in weights.items()},
    )
    with pytest.raises(ThetaError, match=r"ia3_l has shape .* expected \(out, 1\) or \(1, in\)"):
        load_adapter(adapter)
