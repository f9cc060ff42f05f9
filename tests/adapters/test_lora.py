"""Plain LoRA against PEFT's own merge; the paper's two ablations against their formulas."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_models import edit_json, edit_weights, tiny_llama

from converters import load_adapter, merge, prepare_merge
from converters.errors import AdapterConfigError, LayoutError, PeanutError, ThetaError

NAME = "model.layers.1.self_attn.k_proj"


def gpt2() -> tf.GPT2LMHeadModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=32))


def biased_llama() -> tf.LlamaForCausalLM:
    return tiny_llama(attention_bias=True, mlp_bias=True)


def save_lora(model: tf.PreTrainedModel, folder: Path, **settings: object) -> None:
    """Save `model` and a LoRA on it in which everything that is trained is random."""
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**{**defaults, **settings}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)


LORAS: dict[str, tuple[Callable[[], tf.PreTrainedModel], dict]] = {
    "plain": (tiny_llama, {}),
    "rslora": (tiny_llama, {"use_rslora": True, "lora_alpha": 3.5}),
    "patterns": (
        tiny_llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"k_proj": 1, "model.layers.0.mlp.down_proj": 32},
        },
    ),
    "patterns with rslora": (tiny_llama, {"use_rslora": True, "rank_pattern": {"k_proj": 9}}),
    "gaussian": (tiny_llama, {"init_lora_weights": "gaussian"}),
    "all linear": (tiny_llama, {"target_modules": "all-linear"}),
    "layers": (tiny_llama, {"layers_to_transform": [1]}),
    "head": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "bias all": (biased_llama, {"bias": "all"}),
    "bias lora_only": (biased_llama, {"bias": "lora_only"}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d that is square": (gpt2, {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", LORAS)
def test_a_merged_lora_is_pefts(tmp_path: Path, case: str) -> None:
    make, settings = LORAS[case]
    torch.manual_seed(0)
    save_lora(make(), tmp_path, **settings)
    plan = prepare_merge(tmp_path / "base", tmp_path / "adapter", layout="lora")
    assert plan.head.layout == "lora"
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", layout="lora")
    merged = type(make()).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    base = type(make()).from_pretrained(tmp_path / "base", dtype=torch.float64)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(24).reshape(2, 12) % 96
    with torch.no_grad():
        expected, found = peft(input_ids=ids).logits, merged(input_ids=ids).logits
        plain = type(make()).from_pretrained(tmp_path / "base", dtype=torch.float64)(input_ids=ids).logits
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (plain - expected).abs().max() >= 1e-3 * expected.abs().max()


def test_fan_in_fan_out_is_decided_by_the_base_as_in_peft(tmp_path: Path) -> None:
    """A square Conv1D, where no shape would tell: PEFT goes by the module, whatever the config says."""
    torch.manual_seed(0)
    save_lora(gpt2(), tmp_path, target_modules=r".*attn\.c_proj", fan_in_fan_out=True)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "one", layout="lora")
    edit_json(tmp_path / "adapter" / "adapter_config.json", fan_in_fan_out=False)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "two", layout="lora")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_bias_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_lora(biased_llama(), tmp_path, bias="lora_only")
    extra = {"base_model.model.model.layers.0.mlp.up_proj.bias": torch.zeros(72)}
    edit_weights(tmp_path / "adapter" / "adapter_model.safetensors", lambda w: {**w, **extra})
    with pytest.raises(ThetaError, match="up_proj.bias is neither θ nor in modules_to_save"):
        load_adapter(tmp_path / "adapter")


def write_ablation(folder: Path, layout: str) -> None:
    """LoRA's names with the shapes of an ablation, for k_proj (16, 32)."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["k_proj"], "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(2)
    b_size = 16 if layout == "nonlinear-lora" else 32
    save_file(
        {
            f"base_model.model.model.layers.{i}.self_attn.k_proj.lora_{part}.weight": torch.randn(shape) / 4
            for i in range(2)
            for part, shape in (("A", (3, 32)), ("B", (b_size, 3)))
        },
        folder / "adapter_model.safetensors",
    )


@pytest.mark.parametrize("layout", ["nonlinear-lora", "multiplicative-lora"])
def test_the_ablations_of_the_paper(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path / "base")
    write_ablation(tmp_path / "adapter", layout)
    assert load_adapter(tmp_path / "adapter").layout in ("lora", "authors-llm")  # never by itself
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", layout=layout)
    theta = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (theta[f"base_model.model.{NAME}.lora_{part}.weight"].double() for part in "AB")
    base, merged = (load_file(tmp_path / n / "model.safetensors")[f"{NAME}.weight"] for n in ("base", "merged"))
    w0 = base.double()
    delta = torch.relu(b) @ a if layout == "nonlinear-lora" else w0 @ a.T @ b.T
    assert (merged - (w0 + 2.0 * delta)).abs().max() <= 1e-6
    assert (merged - base).norm() > 0.1 * base.norm()


def test_an_ablation_of_other_shapes_is_refused(tmp_path: Path) -> None:
    write_ablation(tmp_path / "adapter", "nonlinear-lora")
    with pytest.raises(LayoutError, match=r"not in the layout multiplicative-lora .* it is lora, because"):
        load_adapter(tmp_path / "adapter", layout="multiplicative-lora")


def test_nonlinear_lora_on_a_conv1d_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_lora(gpt2(), tmp_path, target_modules=["c_fc"], fan_in_fan_out=True)
    with pytest.raises(ThetaError, match="not defined for weights that are stored transposed"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", layout="nonlinear-lora")
    assert not (tmp_path / "merged").exists()


CONFIGS = {
    "init": (
        {"init_lora_weights": "ours"},
        "init_lora_weights = 'ours' changes the base weights, and the adapter is",
    ),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "an aLoRA, which tokens of the prompt switch on"),
    "token": ({"trainable_token_indices": [3]}, "trained tokens of none; the adapter is incomplete"),
    "bias": ({"bias": "some"}, "bias = 'some'; expected none, all or lora_only"),
    "rank": ({"r": 5}, r"lora_A has 4 rows, the config says r = 5"),
    "rank pattern": ({"rank_pattern": {"k_proj": 2}}, "k_proj: lora_A has 4 rows, the config says r = 2"),
    "pattern": ({"rank_pattern": {"((": 2}}, "a pattern is not a valid regular expression"),
    "alpha": ({"lora_alpha": None}, "lora_alpha = None; expected a finite number"),
    "alpha pattern": ({"alpha_pattern": {"k_proj": "1"}}, "alpha_pattern = '1'; expected a finite number"),
    "table": ({"alpha_pattern": [1]}, r"alpha_pattern = \[1\]; expected an object"),
    "switch": ({"use_rslora": "yes"}, "use_rslora = 'yes'; expected true or false"),
    "merged linear": ({"enable_lora": [True, False]}, "is LoRA's MergedLinear"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_changes_the_mathematics_is_refused(tmp_path: Path, case: str) -> None:
    settings, message = CONFIGS[case]
    save_lora(tiny_llama(), tmp_path)
    edit_json(tmp_path / "adapter" / "adapter_config.json", **settings)
    with pytest.raises((AdapterConfigError, ThetaError, LayoutError), match=message):
        load_adapter(tmp_path / "adapter")


def square_llama() -> tf.LlamaForCausalLM:
    return tiny_llama(num_key_value_heads=4)


# what the authors' fork writes as well
FIELDS_OF_FORK = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out", "task_type")


def test_a_square_adapter_could_be_either_and_is_never_guessed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_lora(square_llama(), tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({key: json.loads(config.read_text())[key] for key in FIELDS_OF_FORK}))
    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.rival is not None
    with pytest.raises(LayoutError, match=r"every adapted weight is square.* layout='authors-llm' or layout='lora'"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    weights = []
    for layout in ("lora", "authors-llm"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / layout, layout=layout)
        weights.append(load_file(tmp_path / layout / "model.safetensors")[f"{NAME}.weight"])
    assert not torch.allclose(*weights, atol=1e-3)


def test_the_base_tells_where_θ_does_not(tmp_path: Path) -> None:
    """Golden data: q_proj alone is (48, 48), and with k_proj (24, 48) the base proves whose it is."""
    from support.golden import LLM

    adapter = Path(shutil.copytree(LLM / "gqa" / "adapter", tmp_path / "adapter"))
    edit_weights(adapter / "adapter_model.bin", lambda w: {n: t for n, t in w.items() if "k_proj" in n})
    edit_json(adapter / "adapter_config.json", target_modules=["k_proj"])
    assert load_adapter(adapter).rival == "lora"
    assert prepare_merge(LLM / "gqa" / "base", adapter).head.layout == "authors-llm"
    with pytest.raises(PeanutError, match=r"the weight has shape \(24, 48\), θ was trained for out = 48 x in = 48"):
        merge(LLM / "gqa" / "base", adapter, tmp_path / "merged", layout="lora")
