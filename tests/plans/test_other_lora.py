"""LoRA on embeddings and on convolutions against HF PEFT's unmerged model."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.commands import Run
from support.damage import without
from support.paths import DATA
from support.peft_methods import MODELS, close, logits, reloaded, train
from support.tiny_models import edit_weights

from converters import load_adapter, merge, prepare_merge
from converters.errors import ConversionError, PeanutError
from converters.outputs.lora import plan_lora_adapter

EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte"}
LINEAR = {"llama": "q_proj", "gpt2": "c_attn"}
PIXELS = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(2))


def language_model(name: str, tied: bool) -> tf.PreTrainedModel:
    if name == "llama":
        return MODELS["llama"](tie_word_embeddings=tied)
    config = MODELS["gpt2"]().config
    config.tie_word_embeddings = tied
    return tf.GPT2LMHeadModel(config)


def config_for(model: str, **settings: object) -> LoraConfig:
    given = {"target_modules": [EMBEDDING[model], LINEAR[model]], "r": 4, "task_type": "CAUSAL_LM", **settings}
    return LoraConfig(fan_in_fan_out=model == "gpt2", **given)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "form",
    [
        *("both", "alone", "with the head", "ensured", "rslora", "dora"),
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("dora alone", "dora and the head", "dora ensured")),
    ],
)
def test_embeddings(form: str, model: str, tied: bool, tmp_path: Path) -> None:
    settings: dict[str, object] = {
        "both": {},
        "alone": {"target_modules": [EMBEDDING[model]]},
        "with the head": {"target_modules": [EMBEDDING[model], "lm_head"]},
        "ensured": {"ensure_weight_tying": True},
        "dora": {"use_dora": True, "lora_alpha": 6},
        "dora alone": {"use_dora": True, "target_modules": [EMBEDDING[model]]},
        "dora and the head": {"use_dora": True, "target_modules": [EMBEDDING[model], "lm_head"]},
        "dora ensured": {"use_dora": True, "ensure_weight_tying": True},
        "rslora": {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {EMBEDDING[model]: 3}},
    }[form]
    config = config_for(model, **settings)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(language_model(model, tied), config, base, adapter)
    plain = language_model(model, tied)
    wanted = logits(reloaded(plain, base, adapter))
    result = merge(base, adapter, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.max_ulp <= 0.5 + 2**-10
    assert close(logits(type(plain).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()), wanted)
    assert not close(logits(type(plain).from_pretrained(base, dtype=torch.float32).eval()), wanted)
    # PEFT ties LoRA of an embedding that it knows by name
    keeps = tied and form == "ensured" and model == "llama"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is keeps


def test_the_embedding_is_that_of_peft_in_float64(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(language_model("llama", False), config_for("llama"), base, adapter)
    plain = tf.LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    name = "model.embed_tokens.weight"
    w0 = plain.state_dict()[name].clone()
    wanted = PeftModel.from_pretrained(plain, adapter).double().merge_and_unload().state_dict()[name]
    found = w0 + load_adapter(adapter).method("model.embed_tokens").to("cpu", torch.float64).delta(w0)
    assert (found - wanted).abs().max() <= 1e-9 * (wanted - w0).abs().max()
    with pytest.raises(ConversionError, match="is of an embedding, and the lora format is for linear layers"):
        plan_lora_adapter(prepare_merge(base, load_adapter(adapter)), tmp_path / "lora")


def test_a_head_is_saved_beside_an_embedding(tmp_path: Path) -> None:
    """PEFT saves the base weight of the embedding along; the head is trained all the same."""
    config = LoraConfig(r=4, target_modules=["word_embeddings", "query"], task_type="SEQ_CLS")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(MODELS["bert"](), config, base, adapter)
    wanted = logits(reloaded(MODELS["bert"](), base, adapter))
    merge(base, adapter, tmp_path / "merged")
    found = tf.BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert close(logits(found), wanted)
    llama = tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**MODELS["llama"]().config.to_dict() | {"num_labels": 3, "pad_token_id": 0})
    )
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="SEQ_CLS")
    train(llama, config, tmp_path / "b", tmp_path / "a")
    assert any(".base_layer." in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    wanted = logits(reloaded(llama, tmp_path / "b", tmp_path / "a"))
    merge(tmp_path / "b", tmp_path / "a", tmp_path / "m")
    assert close(logits(type(llama).from_pretrained(tmp_path / "m").eval()), wanted)


def vit(folder: Path, **settings: object) -> tuple[Path, Path]:
    given = {"r": 4, "target_modules": ["projection", "q_proj"], "lora_alpha": 6, **settings}
    model = tf.ViTForImageClassification.from_pretrained(DATA / "vit-tiny" / "base", dtype=torch.float32)
    train(model, LoraConfig(**given), folder / "base", folder / "adapter")
    return folder / "base", folder / "adapter"


def test_the_patch_embedding_of_a_vit(tmp_path: Path, run_here: Run) -> None:
    base, adapter = vit(tmp_path)
    fresh = tf.ViTForImageClassification.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = fresh(PIXELS).logits.double()
        wanted = PeftModel.from_pretrained(fresh, adapter).eval()(PIXELS).logits.double()
    assert not close(before, wanted)
    merge(base, adapter, tmp_path / "merged")
    with torch.no_grad():
        found = tf.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()(PIXELS).logits.double()
    assert close(found, wanted)
    both = ["--adapter", adapter, "--adapter", f"{adapter}=0.5"]
    done = run_here("peanut-merge", "--base", base, *both, "-o", tmp_path / "sum")
    assert done.returncode == 0, done.stderr
    done = run_here("peanut-inspect", tmp_path / "sum", "--verify", "--full", "--base", base, *both)
    assert done.returncode == 0, done.stderr
    name = next(n for n in load_file(base / "model.safetensors") if n.endswith("projection.weight"))
    w0, w = (load_file(folder / "model.safetensors")[name] for folder in (base, tmp_path / "sum"))
    weights = load_file(adapter / "adapter_model.safetensors")
    a, b = (next(v for k, v in weights.items() if f"projection.lora_{part}" in k) for part in "AB")
    delta = 1.5 * (b.flatten(1) @ a.flatten(1)).view_as(w0)
    assert torch.allclose(w, w0 + 1.5 * delta, atol=1e-5)
    assert run_here("peanut-inspect", adapter, "--base", base).returncode == 0
    with pytest.raises(ConversionError, match="cannot be expressed as LoRA"):
        plan_lora_adapter(prepare_merge(base, load_adapter(adapter)), tmp_path / "lora")


def test_dora_on_the_patch_embedding_of_a_vit(tmp_path: Path) -> None:
    base, adapter = vit(tmp_path, use_dora=True)
    fresh = tf.ViTForImageClassification.from_pretrained(base, dtype=torch.float64)
    name = next(n for n in fresh.state_dict() if n.endswith("projection.weight"))
    w0 = fresh.state_dict()[name].clone()
    model = PeftModel.from_pretrained(fresh, adapter).double().eval()
    with torch.no_grad():
        wanted = model(PIXELS.double()).logits
    result = merge(base, adapter, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.max_ulp <= 0.5 + 2**-10
    with torch.no_grad():
        merged = tf.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
        assert close(merged(PIXELS).logits.double(), wanted)
    method = load_adapter(adapter).method(name.removesuffix(".weight")).to("cpu", torch.float64)
    assert method.name == "dora-convolution"
    found = w0 + method.delta(w0.flatten(1)).view_as(w0)
    peft_merged = model.merge_and_unload().state_dict()[name]
    assert (found - peft_merged).abs().max() <= 1e-9 * (peft_merged - w0).abs().max()
    with pytest.raises(ConversionError, match="cannot be expressed as LoRA"):
        plan_lora_adapter(prepare_merge(base, load_adapter(adapter)), tmp_path / "lora")
    file, magnitude = adapter / "adapter_model.safetensors", "projection.lora_magnitude_vector"
    edit_weights(file, lambda w: w.update({k: v.flatten() for k, v in w.items() if magnitude in k}))
    with pytest.raises(PeanutError, match="the magnitude has shape"):
        merge(base, adapter, tmp_path / "damaged")


def test_refusals(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(language_model("llama", True), config_for("llama"), base, adapter)
    file, embedding = adapter / "adapter_model.safetensors", "base_model.model.model.embed_tokens."
    whole = load_file(file)

    def refused(match: str, change: object) -> None:
        edit_weights(file, lambda weights: {**whole})
        edit_weights(file, change)
        with pytest.raises(PeanutError, match=match):
            merge(base, adapter, tmp_path / "merged")

    key = f"{embedding}lora_embedding_A"
    refused("lora_embedding_A is missing", lambda w: w.pop(key) * 0)
    refused("embed_tokens: A has shape .*expected", lambda w: w.update({key: torch.ones(4, 32, 1)}))
    refused("θ was trained for out = 95", lambda w: w.update({key: torch.ones(4, 95)}))
    refused("has 5 rows, the config says r = 4", lambda w: w.update({key: torch.ones(5, 96)}))
    extra = {f"{embedding}lora_A.weight": torch.ones(4, 32)}
    refused("LoRA on an embedding, with A beside it", lambda w: w.update(extra))
    refused("base weights saved in .* differ", lambda w: w[f"{embedding}base_layer.weight"].add_(1))

    train(language_model("llama", False), config_for("llama", use_dora=True), tmp_path / "b", tmp_path / "dora")
    edit_weights(tmp_path / "dora" / "adapter_model.safetensors", without("embed_tokens.lora_magnitude_vector"))
    with pytest.raises(
        PeanutError, match="embed_tokens: lora_magnitude_vector is missing; the adapter is incomplete"
    ):
        merge(tmp_path / "b", tmp_path / "dora", tmp_path / "merged")
    base, adapter = vit(tmp_path / "vit")
    grouped = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        grouped[name] = torch.cat([tensor, tensor], 1) if "projection.lora_A" in name else tensor
    edit_weights(adapter / "adapter_model.safetensors", lambda weights: grouped)
    with pytest.raises(PeanutError, match="θ was trained for .* without groups"):
        merge(base, adapter, tmp_path / "merged")
