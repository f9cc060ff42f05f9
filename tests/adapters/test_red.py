"""RED as its authors' code saves it, against its formula on the outputs of the modules of the base."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import transformers as tf
from support.peft_methods import IDS, MODELS, close, logits
from torch import Tensor

from converters import load_adapter, merge
from converters.errors import BaseMismatchError, LayoutError, OptionError, ThetaError
from converters.outputs.checkpoint.recheck import check_against

State = dict[str, Tensor]


def save_red(folder: Path, modules: Iterable[tuple[str, torch.nn.Module]], parts: tuple[str, ...]) -> State:
    """θ of modules, as their `save_model` writes it."""
    state = {}
    for name, module in modules:
        size = module.nf if isinstance(module, tf.pytorch_utils.Conv1D) else module.out_features
        vectors = {"scaling": 1 + 0.3 * torch.randn(1, size), "bias": 0.2 * torch.randn(1, size)}
        state |= {f"{name}.delta_vector.activation_{part}": vectors[part] for part in parts}
    folder.mkdir()
    torch.save(state, folder / "delta_vector.pth")
    return state


def edit_outputs(model: torch.nn.Module, state: State) -> None:
    """What their `ActivationLayer` does to the outputs of the modules that it wraps."""
    for name, module in model.named_modules():
        scaling = state.get(f"{name}.delta_vector.activation_scaling")
        bias = state.get(f"{name}.delta_vector.activation_bias")

        def edit(
            _: object, __: object, output: Tensor, scaling: Tensor | None = scaling, bias: Tensor | None = bias
        ) -> Tensor:
            output = output if scaling is None else output * scaling
            return output if bias is None else output + bias

        if scaling is not None or bias is not None:
            module.register_forward_hook(edit)


def with_biases(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "ends", "parts"),
    [
        ("gpt2", ("mlp.c_proj", "c_attn"), ("scaling", "bias")),
        ("gpt2", ("mlp.c_proj",), ("bias",)),
        ("bert", ("output.dense", "query"), ("scaling", "bias")),
        ("llama", ("down_proj",), ("scaling",)),
    ],
)
def test_merged_logits_are_those_of_edited_outputs(
    name: str, ends: tuple[str, ...], parts: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = with_biases(MODELS[name]())
    model.save_pretrained(tmp_path / "base")
    before = logits(model)
    state = save_red(tmp_path / "red", ((n, m) for n, m in model.named_modules() if n.endswith(ends)), parts)
    edit_outputs(model, state)
    result = merge(tmp_path / "base", tmp_path / "red", tmp_path / "merged")
    found = logits(type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert close(found, logits(model))
    assert not close(before, logits(model))
    assert load_adapter(tmp_path / "red").layout == "red"
    assert check_against(tmp_path / "merged", result.plan).recomputed > 0


def test_a_classifier_with_its_head(tmp_path: Path) -> None:
    """θ has the names of a RobertaModel; the head lies beside it, and is transformers' own."""
    torch.manual_seed(0)
    config = tf.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=96,
        max_position_embeddings=34, num_labels=3, pad_token_id=1,
    )  # fmt: skip
    trained = with_biases(tf.RobertaForSequenceClassification(config))
    language_model = tf.RobertaForMaskedLM(config)
    language_model.roberta.load_state_dict(trained.roberta.state_dict())
    language_model.save_pretrained(tmp_path / "base")
    modules = [(n, m) for n, m in trained.roberta.named_modules() if n.endswith("output.dense")]
    state = save_red(tmp_path / "red", modules, ("scaling", "bias"))
    torch.save(trained.classifier.state_dict(), tmp_path / "red" / "classifier.pth")
    edit_outputs(trained.roberta, state)
    with torch.no_grad():
        wanted = trained(input_ids=IDS).logits.double()
    for given in ("red", "red/delta_vector.pth"):
        merge(tmp_path / "base", tmp_path / given, tmp_path / "merged", overwrite=True)
        merged = tf.RobertaForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        assert close(logits(merged), wanted)
    torch.save({"dense.weight": torch.zeros(32, 32)}, tmp_path / "red" / "classifier.pth")
    with pytest.raises(ThetaError, match=r"classifier\.pth has classifier\.dense\.weight; expected"):
        load_adapter(tmp_path / "red")


REFUSED: dict[str, tuple[Callable[[State], object], type[Exception], str]] = {
    "a part": (
        lambda s: s.pop("model.layers.1.mlp.down_proj.delta_vector.activation_bias"),
        ThetaError,
        "incomplete",
    ),
    "a norm": (
        lambda s: s.update({"model.layers.1.mlp.down_proj.delta_vector.activation_ln.weight": torch.ones(32)}),
        LayoutError,
        "LayerNorm of its own.* cannot be merged",
    ),
    "another key": (
        lambda s: s.update({"model.norm.weight": torch.ones(32)}),
        ThetaError,
        "norm.weight is not one of RED's",
    ),
    "another shape": (
        lambda s: s.update({"model.layers.1.mlp.down_proj.delta_vector.activation_bias": torch.ones(32)}),
        ThetaError,
        r"expected scaling \(1, out\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    modules = [(n, m) for n, m in MODELS["llama"]().named_modules() if n.endswith("down_proj")]
    state = save_red(tmp_path / "red", modules, ("scaling", "bias"))
    change, error, message = REFUSED[case]
    change(state)
    torch.save(state, tmp_path / "red" / "delta_vector.pth")
    with pytest.raises(error, match=message):
        load_adapter(tmp_path / "red")


def test_a_llama_has_no_place_for_a_bias_but_may_be_given_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["llama"]().eval()
    model.save_pretrained(tmp_path / "base")
    modules = [(n, m) for n, m in model.named_modules() if n.endswith("down_proj")]
    state = save_red(tmp_path / "red", modules, ("scaling", "bias"))
    cure = (
        r"give the base biases of zero.*from_pretrained\(BASE, mlp_bias=True\).*serve it with the code that trained"
    )
    with pytest.raises(BaseMismatchError, match=f"θ adds to the bias of this module.*{cure}"):
        merge(tmp_path / "base", tmp_path / "red", tmp_path / "merged")
    with_zeros = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base", mlp_bias=True, dtype=torch.float32)
    with_zeros.save_pretrained(tmp_path / "with-zeros")
    merge(tmp_path / "with-zeros", tmp_path / "red", tmp_path / "merged")
    edit_outputs(model, state)
    merged = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert close(logits(merged), logits(model))
    with pytest.raises(OptionError, match="RED has no such setting"):
        load_adapter(tmp_path / "red", scaling=1.0)
