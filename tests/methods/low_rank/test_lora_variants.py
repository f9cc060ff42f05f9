"""Variants of LoRA, as HF PEFT has them: which are plain LoRA, which are not, and what does not go together."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, VeloraConfig
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.torch import load_file
from support.method_zoo import CASES, TARGETS
from support.paths import DATA
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights, tiny_llama
from transformers import LlamaForCausalLM, ViTForImageClassification

from converters import load_adapter, merge
from converters.api.exporting import export_onnx
from converters.errors import AdapterConfigError, BaseMismatchError, ConversionError, OptionError, ThetaError
from converters.methods.lora.qalora import QaLora
from converters.outputs.onnx.plan import ExportOptions, Form


def trained(folder: Path, model: str = "llama", **settings: Any) -> Path:
    config = LoraConfig(r=4, target_modules=TARGETS[model], **settings)
    train(MODELS[model](), config, folder / "base", folder / "adapter")
    return folder / "adapter"


def test_mica_trains_a_alone(tmp_path: Path) -> None:
    adapter = trained(tmp_path, init_lora_weights="mica")
    assert load_adapter(adapter).layout == "lora"
    wanted = logits(reloaded(tiny_llama(), tmp_path / "base", adapter))
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)), wanted)


@pytest.mark.parametrize("name", ["velora", "monteclora"])
def test_what_is_left_of_the_training_changes_nothing(name: str, tmp_path: Path) -> None:
    train(MODELS["llama"](), CASES[name].on("llama"), tmp_path / "base", tmp_path / "adapter")
    digest = load_adapter(tmp_path / "adapter").digest
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert any(name in key for key in load_file(file))
    edit_weights(file, lambda weights: {key: tensor for key, tensor in weights.items() if name not in key})
    edit_json(tmp_path / "adapter" / "adapter_config.json", **{f"{name}_config": None})
    assert load_adapter(tmp_path / "adapter").digest == digest


def test_what_the_config_does_not_explain(tmp_path: Path) -> None:
    adapter = trained(tmp_path, velora_config=VeloraConfig(num_groups=4))
    edit_json(adapter / "adapter_config.json", velora_config=None)
    with pytest.raises(ThetaError, match=r"lora_velora_embed does not have PEFT's form"):
        load_adapter(adapter)


@pytest.mark.parametrize("group", [1, 4])
def test_qalora_is_what_peft_computes_for_gptq_layers(group: int) -> None:
    torch.manual_seed(0)
    a, b, x = torch.randn(3, 12 // group), torch.randn(5, 3), torch.randn(2, 7, 12)
    layer = SimpleNamespace(
        lora_A={"default": SimpleNamespace(weight=a)},
        lora_B={"default": SimpleNamespace(weight=b)},
        lora_dropout={"default": torch.nn.Identity()},
        scaling={"default": 0.7},
        qalora_group_size={"default": group},
        in_features=12,
        training=False,
    )
    wanted = QALoraLinearVariant.forward(layer, "default", x, torch.zeros(2, 7, 5))
    method = QaLora.from_parts({"A": a, "B": b}, {"scaling": 0.7, "group_size": group})
    assert torch.allclose(x @ method.delta(torch.zeros(5, 12)).T, wanted, atol=1e-5)


def test_qalora_on_other_layers_is_plain_lora(tmp_path: Path) -> None:
    """HF PEFT ignores use_qalora there, so the adapter does not fit as QALoRA, and the message says why."""
    adapter = trained(tmp_path, use_qalora=True, qalora_group_size=4)
    assert load_adapter(adapter).describe("model.layers.0.self_attn.q_proj").name == "qalora"
    with pytest.raises(BaseMismatchError, match="HF PEFT ignores use_qalora: set it to false"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
    wanted = logits(reloaded(tiny_llama(), tmp_path / "base", adapter))
    edit_json(adapter / "adapter_config.json", use_qalora=False)
    merge(tmp_path / "base", adapter, tmp_path / "merged")
    assert close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)), wanted)


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_a_bias_on_b(model: str, tmp_path: Path) -> None:
    """In float64; the logits are compared with the other methods'."""
    adapter = trained(tmp_path, model, lora_bias=True, use_rslora=True, fan_in_fan_out=model == "gpt2")
    base, plain = tmp_path / "base", MODELS[model]()
    double = type(plain).from_pretrained(base, dtype=torch.float64)
    double.save_pretrained(tmp_path / "double")
    state = PeftModel.from_pretrained(double, adapter).double().merge_and_unload().state_dict()
    merge(tmp_path / "double", adapter, tmp_path / "exact", force_base=True)
    found, before = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "double"))
    changed = [name for name in found if name.endswith(".bias") and not torch.equal(found[name], before[name])]
    assert len(changed) == len(load_adapter(adapter).modules)
    prefix = "" if set(changed) <= set(state) else "transformer."
    for name in changed:
        assert (found[name] - state[prefix + name]).abs().max() <= 1e-12 * found[name].abs().max()


def test_qalora_without_its_group_size(tmp_path: Path) -> None:
    adapter = trained(tmp_path, use_qalora=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["qalora_group_size"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterConfigError, match="'qalora_group_size' is missing"):
        load_adapter(adapter)


def test_a_bias_on_b_is_not_swapped_in_onnx(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "task"
    fresh = ViTForImageClassification.from_pretrained(DATA / "vit-tiny" / "base", dtype=torch.float32)
    train(fresh, LoraConfig(r=4, target_modules=["q_proj", "fc2"], lora_bias=True), base, adapter)
    with pytest.raises(ConversionError, match="is one of a bias, beside that of the weight: it cannot be expressed"):
        export_onnx(base, adapter, tmp_path / "swapped", options=ExportOptions(form=Form.SWAPPABLE))


def test_a_bias_on_b_that_the_config_does_not_have(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "bert", lora_bias=True)
    edit_json(adapter / "adapter_config.json", lora_bias=False)
    with pytest.raises(AdapterConfigError, match="lora_bias is off, but the weights contain parameters"):
        load_adapter(adapter)
    edit_json(adapter / "adapter_config.json", lora_bias=True)
    name = "bert.encoder.layer.1.attention.self.query.lora_B.bias"
    edit_weights(
        adapter / "adapter_model.safetensors", lambda weights: {k: t for k, t in weights.items() if name not in k}
    )
    with pytest.raises(ThetaError, match=r"query: lora_B\.bias is missing"):
        load_adapter(adapter)


def test_a_bias_on_b_needs_one_in_the_base(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        adapter = trained(tmp_path, lora_bias=True)
    cure = r"from_pretrained\(BASE, (attention|mlp)_bias=True\).*serve it with PEFT's PeftModel"
    with pytest.raises(BaseMismatchError, match=rf"θ adds to the bias of this module, and the base has none.*{cure}"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


def test_kasa_whose_cut_is_not_determined(tmp_path: Path) -> None:
    """All singular values of an orthogonal weight are one."""
    config = LoraConfig(r=4, target_modules=["q_proj"], kasa_config=KasaConfig())
    train(tiny_llama(), config, tmp_path / "base", tmp_path / "adapter")
    orthogonal = tiny_llama()
    for layer in orthogonal.model.layers:
        torch.nn.init.orthogonal_(layer.self_attn.q_proj.weight)
    orthogonal.save_pretrained(tmp_path / "orthogonal")
    with pytest.raises(ConversionError, match="the singular values 28 and 29 of W0 are equal in float32"):
        merge(tmp_path / "orthogonal", tmp_path / "adapter", tmp_path / "merged", force_base=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kasa_config": {"rho": 1}}, "expected an object of beta and gamma"), ({"r": 5}, "lora_A has 4 rows")],
)
def test_kasa_whose_config_disagrees(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapter = trained(tmp_path, kasa_config=KasaConfig())
    edit_json(adapter / "adapter_config.json", **change)
    with pytest.raises((AdapterConfigError, ThetaError), match=message):
        load_adapter(adapter)


BD: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"target_modules_bd_b": ["proj"]}, "is in both target_modules_bd_a and target_modules_bd_b"),
    "neither": ({"target_modules_bd_b": ["q_proj"]}, "v_proj is in neither of target_modules_bd_a and"),
    "other blocks": ({"nblocks": 4}, "the blocks do not fit"),
    "an unknown setting": ({"rotate": 1}, "expected an object of match_strict, nblocks"),
    "a list of nonsense": ({"target_modules_bd_a": "down_proj"}, "expected a list of parts of module names"),
    "a number of nonsense": ({"nblocks": "2"}, "nblocks = '2'; expected an integer"),
}


@pytest.mark.parametrize("case", BD)
def test_bd_lora_whose_config_disagrees(case: str, tmp_path: Path) -> None:
    changes, message = BD[case]
    config = BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2)
    adapter = trained(tmp_path, use_bdlora=config)
    load_adapter(adapter)
    edit_json(adapter / "adapter_config.json", use_bdlora={**vars(config), **changes})
    with pytest.raises((AdapterConfigError, ThetaError), match=message):
        load_adapter(adapter)


def test_bd_lora_without_its_flag_does_not_fit(tmp_path: Path) -> None:
    config = BdLoraConfig(target_modules_bd_a=["down_proj"], nblocks=2, match_strict=False)
    adapter = trained(tmp_path, use_bdlora=config)
    edit_json(adapter / "adapter_config.json", use_bdlora=None)
    with pytest.raises(BaseMismatchError, match=r"down_proj.weight: the weight has shape \(32, 72\)"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")


def test_variants_are_not_combined(tmp_path: Path) -> None:
    adapter = trained(tmp_path, use_dora=True)
    edit_json(adapter / "adapter_config.json", lora_bias=True)
    with pytest.raises(AdapterConfigError, match="use_dora and lora_bias are variants of LoRA that HF PEFT does not"):
        load_adapter(adapter)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_that_is_trained_twice_is_refused(tmp_path: Path, bias: str) -> None:
    adapter = trained(tmp_path, "bert", lora_bias=True, bias=bias)
    with pytest.raises(OptionError, match="query.bias is saved whole by the adapter, and updated by it as well"):
        merge(tmp_path / "base", adapter, tmp_path / "merged")
