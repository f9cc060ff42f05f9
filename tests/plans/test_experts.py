"""LoRA on the experts of a mixture, against PEFT, for every form in which checkpoints store experts."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_models import edit_json, edit_weights, unmerged
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from converters import Weighted, load_adapter, merge, prepare_merge
from converters.errors import AdapterConfigError, BaseMismatchError, ThetaError
from converters.files.header import read_header
from converters.inspection.norms import delta_norms
from converters.models.checkpoint import open_checkpoint
from converters.outputs.checkpoint.recheck import check_against

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

_SHARED = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 61,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}


def mixtral(**changes: object) -> PreTrainedModel:
    settings = {**_SHARED, "intermediate_size": 14, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**{**settings, **changes}))


def qwen3_moe(**changes: object) -> PreTrainedModel:
    settings = {**_SHARED, "moe_intermediate_size": 10, "num_experts": 4, "intermediate_size": 18}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**settings, **changes}))


def gpt_oss(**changes: object) -> PreTrainedModel:
    settings = {**_SHARED, "intermediate_size": 14, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(**{**settings, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def save_base(model: PreTrainedModel, folder: Path, fused: bool) -> None:
    """As `save_pretrained` writes it; or, if `fused`, with the tensors as transformers has them in memory."""
    model.save_pretrained(folder)
    if fused:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_lora(base: Path, model_class: type[PreTrainedModel], folder: Path, **settings: object) -> None:
    """A LoRA on the experts with random factors, as PEFT saves it."""
    given = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": PARAMETERS, **settings}
    adapted = get_peft_model(model_class.from_pretrained(base, dtype=torch.float32), LoraConfig(**given))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def as_before_0_19_1(adapter: Path, sizes: dict[str, int], version: str | None = "0.19.0") -> None:
    """Rewrite an adapter of experts (E, out, in) as PEFT before 0.19.1 would have saved the same deltas.

    It took (E, out, in) for (E, in, out): `B_e A_e` is transposed, so A becomes Bᵀ, expert by expert.
    `sizes` is the number of experts by module of θ.
    """
    file = adapter / "adapter_model.safetensors"
    weights, changed = load_file(file), {}
    for name, a in weights.items():
        if name.endswith(".lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            count = next((n for end, n in sizes.items() if end in name), 0)
            if not count:
                changed |= {name: a, other: weights[other]}
                continue
            b = weights[other]
            experts_a = a.reshape(count, -1, a.shape[1])  # (E, r, in)
            experts_b = b.reshape(b.shape[0], -1, count).permute(2, 1, 0)  # (E, r, out)
            changed[name] = experts_b.reshape(-1, b.shape[0]).contiguous()
            changed[other] = experts_a.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(changed, file, metadata={"format": "pt"})
    edit_json(adapter / "adapter_config.json", peft_version=version)


TOKENS = torch.arange(3, 40).view(1, -1)


def logits(model: torch.nn.Module) -> torch.Tensor:
    for module in model.modules():
        if hasattr(module, "config"):  # the grouped kernels need sizes that are multiples of 16 bytes
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(TOKENS).logits


def set_up(folder: Path, name: str, fused: bool, changes: dict[str, object], **settings: object) -> type:
    torch.manual_seed(0)
    model = MODELS[name](**changes)
    save_base(model, folder / "base", fused)
    save_lora(folder / "base", type(model), folder / "adapter", **settings)
    return type(model)


def compare(folder: Path, model_class: type[PreTrainedModel]) -> None:
    merge(folder / "base", folder / "adapter", folder / "merged")
    wanted = logits(unmerged(model_class, folder / "base", folder / "adapter"))
    merged = logits(model_class.from_pretrained(folder / "merged", dtype=torch.float32))
    plain = logits(model_class.from_pretrained(folder / "base", dtype=torch.float32))
    scale = wanted.abs().max()
    assert (merged - wanted).abs().max() < 1e-4 * scale
    assert (plain - wanted).abs().max() > 1e-2 * scale
    base, written = (
        {info.name: info.shape for info in read_header(folder / part / "model.safetensors")[0]}
        for part in ("base", "merged")
    )
    assert written == base


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_peft(name: str, fused: bool, tmp_path: Path) -> None:
    compare(tmp_path, set_up(tmp_path, name, fused, {}))


@pytest.mark.parametrize(("square", "fused"), [(True, True), (False, False)])
def test_a_single_expert(square: bool, fused: bool, tmp_path: Path) -> None:
    """HunYuan's config has one by default; PEFT adds the product as it is."""
    sizes = {"hidden_size": 20, "moe_intermediate_size": 10} if square else {}
    changes = {**sizes, "num_experts": 1, "num_experts_per_tok": 1}
    compare(tmp_path, set_up(tmp_path, "qwen3_moe", fused, changes))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_square_experts(name: str, fused: bool, tmp_path: Path) -> None:
    """The shapes do not show what is in and out: the model class and the version of PEFT do."""
    size = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    parameters = {"target_parameters": ["mlp.experts.down_proj"]}
    compare(tmp_path, set_up(tmp_path, name, fused, {size: 24}, **parameters))


@pytest.mark.slow  # a further sweep
@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["gate_up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": "all-linear"},
        {"rank_pattern": {r".*\.mlp\.experts\.gate_up_proj": 6}, "alpha_pattern": {"gate_up_proj": 11}},
        {"target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"]},
    ],
    ids=["one parameter", "with modules", "all-linear", "patterns", "a router"],
)
@pytest.mark.parametrize("fused", [True, False])
def test_what_a_config_may_say(settings: dict[str, object], fused: bool, tmp_path: Path) -> None:
    compare(tmp_path, set_up(tmp_path, "mixtral", fused, {}, **settings))


def test_biases_of_experts(tmp_path: Path) -> None:
    """They are matrices, and parameters of the module that is wrapped: four wrappers are nested."""
    names = ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"]
    compare(tmp_path, set_up(tmp_path, "gpt_oss", True, {}, target_parameters=names))


@pytest.mark.slow  # a further sweep
@pytest.mark.parametrize("fused", [True, False])
def test_norms_are_of_all_experts_together(fused: bool, tmp_path: Path) -> None:
    """However they are stored."""
    set_up(tmp_path, "mixtral", fused, {}, target_parameters=["mlp.experts.down_proj"])
    norms = delta_norms(load_adapter(tmp_path / "adapter"), open_checkpoint(tmp_path / "base"))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for layer, norm in enumerate(norms):
        a, b = (weights[f"base_model.model.model.layers.{layer}.mlp.experts.lora_{x}.weight"].double() for x in "AB")
        delta = torch.einsum("ore,eri->eoi", b.reshape(24, 3, 4), a.reshape(4, 3, 14)) * 5 / 3
        assert norm.delta == pytest.approx(float(delta.norm()), rel=1e-5)
        assert norm.shape == (4 * 24, 14)


@pytest.mark.slow  # a further sweep
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_experts_of_peft_before_0_19_1(square: bool, fused: bool, tmp_path: Path) -> None:
    """It swapped in and out. The same deltas, saved as it did, make the same checkpoint."""
    changes = {"moe_intermediate_size": 24} if square else {}
    set_up(tmp_path, "qwen3_moe", fused, changes, target_parameters=["mlp.experts.down_proj"])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "new")
    as_before_0_19_1(tmp_path / "adapter", {"mlp.experts": 4})
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "old")
    new, old = ((tmp_path / part / "model.safetensors").read_bytes() for part in ("new", "old"))
    assert new == old


@pytest.mark.parametrize("version", [None, "0.20.0.dev0@abc", "0.19.1.dev0", "new"])
def test_square_experts_of_an_unknown_version_are_refused(version: str | None, tmp_path: Path) -> None:
    set_up(tmp_path, "mixtral", True, {"intermediate_size": 24}, target_parameters=["mlp.experts.down_proj"])
    edit_json(tmp_path / "adapter" / "adapter_config.json", peft_version=version)
    with pytest.raises(AdapterConfigError, match="set 'peft_version' in its adapter_config.json"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_incomplete_and_foreign_adapters_are_refused(tmp_path: Path) -> None:
    set_up(tmp_path, "mixtral", False, {})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    before = file.read_bytes()

    def drop(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in weights.items() if "layers.1.mlp.experts." not in name}

    edit_weights(file, drop)
    with pytest.raises(ThetaError, match=r"layers.1.mlp.experts.* should have θ"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    file.write_bytes(before)
    torch.manual_seed(0)
    save_base(MODELS["mixtral"](num_local_experts=6), tmp_path / "other", False)
    with pytest.raises(BaseMismatchError, match=r"\(6, 28, 24\), θ was trained for \(4, 28, 24\)"):
        merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.slow  # a further sweep
@pytest.mark.parametrize("fused", [True, False])
def test_every_number_can_be_recomputed_and_a_sum_is_one(fused: bool, tmp_path: Path) -> None:
    set_up(tmp_path, "gpt_oss" if fused else "mixtral", fused, {})
    adapter = load_adapter(tmp_path / "adapter")
    summed = [Weighted(adapter, 0.75), Weighted(adapter, -0.5)]
    merge(tmp_path / "base", summed, tmp_path / "summed")
    assert check_against(tmp_path / "summed", prepare_merge(tmp_path / "base", summed)).max_ulp < 0.51
    merge(tmp_path / "base", [Weighted(adapter, 0.25)], tmp_path / "one")
    model = MODELS["gpt_oss" if fused else "mixtral"]().__class__
    found = [logits(model.from_pretrained(tmp_path / part, dtype=torch.float32)) for part in ("summed", "one")]
    assert torch.allclose(*found, atol=1e-4)
