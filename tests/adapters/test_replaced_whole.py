"""Adapters that replace tensors and adapt no module, against PEFT: LN tuning, a head alone, trained biases alone."""

import json
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file
from support.commands import Run
from support.method_zoo import CASES
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights

from converters import Weighted, load_adapter, merge, prepare_merge
from converters.errors import ConversionError, OptionError, PeanutError
from converters.outputs.lora import plan_lora_adapter
from converters.outputs.peft import plan_peft_adapter

ALONE = {"target_modules": DUMMY_TARGET_MODULES, "task_type": "SEQ_CLS"}
CONFIGS = {
    "ln": (peft.LNTuningConfig(task_type="CAUSAL_LM"), "llama"),
    "ln gpt2": (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["ln_1", "ln_f"]), "gpt2"),
    "ln bert": (peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]), "bert"),
    "ln linear": (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm", "q_proj"]), "llama"),
    "ln regex": (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=r".*\.1\..*layernorm"), "llama"),
    "head": (peft.LoraConfig(**ALONE), "bert"),
    "head of oft": (peft.OFTConfig(**ALONE), "bert"),
    "head of peanut": (peft.PeanutConfig(**ALONE), "bert"),
    "bitfit": (peft.LoraConfig(bias="all", **ALONE), "bert"),
}


def trained(name: str, folder: Path) -> tuple[Path, Path]:
    config, model = CONFIGS[name]
    train(MODELS[model](), config, folder / "base", folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    base, adapter = trained(name, tmp_path)
    plain = MODELS[CONFIGS[name][1]]()
    wanted = logits(reloaded(plain, base, adapter))
    merge(base, adapter, tmp_path / "merged")
    found = logits(type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert close(found, wanted)
    assert not close(logits(type(plain).from_pretrained(base, dtype=torch.float32).eval()), wanted)
    opened = load_adapter(adapter)
    assert not opened.modules
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(opened.saved)


def test_a_head_can_be_of_another_size(tmp_path: Path) -> None:
    base, adapter = trained("head", tmp_path)

    def widen(weights: dict[str, torch.Tensor]) -> None:
        for key in [key for key in weights if ".classifier." in key]:
            weights[key] = torch.cat([weights[key], weights[key][:1]])

    edit_weights(adapter / "adapter_model.safetensors", widen)
    merge(base, adapter, tmp_path / "merged", labels=["a", "b", "c", "d"])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]["3"] == "d"


def test_sums_resume_verification_and_inspection(tmp_path: Path, run_here: Run) -> None:
    """One adapter may replace tensors; others may update weights beside it."""
    train(MODELS["llama"](), CASES["vera"].on("llama"), tmp_path / "base", tmp_path / "vera")
    base, adapter = trained("ln", tmp_path)
    both = ["--adapter", adapter, "--adapter", f"{tmp_path / 'vera'}=0.5"]
    for output, options in (("sum", ()), ("resumed", ("--resume",))):
        done = run_here("peanut-merge", "--base", base, *both, "-o", tmp_path / output, *options)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / output / "model.safetensors" for output in ("sum", "resumed"))
    assert one.read_bytes() == two.read_bytes()
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *both)
    assert done.returncode == 0, done.stderr
    merged, theta = load_file(one), load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(merged["model.norm.weight"], theta["base_model.model.model.norm.ln_tuning_layers.weight"])
    actions = json.loads((tmp_path / "sum" / "peanut_manifest.json").read_text())
    assert actions["tensors"]["model.norm.weight"]["action"] == "replaced"
    assert actions["tensors"]["model.layers.0.self_attn.q_proj.weight"]["action"] == "updated"
    assert actions["adapters"][0]["method"] == "tensors replaced whole"
    edit_weights(one, lambda weights: weights["model.norm.weight"].add_(1))
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *both)
    assert done.returncode == 1

    done = run_here("peanut-inspect", adapter, "--base", base, "--json")
    facts = json.loads(done.stdout)
    assert facts["modules_to_save"][-1] == "model.norm.weight"
    assert facts["norms"] == []
    assert run_here("peanut-inspect", adapter, "--base", base).returncode == 0
    done = run_here("peanut-inspect", adapter, "--base", base, "--plot", tmp_path / "plot.png")
    assert done.returncode == 1
    assert "there is nothing to plot" in done.stderr


def test_what_replaces_tensors_has_no_weight_and_no_other_form(tmp_path: Path) -> None:
    base, adapter = trained("ln", tmp_path)
    with pytest.raises(
        OptionError, match=r"only replaces tensors, and its weight in the sum is 0.5.*leave the weight"
    ):
        merge(base, Weighted(load_adapter(adapter), 0.5), tmp_path / "merged")
    with pytest.raises(OptionError, match="nothing is scaled; leave it out"):
        load_adapter(adapter, scaling=1.0)
    plan = prepare_merge(base, load_adapter(adapter))
    with pytest.raises(ConversionError, match="updates no weight: it cannot be expressed as LoRA; merge it"):
        plan_lora_adapter(plan, tmp_path / "lora")
    with pytest.raises(ConversionError, match="only replaces tensors; the peft format writes PEANuT"):
        plan_peft_adapter(plan, tmp_path / "peft")


def test_the_digest_covers_what_is_replaced(tmp_path: Path) -> None:
    _, adapter = trained("ln", tmp_path)
    before = load_adapter(adapter).digest
    edit_weights(adapter / "adapter_model.safetensors", lambda weights: next(iter(weights.values())).add_(1))
    assert load_adapter(adapter).digest != before


def refused(name: str, folder: Path, match: str, change: object = None, **fields: object) -> None:
    base, adapter = trained(name, folder)
    if change is not None:
        edit_weights(adapter / "adapter_model.safetensors", change)
    edit_json(adapter / "adapter_config.json", **fields)
    with pytest.raises(PeanutError, match=match):
        merge(base, adapter, folder / "merged")


_NORM = "base_model.model.model.norm.ln_tuning_layers.weight"


def test_damaged_layers_are_refused(tmp_path: Path) -> None:
    refused("ln", tmp_path / "a", "model.norm.weight should have θ like the rest", lambda w: w.pop(_NORM) * 0)
    refused("ln", tmp_path / "b", "model.norm.weight has shape", lambda w: w.update({_NORM: torch.ones(31)}))
    extra = {_NORM.replace("norm.ln", "lm_head.ln"): torch.ones(2)}
    refused("ln", tmp_path / "c", "the weights adapt model.lm_head, the config's", lambda w: w.update(extra))
    extra = {_NORM.replace("ln_tuning_layers.weight", "ln_tuning_x"): torch.ones(2)}
    refused("ln", tmp_path / "d", "does not have PEFT's form", lambda w: w.update(extra))
    refused("ln", tmp_path / "e", "contain no θ .no key with ln_tuning_layers", lambda w: w.clear())
    refused("ln", tmp_path / "f", "'alpha' = 3 is not a setting known", alpha=3)
    refused("ln", tmp_path / "g", "contains 1 NaN", lambda w: w[_NORM][:1].fill_(torch.nan))


def test_a_head_that_is_not_alone_is_refused(tmp_path: Path) -> None:
    extra = {"base_model.model.bert.pooler.dense.lora_A.weight": torch.ones(2, 32)}
    refused("head", tmp_path / "a", "lora_A.weight is neither θ nor in modules_to_save", lambda w: w.update(extra))
    refused("head", tmp_path / "b", "contain no θ", lambda w: w.clear())
    refused("head", tmp_path / "c", "layer_replication = 2; expected a list of pairs", layer_replication=2)
    refused("bitfit", tmp_path / "d", "is neither θ nor in modules_to_save", bias="none")
    # a config that targets modules needs their θ: a head in its place is an incomplete adapter
    refused("head", tmp_path / "e", "contain no θ", target_modules=["query"])
    _, adapter = trained("head", tmp_path / "f")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(PeanutError, match="no θ in a known layout"):
        load_adapter(adapter)


def test_a_state_dict_in_memory_is_the_same_adapter(tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` keeps the name of the adapter and the weights of the base."""
    config, model = CONFIGS["ln bert"]
    adapted = train(MODELS[model](), config, tmp_path / "base", tmp_path / "adapter")
    folder = tmp_path / "whole"
    folder.mkdir()
    torch.save(adapted.state_dict(), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text((tmp_path / "adapter" / "adapter_config.json").read_text())
    whole, saved = load_adapter(folder), load_adapter(tmp_path / "adapter")
    assert whole.digest == saved.digest
    assert whole.embedded
    merge(tmp_path / "base", folder, tmp_path / "merged")
