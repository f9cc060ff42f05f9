"""`--format lora` writes what HF PEFT loads, says what vLLM refuses, and refuses that itself with `--for vllm`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import GloraConfig, IA3Config, LoraConfig, PeftConfig, RoadConfig, VeraConfig
from safetensors.torch import load_file
from support.commands import Run
from support.method_zoo import TARGETS
from support.peft_methods import close, logits, reloaded, tiny_bert_classifier, train
from support.tiny_models import Pair, tiny_llama, unmerged
from transformers import LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from converters import Weighted, load_adapter, prepare_merge
from converters.errors import ConversionError, VerificationError
from converters.outputs.lora import LoraAdapterPlan, LoraOptions, plan_lora_adapter, write_lora_adapter


def on_bert(method: type[PeftConfig], saved: Sequence[str] = ("classifier",), **settings: object) -> PeftConfig:
    return method(target_modules=TARGETS["bert"], task_type="SEQ_CLS", modules_to_save=list(saved), **settings)


def written(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}


def convert(base: Path, adapter: object, output: Path, **options: object) -> LoraAdapterPlan:
    planned = plan_lora_adapter(prepare_merge(base, adapter), output, options=LoraOptions(**options))
    assert write_lora_adapter(planned, device="cpu").recomputed > 0
    return planned


@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_a_replaced_output_embedding(make_pair: Callable[..., Pair], run_here: Run, tied: bool) -> None:
    pair = make_pair(tiny_llama(tie_word_embeddings=tied), modules_to_save=["lm_head"])
    command = ["peanut-merge", "--format", "lora", "--base", pair.base, "--adapter", pair.adapter, "-o", pair.output]
    refused = run_here(*command, "--for", "vllm")
    reason = "the adapter replaces the module lm_head; in a LoRA adapter, vLLM serves only replaced modules called"
    assert f"vLLM would refuse this LoRA adapter: {reason} classifier or score" in refused.stderr
    assert "; without --for it is written for PEFT" in refused.stderr
    assert (refused.returncode, pair.output.exists()) == (1, False)
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    assert f"vLLM refuses it: {reason}" in done.stdout
    assert "vllm serve" not in done.stdout
    facts = json.loads(run_here(*command, "--overwrite", "--json").stdout)
    manifest = json.loads((pair.output / "peanut_manifest.json").read_text())
    assert facts["vllm_refuses"] == manifest["vllm_refuses"]
    assert [note for note in facts["notes"] if note.startswith(f"vLLM refuses it: {reason}")]
    found, wanted = (logits(unmerged(LlamaForCausalLM, pair.base, folder)) for folder in (pair.output, pair.adapter))
    assert close(found, wanted)


BIASES = {
    "road": (on_bert(RoadConfig, group_size=8), {"rank": 32}),
    "ia3": (on_bert(IA3Config, feedforward_modules=["intermediate.dense"]), {"rank": 32}),
    "glora": (on_bert(GloraConfig, r=3), {"rank": 32}),
    "lora with a bias": (on_bert(LoraConfig, r=4, lora_bias=True), {}),
    "vera": (on_bert(VeraConfig, r=4, bias="vera_only"), {}),
    "lora": (on_bert(LoraConfig, r=4, bias="lora_only"), {}),
}


@pytest.mark.parametrize("name", BIASES)
def test_peft_adds_changes_of_biases(name: str, tmp_path: Path) -> None:
    config, options = BIASES[name]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(tiny_bert_classifier(), config, base, adapter)
    planned = convert(base, adapter, tmp_path / "lora", **options)
    assert planned.config["lora_bias"] is True
    assert "changes biases (lora_bias)" in planned.vllm_refuses[0]
    wanted = logits(reloaded(tiny_bert_classifier(), base, adapter))
    assert close(logits(reloaded(tiny_bert_classifier(), base, tmp_path / "lora")), wanted)
    biases = [bias for key, bias in written(tmp_path / "lora").items() if key.endswith("lora_B.bias")]
    assert len(biases) == len(planned.modules)
    assert max(float(bias.abs().max()) for bias in biases) > 0.01
    with pytest.raises(ConversionError, match=r"vLLM would refuse this LoRA adapter: .*biases"):
        convert(base, adapter, tmp_path / "refused", runtime="vllm", **options)
    assert not (tmp_path / "refused").exists()


def test_a_sum_in_which_some_biases_change(tmp_path: Path) -> None:
    """The other modules add zeros to theirs; the sum of the changes is that of the merge."""
    rotated, added = RoadConfig(target_modules=["query"], group_size=8), VeraConfig(target_modules=["key"], r=2)
    train(tiny_bert_classifier(), rotated, tmp_path / "base", tmp_path / "a")
    train(tiny_bert_classifier(), added, tmp_path / "b-base", tmp_path / "b")
    opened = load_adapter(tmp_path / "a")
    convert(tmp_path / "base", [Weighted(opened, -0.5), tmp_path / "b"], tmp_path / "lora", rank=32)
    found, before = written(tmp_path / "lora"), load_file(tmp_path / "base" / "model.safetensors")
    modules = [key.removesuffix(".lora_B.bias") for key in found if key.endswith(".lora_B.bias")]
    assert len(modules) == 4
    for module in modules:
        bias = found[f"{module}.lora_B.bias"]
        if module.endswith("key"):
            assert not bias.any()
            continue
        theta = opened.method(module).bias.to("cpu", torch.float64)
        wanted = -0.5 * theta.delta(before[f"{module}.bias"].double()[:, None])[:, 0]
        assert (bias - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_wrong_bias_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.outputs.lora import write

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(tiny_bert_classifier(), BIASES["road"][0], base, adapter)
    right = write.bias_delta
    monkeypatch.setattr(write, "bias_delta", lambda *given: right(*given) * 1.00001)
    with pytest.raises(VerificationError, match="recomputed changes of the bias are wrong"):
        convert(base, adapter, tmp_path / "lora", rank=32)
    assert not (tmp_path / "lora").exists()


def test_biases_of_other_layers_are_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    train(tiny_bert_classifier(), on_bert(LoraConfig, r=4, bias="all"), base, adapter)
    with pytest.raises(ConversionError, match="PEFT saves modules whole, but the adapter has only a part of "):
        convert(base, adapter, tmp_path / "lora")


def tiny_roberta() -> RobertaForSequenceClassification:
    """Its head has two layers."""
    config = RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=96,
        max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def adapters_on_disk(tmp_path: Path) -> dict[str, LoraAdapterPlan]:
    """Name -> a LoRA adapter as it was written."""
    found = {}
    for name, model, config in (
        ("one layer", tiny_bert_classifier(), on_bert(LoraConfig, r=3)),
        ("more layers", tiny_roberta(), on_bert(LoraConfig, r=3)),
        ("pooler", tiny_bert_classifier(), on_bert(LoraConfig, ["classifier", "pooler"], r=3)),
        ("biases", tiny_bert_classifier(), on_bert(LoraConfig, r=3, bias="lora_only")),
        ("ranks", tiny_bert_classifier(), on_bert(LoraConfig, r=3, rank_pattern={"query": 600})),
    ):
        base, adapter = tmp_path / f"{name} base", tmp_path / f"{name} adapter"
        train(model, config, base, adapter)
        found[name] = convert(base, adapter, tmp_path / name)
    return found


@pytest.mark.vllm
def test_vllm_refuses_what_is_said(tmp_path: Path) -> None:
    """By its own code, with the adapters on disk: `PEFTHelper`, and what reads the tensors."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    said = {"one layer": False, "more layers": True, "pooler": True, "biases": True, "ranks": True}
    for name, planned in adapters_on_disk(tmp_path).items():
        assert bool(planned.vllm_refuses) == said[name], planned.vllm_refuses
        helper = PEFTHelper.from_local_dir(str(planned.output), None)

        def load(helper: PEFTHelper = helper, planned: LoraAdapterPlan = planned) -> LoRAModel:
            helper.validate_legal(LoRAConfig(max_lora_rank=planned.max_lora_rank or 512))
            kinds = {module.rsplit(".", 1)[-1] for module in planned.modules}
            return LoRAModel.from_local_checkpoint(str(planned.output), kinds, helper, lora_model_id=1, device="cpu")

        if said[name]:
            with pytest.raises(ValueError, match=r"modules_to_save|unsupported LoRA weight|bias|rank|target modules"):
                load()
        else:
            loaded = load()
            assert set(loaded.loras) == set(planned.modules)
            assert set(loaded.modules_to_save) == {"classifier"}
