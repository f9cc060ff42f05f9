"""GLoRA changes a bias through the weight of its module: against HF PEFT, and through everything a merge does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import GloraConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.commands import Run
from support.method_zoo import TARGETS
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_json, edit_weights, tiny_llama
from transformers import BertForSequenceClassification

from converters import load_adapter, merge
from converters.errors import AdapterConfigError, BaseMismatchError, OptionError, ThetaError, VerificationError
from converters.files.header import read_header
from converters.methods.shift import Shift
from converters.models.checkpoint import open_checkpoint
from converters.plans.bias import through_weight, weight_of
from converters.plans.targets import find_direct_targets

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "vector": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    "through the weight alone": {"config_A_B": "none", "config_D_E": "none"},
    "no bias": {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
}


def trained(folder: Path, seed: int = 1, **settings: Any) -> tuple[Path, Path]:
    config = GloraConfig(target_modules=TARGETS["bert"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    for name, value in settings.items():
        setattr(config, name, value)
    train(MODELS["bert"](), config, folder / "base", folder / "adapter", seed)
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_biases_are_those_of_peft_in_float64(kind: str, tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, **KINDS[kind])
    plain = BertForSequenceClassification.from_pretrained(base, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.save_pretrained(tmp_path / "double")
    wanted = PeftModel.from_pretrained(plain, adapter).double().merge_and_unload().state_dict()
    merge(tmp_path / "double", adapter, tmp_path / "merged", force_base=True)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == wanted.keys()
    changed = {name for name in wanted if not torch.equal(wanted[name], before[name])}
    module = "bert.encoder.layer.0.intermediate.dense"
    assert (f"{module}.weight" in changed) == (kind != "through the weight alone")
    assert (f"{module}.bias" in changed) == (kind != "no bias")
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-12 * tensor.abs().max(), name


def test_sums_are_resumed_rechecked_and_merged_each(tmp_path: Path, run_here: Run) -> None:
    base, first = trained(tmp_path / "one", r=3)
    second = trained(tmp_path / "two", seed=2, config_C="vector", modules_to_save=None, task_type=None)[1]
    summed = ["--adapter", first, "--adapter", f"{second}=-0.5"]
    for output, options in (("sum", ()), ("resumed", ("--resume",)), ("each", ("--each",))):
        given = summed if output != "each" else ["--adapter", first]
        done = run_here("peanut-merge", "--base", base, *map(str, given), "-o", tmp_path / output, *options)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / output / "model.safetensors") for output in ("sum", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *map(str, summed))
    assert done.returncode == 0, done.stderr
    before, name = load_file(base / "model.safetensors"), "bert.encoder.layer.1.attention.self.query.bias"
    wanted = before[name].double()
    for adapter, weight in ((first, 1.0), (second, -0.5)):
        plain = BertForSequenceClassification.from_pretrained(base, dtype=torch.float64)
        alone = PeftModel.from_pretrained(plain, adapter).double().merge_and_unload().state_dict()
        wanted += weight * (alone[name] - before[name].double())
    assert (one[name].double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    edit_weights(tmp_path / "sum" / "model.safetensors", lambda w: {**w, name: w[name] * 1.001})
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *map(str, summed))
    assert done.returncode == 1


def test_what_a_bias_gets_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = trained(tmp_path, **KINDS["through the weight alone"])
    right = Shift.delta
    monkeypatch.setattr(Shift, "delta", lambda self, w0: right(self, w0) * 1.001)
    with pytest.raises(VerificationError, match=r"bias: .* recomputed numbers are wrong"):
        merge(base, adapter, tmp_path / "wrong")


def test_the_state_dict_of_a_whole_model(tmp_path: Path) -> None:
    """Keys as in memory: `glora_A.default.Xd`."""
    base, adapter = trained(tmp_path, r=3)
    digest = load_adapter(adapter).digest
    model = reloaded(MODELS["bert"](), base, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), adapter / "adapter_model.bin")
    assert load_adapter(adapter).digest == digest
    merge(base, adapter, tmp_path / "merged")
    found = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert close(logits(found), logits(model))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_that_is_read_in_blocks(tmp_path: Path, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.plans.bias.block_rows", lambda width: 4)
    w0, columns = torch.randn(10, 14), torch.randn(14, 1).double()
    save_file({"w": w0.T.contiguous() if transposed else w0}, tmp_path / "w.safetensors")
    found = through_weight(read_header(tmp_path / "w.safetensors")[0][0], transposed, columns)
    assert torch.allclose(found.column, w0.double() @ columns, rtol=1e-12)
    assert torch.allclose(found.spread, w0.double().abs() @ columns.abs(), rtol=1e-12)


def test_a_base_without_biases_is_refused(tmp_path: Path) -> None:
    biased = tiny_llama(attention_bias=True)
    train(biased, GloraConfig(target_modules=["q_proj"]), tmp_path / "base", tmp_path / "adapter")
    tiny_llama().save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"q_proj: θ adds to the bias of this module, and the base has none"):
        merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged", force_base=True)


def test_a_streamed_base_whose_bias_is_in_another_file(tmp_path: Path) -> None:
    biased = tiny_llama(attention_bias=True)
    train(biased, GloraConfig(target_modules=["q_proj"]), tmp_path / "base", tmp_path / "adapter")
    base = open_checkpoint(tmp_path / "base")
    found = find_direct_targets(base, [load_adapter(tmp_path / "adapter")])
    assert found is not None
    bias = next(target for target in found.targets if target.parameter == "bias")
    weight = bias.base_name.replace(".bias", ".weight")
    streamed: Any = replace(base, stream=object())  # type: ignore[arg-type]
    assert weight_of(streamed, found, bias).name == weight
    elsewhere = replace(base.tensors[weight], file=tmp_path / "other.safetensors")
    apart: Any = replace(streamed, tensors={**base.tensors, weight: elsewhere})
    with pytest.raises(OptionError, match="in another file of the base; leave out stream="):
        weight_of(apart, found, bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config_A_B": "vector"}, r"glora_A has \['Xd', 'Xu'\], which is not what config_A_B = 'vector' has"),
        ({"config_C": "none"}, "which is not what config_C = 'none' has"),
        ({"config_D_E": "lora"}, "config_D_E = 'lora'; expected vector, constant, none"),
        ({"config_A_B": ["lora"]}, r"config_A_B = \['lora'\]; expected lora"),
        ({"r": 4}, "θ has r = 3, the config says r = 4"),
    ],
)
def test_config_and_weights_have_to_agree(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    adapter = trained(tmp_path, r=3)[1]
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises((AdapterConfigError, ThetaError), match=message):
        load_adapter(adapter)


def test_a_path_that_is_off_and_has_numbers(tmp_path: Path) -> None:
    base, adapter = trained(tmp_path, r=3, config_C="none")
    edit_weights(
        adapter / "adapter_model.safetensors",
        lambda weights: {key: t + 1 if "glora_C.zeros" in key else t for key, t in weights.items()},
    )
    with pytest.raises(ThetaError, match=r"glora_C\.zeros contains other numbers than zeros"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
