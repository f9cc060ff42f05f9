"""`--format lora` for adapters of parameters (`target_parameters`), against PEFT: its own form, and vLLM's."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.tiny_models import save_on_parameters, save_per_expert, tiny_gpt_oss, tiny_mixtral, tiny_qwen3_moe
from transformers import AutoModelForCausalLM, PreTrainedModel

from converters import Weighted, load_adapter, merge, prepare_merge
from converters.errors import ConversionError
from converters.outputs.lora import LoraAdapterPlan, LoraOptions, plan_lora_adapter, write_lora_adapter

MODELS = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe, "gpt_oss": tiny_gpt_oss}
TOKENS = torch.arange(3, 40).view(1, -1)
RANKS = {r".*\.mlp\.experts\.gate_up_proj": 2}


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: torch.nn.Module) -> torch.Tensor:
    for module in model.modules():
        if hasattr(module, "config"):  # the grouped kernels need sizes that are multiples of 16 bytes
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(TOKENS).logits


def adapted(folder: Path, adapter: str) -> torch.Tensor:
    """The oracle: PEFT's forward pass, nothing merged."""
    return logits(PeftModel.from_pretrained(load(folder / "base"), folder / adapter))


def set_up(folder: Path, name: str, fused: bool = False, **settings: object) -> None:
    model = MODELS[name]()
    model.save_pretrained(folder / "base")
    if fused:
        state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(state, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_on_parameters(model, folder / "adapter", **settings)


def convert(folder: Path, *others: Weighted, **options: object) -> LoraAdapterPlan:
    plan = prepare_merge(folder / "base", [folder / "adapter", *others], dtype="fp32")
    planned = plan_lora_adapter(plan, folder / "lora", options=LoraOptions(**options))
    assert write_lora_adapter(planned, device="cpu").recomputed > 0
    return planned


def compare(found: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor) -> None:
    assert (plain - wanted).abs().max() > 1e-2 * wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same(name: str, tmp_path: Path) -> None:
    """Also of square experts (Qwen3-MoE's gate_up_proj), beside modules, with ranks and scales of their own."""
    beside = {"target_modules": ["q_proj"], "rank_pattern": RANKS, "alpha_pattern": {"gate_up_proj": 7}}
    set_up(tmp_path, name, **beside)
    assert convert(tmp_path).r == 3  # what gate_up_proj joins shares one lora_A
    compare(adapted(tmp_path, "lora"), adapted(tmp_path, "adapter"), logits(load(tmp_path / "base")))


@pytest.mark.slow  # a further sweep
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
        {"target_parameters": ["gate_up_proj"]},
        {"target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.gate.weight"]},
    ],
    ids=["down_proj", "gate_up_proj", "with the router", "the router"],
)
@pytest.mark.parametrize("fused", [True, False])
def test_some_parameters(settings: dict[str, object], fused: bool, tmp_path: Path) -> None:
    """Of bases whose experts are stored together, and one by one."""
    set_up(tmp_path, "mixtral", fused, **settings)
    convert(tmp_path)
    compare(adapted(tmp_path, "lora"), adapted(tmp_path, "adapter"), logits(load(tmp_path / "base")))


@pytest.mark.slow  # a further sweep
def test_biases_of_experts(tmp_path: Path) -> None:
    """They are parameters of the same module, four wrappers deep."""
    names = ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"]
    set_up(tmp_path, "gpt_oss", target_parameters=names)
    convert(tmp_path)
    compare(adapted(tmp_path, "lora"), adapted(tmp_path, "adapter"), logits(load(tmp_path / "base")))


@pytest.mark.parametrize("name", MODELS)
def test_a_weighted_sum_of_two(name: str, tmp_path: Path) -> None:
    """The ranks add; PEFT activates both, with half of the second."""
    set_up(tmp_path, name)
    save_on_parameters(load(tmp_path / "base"), tmp_path / "other", seed=5, r=2)
    assert convert(tmp_path, Weighted(load_adapter(tmp_path / "other"), 0.5)).r == 5
    both = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    both.load_adapter(tmp_path / "other", "other")
    both.base_model.set_adapter(["default", "other"])
    for module in both.modules():
        if isinstance(module, LoraLayer):
            module.scaling["other"] /= 2
    compare(adapted(tmp_path, "lora"), logits(both), logits(load(tmp_path / "base")))


@pytest.mark.parametrize("rank", [None, 1])
def test_a_sum_with_a_module_for_each_expert(rank: int | None, tmp_path: Path) -> None:
    """Updates of the parameter share a lora_A, the others do not; nor does an approximation."""
    set_up(tmp_path, "mixtral")
    save_per_expert(tmp_path / "base", tmp_path / "other", "lora")
    options = {} if rank is None else {"rank": rank, "max_error": 0.99}
    assert convert(tmp_path, Weighted(load_adapter(tmp_path / "other")), **options).r == (
        3 + 4 + 4 if not rank else 2
    )
    if rank is None:
        merge(tmp_path / "base", [tmp_path / "adapter", tmp_path / "other"], tmp_path / "merged")
        wanted = logits(load(tmp_path / "merged"))
        compare(adapted(tmp_path, "lora"), wanted, logits(load(tmp_path / "base")))
        for part in ("adapter", "other"):  # which are merged in other ways each
            merge(tmp_path / "base", tmp_path / part, tmp_path / f"merged-{part}")
        base, both, *each = (
            load_file(tmp_path / part / "model.safetensors")
            for part in ("base", "merged", "merged-adapter", "merged-other")
        )
        for key, w0 in base.items():
            assert torch.allclose(both[key] - w0, sum(one[key] - w0 for one in each), atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_vllm_gets_a_module_for_each_expert(name: str, tmp_path: Path) -> None:
    """Of gate_up_proj, the rows of lora_B are split, and lora_A is that of both."""
    set_up(tmp_path, name)
    assert convert(tmp_path, runtime="vllm").vllm_refuses == ()
    found, given = (load_file(tmp_path / part / "adapter_model.safetensors") for part in ("lora", "adapter"))
    owner = "base_model.model.model.layers.0.mlp.experts"
    names = {key.removesuffix(".lora_A.weight").removeprefix(f"{owner}.") for key in found if "lora_A" in key}
    kinds = ["gate_proj", "up_proj", "down_proj"] if name == "qwen3_moe" else ["w1", "w3", "w2"]
    prefix = owner if name == "qwen3_moe" else owner.replace("mlp", "block_sparse_moe")
    assert {key.removeprefix(f"{prefix}.") for key in names} == {f"{e}.{kind}" for e in range(4) for kind in kinds}
    for expert in range(4):
        gate_up, down = (
            given[f"{owner}{wrapped}.lora_B.weight"][:, expert::4]
            @ given[f"{owner}{wrapped}.lora_A.weight"].reshape(4, 3, -1)[expert]
            for wrapped in (".base_layer", "")
        )
        for kind, wanted in zip(kinds, (*gate_up.chunk(2), down), strict=True):
            factors = (found[f"{prefix}.{expert}.{kind}.lora_{x}.weight"] for x in "BA")
            assert torch.allclose(torch.linalg.multi_dot(tuple(factors)), wanted * 5 / 3, atol=1e-5)


def test_vllm_takes_gpt_oss_as_peft_does(tmp_path: Path) -> None:
    set_up(tmp_path, "gpt_oss")
    assert convert(tmp_path, runtime="vllm").vllm_refuses == ()
    compare(adapted(tmp_path, "lora"), adapted(tmp_path, "adapter"), logits(load(tmp_path / "base")))


@pytest.mark.parametrize(
    ("name", "fused", "parameter", "reason"),
    [
        ("gpt_oss", False, "down_proj", "adapts experts of model.layers.0.mlp.experts but not .*gate_up_proj"),
        ("mixtral", False, "gate_up_proj", "adapts experts of model.layers.0.mlp.experts but not .*down_proj"),
        ("mixtral", True, "down_proj", "stored as one tensor, and vLLM loads a module for each expert of Mixtral"),
        ("mixtral", False, "mlp.gate.weight", "model.layers.0.mlp.gate.weight as a parameter"),
    ],
)
def test_what_vllm_does_not_load(name: str, fused: bool, parameter: str, reason: str, tmp_path: Path) -> None:
    set_up(tmp_path, name, fused, target_parameters=[parameter])
    plan = prepare_merge(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(ConversionError, match=f"vLLM would refuse this LoRA adapter: .*{reason}"):
        plan_lora_adapter(plan, tmp_path / "lora", options=LoraOptions(runtime="vllm"))
