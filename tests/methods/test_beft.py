"""BEFT against HF PEFT's unmerged model: biases that are added."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.commands import Run
from support.peft_methods import MODELS, close, logits, reloaded, train
from transformers import BertForSequenceClassification, LlamaForCausalLM

from converters import Weighted, load_adapter, merge, prepare_merge
from converters.errors import BaseMismatchError, ConversionError, OptionError, TargetError, ThetaError
from converters.inspection.norms import delta_norms
from converters.methods.dense.beft import Beft
from converters.models.checkpoint import open_checkpoint
from converters.outputs.lora import plan_lora_adapter

MODULE = "bert.encoder.layer.0.attention.self.value"


def trained(folder: Path, seed: int = 1, **settings: object) -> Path:
    config = peft.BeftConfig(**{"task_type": "SEQ_CLS", **settings})
    train(MODELS["bert"](), config, folder / f"base-{seed}", folder / f"adapter-{seed}", seed)
    return folder / f"adapter-{seed}"


def test_merged_logits_are_those_of_peft(tmp_path: Path) -> None:
    adapter, base = trained(tmp_path), tmp_path / "base-1"
    wanted = logits(reloaded(MODELS["bert"](), base, adapter))
    result = merge(base, adapter, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.recomputed == 64  # every number of two biases
    assert close(logits(BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()), wanted)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert {key for key in before if "encoder" in key and not torch.equal(before[key], after[key])} == {
        f"bert.encoder.layer.{layer}.attention.self.value.bias" for layer in (0, 1)
    }


def test_a_module_of_a_model_whose_biases_a_setting_turns_on(tmp_path: Path) -> None:
    """Names need no translation there."""
    llama = MODELS["llama"](attention_bias=True)
    train(llama, peft.BeftConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]), tmp_path / "b", tmp_path / "a")
    wanted = logits(reloaded(llama, tmp_path / "b", tmp_path / "a"))
    merge(tmp_path / "b", tmp_path / "a", tmp_path / "merged")
    assert close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), wanted)


def test_sums_resume_verification_and_norms(tmp_path: Path, run_here: Run) -> None:
    one, two = (trained(tmp_path, seed, task_type=None) for seed in (1, 2))
    base = tmp_path / "base-1"
    both = ["--adapter", f"{one}=0.5", "--adapter", f"{two}=-2"]
    for output, options in (("sum", ()), ("resumed", ("--resume",))):
        done = run_here("peanut-merge", "--base", base, *both, "-o", tmp_path / output, *options)
        assert done.returncode == 0, done.stderr
    files = [tmp_path / output / "model.safetensors" for output in ("sum", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *both)
    assert done.returncode == 0, done.stderr
    before, after = load_file(base / "model.safetensors"), load_file(files[0])
    added = [load_adapter(path).method(MODULE).parts["b"][0] for path in (one, two)]
    wanted = before[f"{MODULE}.bias"] + 0.5 * added[0] - 2 * added[1]
    assert torch.allclose(after[f"{MODULE}.bias"], wanted, rtol=1e-6, atol=1e-6)
    norm = delta_norms(load_adapter(one), open_checkpoint(base))[0]
    assert (norm.module, norm.shape) == (MODULE, (32, 1))
    assert norm.delta == pytest.approx(float(added[0].norm()), rel=1e-5)


def test_refusals(tmp_path: Path) -> None:
    adapter, base = trained(tmp_path), tmp_path / "base-1"
    with pytest.raises(ConversionError, match="updates no weight: it cannot be expressed as LoRA"):
        plan_lora_adapter(prepare_merge(base, load_adapter(adapter)), tmp_path / "lora")
    # another adapter that replaces the biases
    config = peft.LoraConfig(target_modules=["query"], bias="all")
    train(MODELS["bert"](), config, tmp_path / "base", tmp_path / "biases")
    mine = trained(tmp_path, 2, task_type=None)
    with pytest.raises(OptionError, match=r"value.bias is replaced by one adapter and updated by another"):
        merge(base, [mine, tmp_path / "biases"], tmp_path / "merged")
    config = peft.BeftConfig(task_type="CAUSAL_LM", target_modules=["v_proj"])
    train(MODELS["llama"](), config, tmp_path / "llama", tmp_path / "unbiased")
    with pytest.raises(TargetError, match="v_proj has no bias in the base, and a beft adapter changes biases"):
        merge(tmp_path / "llama", Weighted(load_adapter(tmp_path / "unbiased"), 2.0), tmp_path / "merged")
    with pytest.raises(ThetaError, match=r"b has shape \(8,\); expected b \(1, out\)"):
        Beft({"b": torch.ones(8)})
    with pytest.raises(BaseMismatchError, match=r"the weight has shape \(9, 1\), θ was trained for out = 8"):
        Beft({"b": torch.ones(1, 8)}).check_fits((9, 1))
