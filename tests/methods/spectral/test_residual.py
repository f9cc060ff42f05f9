"""PiSSA and OLoRA, saved unconverted and merged into the original base, against the model that was trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.method_zoo import TARGETS, TASKS
from support.peft_methods import MODELS, close, logits, reloaded
from support.tiny_models import edit_json, edit_weights, tiny_llama
from torch import Tensor

from converters import load_adapter, merge, prepare_merge
from converters.api.exporting import export_onnx
from converters.errors import AdapterConfigError, BaseMismatchError, ConversionError, PeanutError, ThetaError
from converters.methods.spectral.residual import Olora, Pissa, ResidualLora
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter
from converters.outputs.onnx.plan import ExportOptions, Form

CASES = [
    ("pissa", "llama", {}),
    ("pissa", "llama", {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    ("pissa", "gpt2", {"fan_in_fan_out": True}),
    ("pissa", "bert", {"modules_to_save": ["classifier"]}),
    ("olora", "llama", {"lora_alpha": 6}),
    ("OLoRA", "bert", {"modules_to_save": ["classifier"], "bias": "all"}),
]


def trained(folder: Path, init: str, name: str = "llama", **settings: Any) -> PeftModel:
    """Save a base and an adapter on it, unconverted; the model that was trained, with what is left of the base."""
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "base")
    common = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[name], "task_type": TASKS[name]}
    adapted = get_peft_model(model, LoraConfig(**{**common, "init_lora_weights": init, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3 * parameter.std())
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


@pytest.mark.parametrize(("init", "name", "settings"), CASES)
def test_merged_logits_are_those_of_the_model_that_was_trained(
    init: str, name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = trained(tmp_path, init, name, **settings)
    wanted = logits(model)
    opened = load_adapter(tmp_path / "adapter")
    assert {opened.describe(module).name for module in opened.modules} == {init.lower()}
    merge(tmp_path / "base", opened, tmp_path / "merged")
    kind = type(MODELS[name]())
    assert close(logits(kind.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()), wanted)
    assert close(logits(reloaded(MODELS[name](), tmp_path / "base", tmp_path / "adapter")), wanted)
    edit_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=True)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "plain")  # as LoRA it would be another model
    assert not close(logits(kind.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()), wanted)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weights_are_those_that_were_trained(init: str, tmp_path: Path) -> None:
    model = trained(tmp_path, init)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted, found = model.merge_and_unload().state_dict(), load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert {name.split(".")[-2] for name in changed} == set(TARGETS["llama"])
    for name in found:
        assert (found[name] - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_in_bfloat16_is_merged_within_its_rounding(init: str, tmp_path: Path) -> None:
    """PEFT rounds what is left of the base, too: the two differ by a step of bfloat16 or two."""
    torch.manual_seed(1)
    model = tiny_llama().bfloat16()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"], init_lora_weights=init)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    wanted, found = adapted.merge_and_unload().state_dict(), load_file(tmp_path / "merged" / "model.safetensors")
    for name in found:
        assert found[name].dtype is torch.bfloat16
        assert (found[name].double() - wanted[name].double()).abs().max() <= 2**-7 * wanted[name].abs().max(), name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_exact_lora_of_twice_the_rank(init: str, tmp_path: Path) -> None:
    wanted = logits(trained(tmp_path, init))
    planned = plan_lora_adapter(prepare_merge(tmp_path / "base", tmp_path / "adapter"), tmp_path / "lora")
    assert write_lora_adapter(planned).recomputed > 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    assert close(logits(reloaded(MODELS["llama"](), tmp_path / "base", tmp_path / "lora")), wanted)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_that_was_left_is_refused(init: str, tmp_path: Path) -> None:
    """Of another model, too. With init_lora_weights true, PEFT's convention for it, it is right."""
    model = trained(tmp_path, init, lora_alpha=4)
    wanted = logits(model)
    left = model.unload()
    left.save_pretrained(tmp_path / "left" / "base")
    torch.manual_seed(5)
    tiny_llama().save_pretrained(tmp_path / "other" / "base")
    for folder in ("left", "other"):
        with pytest.raises(PeanutError, match="this is not the base, or it lacks that part already|are dependent"):
            merge(tmp_path / folder / "base", tmp_path / "adapter", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    edit_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=True)
    merge(tmp_path / "left" / "base", tmp_path / "adapter", tmp_path / "merged")
    assert close(logits(type(left).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()), wanted)


@pytest.mark.parametrize("named", ["me/PiSSA-Llama-2-7b-r128", "runs/llama-milora-residual"])
def test_lora_on_a_base_that_was_left_needs_that_base(named: str, tmp_path: Path) -> None:
    """The authors of PiSSA and MiLoRA save it as a model, and the adapter as a plain LoRA on it."""
    wanted = logits(model := trained(tmp_path, "pissa"))
    changes = {"init_lora_weights": True, "base_model_name_or_path": named}
    edit_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(BaseMismatchError, match="by its name a base that lacks what the adapter began with"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "forced", force_base=True)
    assert any(note.startswith("forced: the adapter was trained on") for note in result.plan.notes)
    left = model.unload()
    left.save_pretrained(tmp_path / Path(named).name)
    merge(tmp_path / Path(named).name, tmp_path / "adapter", tmp_path / "merged")
    assert close(logits(type(left).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()), wanted)


def test_what_peft_converted_is_plain_lora(tmp_path: Path) -> None:
    model = trained(tmp_path, "pissa")
    wanted = logits(model)
    with torch.no_grad():
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"], init_lora_weights="pissa")
        fresh = get_peft_model(type(MODELS["llama"]()).from_pretrained(tmp_path / "base"), config)
        fresh.peft_config["default"].init_lora_weights = True
        fresh.save_pretrained(tmp_path / "initial")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    opened = load_adapter(tmp_path / "converted")
    assert {opened.describe(module).name for module in opened.modules} == {"peanut"}
    merge(tmp_path / "base", opened, tmp_path / "merged")
    merged = type(MODELS["llama"]()).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert close(logits(merged), wanted)
    edit_json(tmp_path / "converted" / "adapter_config.json", init_lora_weights="pissa")  # converted, but says not
    with pytest.raises(BaseMismatchError, match="this is not the base"):
        merge(tmp_path / "base", tmp_path / "converted", tmp_path / "twice")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "randomized": (
        {"init_lora_weights": "pissa_niter_16"},
        "depends on random numbers .a randomized SVD",
    ),
    "corda": ({"init_lora_weights": "corda"}, "depends on statistics of the data; save it with PEFT's path_initial"),
    "loftq": ({"init_lora_weights": "loftq"}, "depends on how the base was quantized"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "depends on gradients"),
    "milora": ({"init_lora_weights": "milora"}, "depends on the smallest singular parts"),
    "dora": ({"use_dora": True}, "init_lora_weights is pissa, which is not read together with dora"),
    "left": (
        {"base_model_name_or_path": "me/PiSSA-Llama-2-7b-r128"},
        "a base that was saved after the initialisation",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_cannot_be_computed_again_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[case]
    trained(tmp_path, "pissa", use_dora=case == "dora")
    edit_json(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(AdapterConfigError, match=message):
        load_adapter(tmp_path / "adapter")


def test_nonlinear_lora_did_not_begin_so(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    with pytest.raises(AdapterConfigError, match="not read together with nonlinear-lora"):
        load_adapter(tmp_path / "adapter", layout="nonlinear-lora")


def test_olora_on_a_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT decomposes the weight as it is stored: factors of other shapes, which do not run."""
    trained(tmp_path, "pissa", "gpt2", fan_in_fan_out=True)
    edit_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights="olora")
    with pytest.raises(ThetaError, match="OLoRA is not defined for weights that are stored transposed"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "swapped": (lambda w: {key: tensor.T.contiguous() for key, tensor in w.items()}, "the config says r = 4"),
    "missing": (lambda w: w.pop(next(key for key in w if "lora_B" in key)), "lora_B is missing"),
    "misshapen": (
        lambda w: {k: t[..., :3].clone() if "lora_B" in k else t for k, t in w.items()},
        r"expected \(r, in\)",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_factors_are_refused(case: str, tmp_path: Path) -> None:
    change, message = DAMAGES[case]
    trained(tmp_path, "pissa")
    edit_weights(tmp_path / "adapter" / "adapter_model.safetensors", change)
    with pytest.raises(ThetaError, match=message):
        load_adapter(tmp_path / "adapter")


def began_with(method: type[ResidualLora], w0: Tensor, r: int) -> ResidualLora:
    """θ that is what the initialisation made it: the delta is zero."""
    theta = {"A": torch.ones(r, w0.shape[1]).double(), "B": torch.ones(w0.shape[0], r).double()}
    b, a = method(theta, {"scaling": 2.0}).taken(w0)
    return method({"A": a, "B": b / 2}, {"scaling": 2.0})


def test_what_the_base_does_not_determine_is_refused() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, 6).double())[0] for size in (10, 14))
    clear = u * torch.tensor([6.0, 5, 4, 3, 2, 1]).double() @ v.T
    twins = u * torch.tensor([6.0, 5, 4, 4, 2, 1]).double() @ v.T
    for r in (2, 3, 4, 6):
        assert began_with(Pissa, clear, r).delta(clear).abs().max() <= 1e-13
        if r != 3:
            assert began_with(Pissa, twins, r).delta(twins).abs().max() <= 1e-13
    with pytest.raises(ConversionError, match="the singular values 3 and 4 of W0 are equal in float32"):
        began_with(Pissa, clear, 3).delta(twins)
    assert began_with(Olora, clear, 3).delta(clear).abs().max() <= 1e-13
    dependent = clear.clone()
    dependent[:, 2] = dependent[:, 0] - dependent[:, 1]
    with pytest.raises(ConversionError, match="the first 3 columns of W0 are dependent in float32"):
        began_with(Olora, clear, 3).delta(dependent)
    assert began_with(Olora, dependent, 2).delta(dependent).abs().max() <= 1e-13
    with pytest.raises(ThetaError, match="r = 6 is more than a weight of these sizes has parts"):
        Pissa({"A": torch.ones(6, 5), "B": torch.ones(9, 6)}, {"scaling": 1.0})


@pytest.mark.parametrize("shape", [(10, 14), (14, 10), (12, 12)])
def test_what_pissa_took_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w0 = torch.randn(shape).double()
    u, values, v = torch.linalg.svd(w0, full_matrices=False)
    theta = {"A": torch.ones(3, shape[1]).double(), "B": torch.ones(shape[0], 3).double()}
    up, down = Pissa(theta, {"scaling": 2.0}).taken(w0)
    assert (up.shape, down.shape) == ((shape[0], 3), (3, shape[1]))
    assert torch.allclose(up @ down, u[:, :3] * values[:3] @ v[:3], rtol=1e-11, atol=1e-13)


def test_a_negative_scale_changes_nothing() -> None:
    torch.manual_seed(0)
    w0 = torch.randn(10, 14).double()
    for method in (Pissa, Olora):
        one = began_with(method, w0, 3)
        b, a = method(one.theta, {"scaling": -2.0}).taken(w0)
        other = method({"A": a, "B": b / -2}, {"scaling": -2.0})
        assert other.delta(w0).abs().max() <= 1e-13


@pytest.mark.slow  # traces a model
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_graph_does_not_merge_it_by_itself(init: str, tmp_path: Path) -> None:
    trained(tmp_path, init, "bert", modules_to_save=["classifier"])
    with pytest.raises(ConversionError, match=r"cannot merge a .* adapter by itself.*leave --self-merging out"):
        export_onnx(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "out", options=ExportOptions(form=Form.SELF_MERGING)
        )
