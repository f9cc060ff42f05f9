"""Reading an adapter: what is accepted, and every way it can be wrong with the message it gets."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import Pair, edit_config

from converters import PeanutError, load_adapter, merge
from converters.errors import AdapterConfigError, LayoutError, ThetaError

KEY = "base_model.model.model.layers.0.self_attn.q_proj.peanut_"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_facts_of_an_adapter(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(depth=2, act_fn="tanh", r=3, scaling=0.25, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapter = load_adapter(pair.adapter)
    assert adapter.layout == "hf-peft"
    assert "PEANUT" in adapter.evidence
    theta = adapter.describe("model.layers.1.self_attn.v_proj").facts
    assert (theta["depth"], theta["act_fn"], theta["scaling"]) == (2, "tanh", 0.25)
    assert adapter.rank("model.layers.1.self_attn.v_proj") == 3
    assert adapter.weight_shape("model.layers.1.self_attn.v_proj") == (16, None)
    assert list(adapter.saved) == ["lm_head.weight"]
    per_layer = 2 * 3 * 32 + 4 * 9 + 2 * 3 * 16 + 4 * 9  # q_proj and v_proj
    assert adapter.parameter_count == 2 * per_layer


def test_a_pickle_of_tensors_gives_the_same_merge(pair: Pair) -> None:
    merge(pair.base, pair.adapter, pair.output)
    digest = load_adapter(pair.adapter).digest
    file = pair.adapter / "adapter_model.safetensors"
    torch.save(load_file(file), pair.adapter / "adapter_model.bin")
    file.unlink()
    assert load_adapter(pair.adapter).digest == digest
    merge(pair.base, pair.adapter, pair.output.with_name("again"))
    first, second = ((pair.output.with_name(n) / "model.safetensors").read_bytes() for n in ("merged", "again"))
    assert first == second


def test_a_pickle_that_runs_code_is_not_opened(pair: Pair, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (pair.adapter / "adapter_model.safetensors").unlink()
    for content in (pickle.dumps(Bomb()), None):
        file = pair.adapter / "adapter_model.bin"
        if content is None:
            torch.save({"x": Bomb()}, file)
        else:
            file.write_bytes(content)
        with pytest.raises(ThetaError, match="could run code"):
            load_adapter(pair.adapter)
    assert not (tmp_path / "exploded").exists()


def test_the_digest_knows_theta_and_the_mathematics_and_nothing_else(pair: Pair) -> None:
    digest = load_adapter(pair.adapter).digest
    edit_config(pair.adapter, inference_mode=False, peft_version="9.9", base_model_name_or_path="x/y")
    assert load_adapter(pair.adapter).digest == digest
    edit_config(pair.adapter, scaling=0.50001)
    assert load_adapter(pair.adapter).digest != digest
    edit_config(pair.adapter, scaling=0.5)
    edit_weights(pair.adapter, lambda w: w[f"{KEY}A.weight"].view(-1)[:1].add_(1e-3))
    assert load_adapter(pair.adapter).digest != digest


CONFIGS = {
    "unknown setting": ({"alpha": 0.1}, r"'alpha' = 0.1 is not a setting known to this version"),
    "unknown switch": ({"residual": True}, r"'residual' = True is not a setting"),
    "prelu": ({"act_fn": "prelu"}, "'prelu' has trained parameters of its own, and PEFT did not save them"),
    "xielu": ({"act_fn": "xielu"}, "'xielu' has trained parameters of its own"),
    "unknown activation": ({"act_fn": "sine"}, "act_fn 'sine' is unknown; known are gelu, "),
    "rank of the config": ({"r": 5}, r"peanut_A has shape \(4, 32\), expected \(5, 32\) \(r = 5 in the config\)"),
    "depth of the config": ({"depth": 1}, r"peanut_encoders.0 is missing \(depth 1\)"),
    "no rank": ({"r": 0}, "r = 0; expected an integer of at least 1"),
    "rank as text": ({"r": "4"}, "r = '4'; expected an integer"),
    "negative depth": ({"depth": -1}, "depth = -1; expected"),
    "scaling as text": ({"scaling": "1"}, "scaling = '1'; expected a finite number"),
    "infinite scaling": ({"scaling": float("inf")}, "scaling = inf; expected a finite number"),
    "activation as a list": ({"act_fn": ["relu"]}, "expected the name of an activation"),
    "base as a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path = 3; expected a str or null"),
    "mapping as text": ({"auto_mapping": "x"}, "auto_mapping = 'x'; expected a dict or null"),
    "other targets": (
        {"target_modules": ["k_proj"]},
        "the weights adapt model.layers.0.self_attn.q_proj, the config",
    ),
    "other layers": ({"layers_to_transform": [0]}, "the weights adapt model.layers.1.self_attn.q_proj, the config"),
    "excluded": ({"exclude_modules": ["q_proj"]}, "the weights adapt model.layers.0.self_attn.q_proj, the config"),
    "broken regex": ({"target_modules": "(("}, "a pattern is not a valid regular expression"),
    "odd targets": ({"target_modules": [1]}, r"target_modules = \[1\] does not have PEFT's form"),
    "head that is not there": (
        {"modules_to_save": ["lm_head"]},
        r"modules_to_save is \['lm_head'\], but the weights",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_disagrees_is_refused(pair: Pair, case: str) -> None:
    changes, message = CONFIGS[case]
    edit_config(pair.adapter, **changes)
    with pytest.raises((AdapterConfigError, ThetaError), match=message):
        load_adapter(pair.adapter)


def test_an_unknown_setting_that_is_empty_is_inert(pair: Pair) -> None:
    edit_config(pair.adapter, rank_pattern={}, something=None)
    load_adapter(pair.adapter)


def set_number(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda w: w[f"{KEY}B.weight"].view(-1)[3:5].fill_(value)


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing B": (lambda w: w.pop(f"{KEY}B.weight"), "q_proj: peanut_B is missing .* incomplete"),
    "missing A": (lambda w: w.pop(f"{KEY}A.weight"), "q_proj: peanut_A is missing"),
    "extra hidden layer": (
        lambda w: w.update({f"{KEY}encoders.0.weight": torch.zeros(4, 4)}),
        "peanut_encoders.0 is more than depth 0",
    ),
    "extra tensor": (
        lambda w: w.update({"base_model.model.model.norm.weight": torch.zeros(32)}),
        "model.norm.weight is neither θ nor in modules_to_save",
    ),
    "foreign prefix": (lambda w: w.update({"x.weight": torch.zeros(1)}), "x.weight is neither θ nor in modules_to_"),
    "odd part": (lambda w: w.update({f"{KEY}C.weight": torch.zeros(1)}), "peanut_C.weight does not have PEFT's form"),
    "A without B's shape": (
        lambda w: w.update({f"{KEY}B.weight": torch.zeros(32, 5)}),
        r"peanut_B has shape \(32, 5\), expected \(32, 4\)",
    ),
    "nan": (set_number(float("nan")), "B.weight contains 2 NaN or Inf values out of 128; the training diverged"),
    "inf": (set_number(float("inf")), "peanut_B.weight contains 2 NaN or Inf"),
    "integers": (lambda w: w.update({f"{KEY}A.weight": torch.zeros(4, 32, dtype=torch.int32)}), "is torch.int32"),
    "nothing": (lambda w: w.clear(), "contain no θ"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_whole_are_refused(pair: Pair, case: str) -> None:
    change, message = WEIGHTS[case]
    edit_weights(pair.adapter, change)
    with pytest.raises(ThetaError, match=message):
        load_adapter(pair.adapter)


@pytest.mark.parametrize("keep", [0, 4, 100, 1000, -1])
def test_a_truncated_file_is_refused(pair: Pair, keep: int) -> None:
    file = pair.adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with pytest.raises(ThetaError, match=r"not a whole safetensors file .* truncated"):
        load_adapter(pair.adapter)
    torch.save(load_file_bytes(whole), pair.adapter / "adapter_model.bin")
    file.unlink()
    pickled = (pair.adapter / "adapter_model.bin").read_bytes()
    (pair.adapter / "adapter_model.bin").write_bytes(pickled[:keep])
    with pytest.raises(ThetaError, match=r"not a complete torch file|could run code"):
        load_adapter(pair.adapter)


def load_file_bytes(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def test_folders_that_are_something_else(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="does not exist; expected the folder of a trained adapter"):
        load_adapter(tmp_path / "nowhere")
    with pytest.raises(ThetaError, match="not a complete torch file|could run code"):
        load_adapter(pair.adapter / "adapter_config.json")
    with pytest.raises(LayoutError, match=r"is a model without θ; expected an adapter"):
        load_adapter(pair.base)
    with pytest.raises(LayoutError, match="contains adapter; give one of these"):
        load_adapter(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LayoutError, match=r"contains neither adapter_config\.json nor weights"):
        load_adapter(tmp_path / "empty")
    edit_config(pair.adapter, peft_type="NEWER_THAN_THIS")
    with pytest.raises(
        LayoutError, match="peft_type NEWER_THAN_THIS; supported are PEANUT, LORA, .* IA3,.* merge it"
    ):
        load_adapter(pair.adapter)
    (pair.adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterConfigError, match="cannot read the adapter config"):
        load_adapter(pair.adapter)


def test_a_config_without_weights(pair: Pair) -> None:
    (pair.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ThetaError, match=r"no adapter_model.safetensors nor adapter_model.bin"):
        load_adapter(pair.adapter)


def test_every_refusal_is_a_peanut_error() -> None:
    from converters import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert len(classes) > 15
    assert all(issubclass(c, PeanutError) for c in classes)
