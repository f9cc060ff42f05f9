"""LoRA on convolutions: what PEFT computes beside one is merged where the weight can do it, and refused elsewhere."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoHaConfig, LoraConfig, get_peft_model

from converters import merge
from converters.errors import PeanutError
from converters.models.convolutions import find_obstacles

INPUT = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(4))
CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1, "stride": 2},
    "one number": {"kernel_size": 1, "dilation": 2, "padding_mode": "reflect"},
    "mirrored": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_obstacles_are_where_no_weight_computes_what_peft_does(name: str, dora: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Conv2d(8, 8, **CONVOLUTIONS[name]))
    obstacles = find_obstacles(plain)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=dora)
    adapted = get_peft_model(plain, config).eval()
    with torch.no_grad():
        wanted = adapted(INPUT)
        found = adapted.merge_and_unload()(INPUT)
    assert torch.allclose(found, wanted, atol=1e-5) is (not obstacles)
    assert bool(obstacles) is (name in ("mirrored", "dilated"))


def test_an_update_beside_groups_reads_the_inputs_of_all_groups() -> None:
    """So it is no convolution with these groups."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that it does not merge this
        plain = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=4, bias=False))
        adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).eval()
    other = INPUT.clone()
    other[:, 2:] = 0  # the first output channel has the first two inputs alone
    with torch.no_grad():
        base = adapted.base_model.model[0].base_layer
        assert torch.equal(base(INPUT)[:, 0], base(other)[:, 0])
        assert not torch.allclose(adapted(INPUT)[:, 0], adapted(other)[:, 0], atol=1e-2)


def saved(model: tf.PreTrainedModel, folder: Path, targets: list[str], **settings: object) -> None:
    """A base, and a LoRA of it with random factors, or another adapter."""
    model.save_pretrained(folder / "base")
    given = {"target_modules": targets, "init_weights": False, **settings}
    kind = given.pop("kind", LoraConfig)
    if kind is LoraConfig:
        given = {"r": 4, "init_lora_weights": given.pop("init_weights"), **given}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, kind(**given)).save_pretrained(folder / "adapter")


def wav2vec2(groups: int) -> tf.PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    layers = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": groups}
    return tf.Wav2Vec2Model(tf.Wav2Vec2Config(**sizes, **layers, **places))


def convnext() -> tf.PreTrainedModel:
    return tf.ConvNextModel(tf.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=32))


def resnet() -> tf.PreTrainedModel:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    return tf.ResNetModel(tf.ResNetConfig(**sizes))


def informer() -> tf.PreTrainedModel:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    return tf.InformerModel(tf.InformerConfig(prediction_length=4, num_time_features=1, **sizes))


def bit() -> tf.PreTrainedModel:
    return tf.BitModel(tf.BitConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_groups=4))


REFUSED = {
    "groups": (lambda: wav2vec2(2), ["pos_conv_embed.conv"], {}, "with 2 groups, where PEFT's update"),
    "groups with DoRA": (lambda: wav2vec2(2), ["pos_conv_embed.conv"], {"use_dora": True}, "with 2 groups"),
    "weight norm": (lambda: wav2vec2(1), ["pos_conv_embed.conv"], {}, r"other tensors \(weight_norm\)"),
    "depthwise": (convnext, ["dwconv"], {"r": 8}, "with 8 groups"),
    "circular": (informer, ["downConv"], {}, "padding_mode='circular', and PEFT"),
    "LoHa": (resnet, ["layer.0.convolution"], {"kind": LoHaConfig, "r": 2}, "no matrix .* and this method is merged"),
    "a bias": (resnet, ["layer.0.convolution"], {"lora_bias": True}, "and lora_bias is read on linear layers only"),
    "standardised, by names that are the base's": (bit, ["conv1"], {}, "standardises its weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_weight_can_do_is_refused(name: str, tmp_path: Path) -> None:
    model, targets, settings, sentence = REFUSED[name]
    torch.manual_seed(0)
    saved(model(), tmp_path, targets, **settings)
    with pytest.raises(PeanutError, match=sentence):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
