"""Every method of HF PEFT that is read, against PEFT: its unmerged forward pass, and its own merge in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.commands import Run
from support.damage import changed
from support.method_zoo import CASES
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_weights
from transformers import BertForSequenceClassification

from converters import load_adapter, merge, prepare_merge
from converters.errors import ConversionError
from converters.methods.table import LORA_VARIANTS, METHODS, PEFT_METHODS, PEFT_VARIANTS
from converters.outputs.lora import LoraOptions, plan_lora_adapter, write_lora_adapter

# one adapter of each method; its other forms, and other models, only in `make test`
_FIRST = {case.config: name for name, case in reversed(CASES.items())}
ON_MODELS = [
    pytest.param(
        name, model, marks=() if name == _FIRST[case.config] and model == case.models[0] else pytest.mark.slow
    )
    for name, case in CASES.items()
    for model in case.models
]


def trained(name: str, model: str, tmp_path: Path) -> tuple[Path, Path]:
    train(MODELS[model](), CASES[name].on(model), tmp_path / "base", tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def test_every_method_of_the_table_is_here() -> None:
    tried = {str(case.config.__name__.removesuffix("Config")).upper() for case in CASES.values()}
    assert (tried | {"IA3", "BEFT", "TRAINABLE_TOKENS"}) - {"LORA"} == {name.upper() for name in PEFT_METHODS}
    others = {"peanut", "red", "lora-embedding", "dora-embedding", "lora-convolution", "dora-convolution"}
    assert len(METHODS) == len(PEFT_METHODS) + len(PEFT_VARIANTS) + len(LORA_VARIANTS) + len(others & set(METHODS))


@pytest.mark.parametrize(("name", "model"), ON_MODELS)
def test_merged_logits_are_those_of_peft(name: str, model: str, tmp_path: Path) -> None:
    base, adapter = trained(name, model, tmp_path)
    plain = MODELS[model]()
    wanted = logits(reloaded(plain, base, adapter))
    result = merge(base, adapter, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.recomputed > 0
    found = logits(type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert close(found, wanted)
    assert not close(logits(type(plain).from_pretrained(base, dtype=torch.float32).eval()), wanted)


@pytest.mark.parametrize("name", ["shira", "supertuning"])
def test_a_place_that_stands_twice_counts_twice(name: str, tmp_path: Path) -> None:
    base, adapter = trained(name, "llama", tmp_path)

    def first_again(places: torch.Tensor) -> torch.Tensor:
        places[..., 1] = places[..., 0]
        return places

    edit_weights(adapter / "adapter_model.safetensors", changed("indices", first_again))
    plain = MODELS["llama"]()
    wanted = reloaded(plain, base, adapter).merge_and_unload().state_dict()
    merge(base, adapter, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    method = next(iter((opened := load_adapter(adapter)).modules))
    weight = torch.zeros(wanted[f"{method}.weight"].shape)
    assert torch.allclose(found[f"{method}.weight"], wanted[f"{method}.weight"], atol=1e-6)
    w0 = load_file(base / "model.safetensors")[f"{method}.weight"]
    assert torch.allclose(w0 + opened.method(method).delta(weight), wanted[f"{method}.weight"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_peft_in_float64(name: str, tmp_path: Path) -> None:
    model = CASES[name].models[0]
    base, adapter = trained(name, model, tmp_path)
    plain = type(MODELS[model]()).from_pretrained(base, dtype=CASES[name].base)
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    after = PeftModel.from_pretrained(plain, adapter).double().merge_and_unload().state_dict()
    opened = prepare_merge(base, load_adapter(adapter)).adapters[0].adapter  # with what the base's shapes say
    for module, theta in opened.modules.items():
        w0, wanted = (tensors[f"{module}.weight"].double() for tensors in (before, after))
        method = opened.method(module)
        oriented = method.transposed() if theta.fan_in_fan_out else method
        found = w0 + oriented.to("cpu", torch.float64).delta(w0)
        largest = (wanted - w0).abs().max()
        assert largest > 0
        assert (found - wanted).abs().max() <= CASES[name].float64 * largest


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rank])
def test_exact_lora_has_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    """Written as LoRA, and loaded by PEFT as LoRA: the same logits, at the rank that is promised."""
    model = CASES[name].models[0]
    base, adapter = trained(name, model, tmp_path)
    wanted = logits(reloaded(MODELS[model](), base, adapter))
    opened = load_adapter(adapter)
    assert max(opened.rank(module) or 0 for module in opened.modules) == CASES[name].rank
    planned = plan_lora_adapter(prepare_merge(base, opened), tmp_path / "lora")
    check = write_lora_adapter(planned)
    assert check.recomputed > 0
    assert close(logits(reloaded(MODELS[model](), base, tmp_path / "lora")), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.rank])
def test_full_rank_is_refused_as_lora(name: str, tmp_path: Path) -> None:
    base, adapter = trained(name, "llama", tmp_path)
    with pytest.raises(ConversionError, match=r"^the update of .*: it cannot be expressed as LoRA; merge it$"):
        plan_lora_adapter(prepare_merge(base, load_adapter(adapter)), tmp_path / "lora")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.rank])
def test_lora_of_a_given_rank_has_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    """Exactly at the rank of the weights, biases included; below it, the file lacks what is stated."""
    model = next(model for model in ("gpt2", "bert", "llama") if model in CASES[name].models)
    base, adapter = trained(name, model, tmp_path)
    plan = prepare_merge(base, adapter)
    exact = plan_lora_adapter(plan, tmp_path / "exact", options=LoraOptions(rank=96, max_error=0))
    found = write_lora_adapter(exact).approximation
    assert found is not None
    assert (set(found.modules.values()), found.exact) == ({0.0}, len(exact.modules))
    wanted = logits(reloaded(MODELS[model](), base, adapter))
    assert close(logits(reloaded(MODELS[model](), base, tmp_path / "exact")), wanted)
    fewer = plan_lora_adapter(plan, tmp_path / "fewer", options=LoraOptions(rank=24, max_error=0.99))
    stated = write_lora_adapter(fewer).approximation
    assert stated is not None
    assert stated.found == pytest.approx(max(stated.modules.values()), rel=1e-4)
    assert stated.error > 0


@pytest.mark.parametrize(("name", "bias"), [("vera", "all"), ("vera", "vera_only"), ("gralora", "gralora_only")])
def test_trained_biases_replace_those_of_the_base(name: str, bias: str, tmp_path: Path) -> None:
    case = CASES[name]
    config = replace(case, settings={**case.settings, "bias": bias}).on("bert")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(MODELS["bert"](), config, base, adapter)
    wanted = logits(reloaded(MODELS["bert"](), base, adapter))
    merge(base, adapter, tmp_path / "merged")
    assert close(logits(BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()), wanted)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {key for key in before if key.endswith("bias") and not torch.equal(before[key], after[key])}
    assert "bert.encoder.layer.0.attention.self.query.bias" in changed
    assert ("bert.encoder.layer.0.output.dense.bias" in changed) == (bias == "all")


def test_different_methods_are_summed_resumed_and_rechecked(tmp_path: Path, run_here: Run) -> None:
    """By low rank, by rows, by whole columns with biases, and from all of W0's shape, in one weight."""
    names = {"vera": 0.5, "oft": -0.3, "road 2": 0.7, "fourierft": 0.25, "lokr": 2.0}
    for number, name in enumerate(names):
        config = CASES[name].on("bert")
        config.modules_to_save, config.task_type = None, None  # only one adapter may bring a head
        train(MODELS["bert"](), config, tmp_path / f"base-{name}", tmp_path / name, seed=number)
    base = tmp_path / "base-vera"
    summed = [word for name, weight in names.items() for word in ("--adapter", f"{tmp_path / name}={weight}")]
    for output, options in (("sum", ()), ("resumed", ("--resume",))):
        done = run_here("peanut-merge", "--base", base, *summed, "-o", tmp_path / output, *options)
        assert done.returncode == 0, done.stderr
    one, two = (tmp_path / output / "model.safetensors" for output in ("sum", "resumed"))
    assert one.read_bytes() == two.read_bytes()
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *summed)
    assert done.returncode == 0, done.stderr
    before, after = load_file(base / "model.safetensors"), load_file(one)
    module = "bert.encoder.layer.1.attention.self.query"
    for parameter in ("weight", "bias"):
        w0 = before[f"{module}.{parameter}"].double()
        wanted = w0.clone()
        for name, weight in names.items():  # PEFT's own merge of each alone
            plain = BertForSequenceClassification.from_pretrained(base, dtype=torch.float64)
            merged = PeftModel.from_pretrained(plain, tmp_path / name).double().merge_and_unload().state_dict()
            wanted += weight * (merged[f"{module}.{parameter}"] - w0)
        found = after[f"{module}.{parameter}"].double()
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert (found - w0).abs().max() > 1e-3
