"""The methods there are. How to add one is in CONTRIBUTING.md."""

from collections.abc import Mapping
from typing import Any

from converters.methods.base import Method
from converters.methods.dense.beft import Beft
from converters.methods.dense.c3a import C3a
from converters.methods.dense.fourierft import FourierFt
from converters.methods.dense.loha import LoHa
from converters.methods.dense.lokr import LoKr
from converters.methods.dense.randlora import RandLora
from converters.methods.dense.shira import ShiRa
from converters.methods.dense.supertuning import SuperTuning
from converters.methods.dense.waveft import WaveFt
from converters.methods.lora.bdlora import BdLora
from converters.methods.lora.conv_dora import ConvDora
from converters.methods.lora.lora_bias import LoraBias
from converters.methods.lora.other_lora import ConvLora, EmbeddingLora
from converters.methods.lora.qalora import QaLora
from converters.methods.low_rank.adalora import AdaLora
from converters.methods.low_rank.delora import DeLora
from converters.methods.low_rank.gralora import GraLora
from converters.methods.low_rank.miss import Miss
from converters.methods.low_rank.seeded_vera import SeededPvera, SeededVera
from converters.methods.low_rank.tinylora import TinyLora
from converters.methods.low_rank.unilora import UniLora
from converters.methods.low_rank.vblora import VbLora
from converters.methods.low_rank.vera import Pvera, Vera
from converters.methods.multiplicative.boft import Boft
from converters.methods.multiplicative.deft import Deft
from converters.methods.multiplicative.dora import Dora
from converters.methods.multiplicative.embedding_dora import EmbeddingDora
from converters.methods.multiplicative.glora import GLora
from converters.methods.multiplicative.hira import HiRa
from converters.methods.multiplicative.hra import Hra
from converters.methods.multiplicative.ia3 import Ia3
from converters.methods.multiplicative.miss_bat import MissBat
from converters.methods.multiplicative.oft import Oft
from converters.methods.multiplicative.red import Red
from converters.methods.multiplicative.road import RoAd
from converters.methods.multiplicative.trainable_tokens import TrainableTokens
from converters.methods.peanut.tweaker import Tweaker
from converters.methods.peft_form import PeftForm
from converters.methods.spectral.adamss import Adamss
from converters.methods.spectral.frod import Frod
from converters.methods.spectral.kasa import Kasa
from converters.methods.spectral.osf import Osf
from converters.methods.spectral.psoft import Psoft
from converters.methods.spectral.residual import Olora, Pissa

_ALL: tuple[type[Method], ...] = (
    Tweaker, Dora, Pissa, Olora, LoraBias, BdLora, QaLora, Kasa, Ia3,
    AdaLora, Vera, SeededVera, Pvera, SeededPvera, VbLora, UniLora, TinyLora, Miss, GraLora, DeLora,
    HiRa, GLora, Hra, Deft, MissBat, Oft, Boft, RoAd,
    Osf, Psoft, Frod, Adamss,
    LoHa, LoKr, FourierFt, WaveFt, C3a, ShiRa, SuperTuning, RandLora,
    Beft, TrainableTokens, EmbeddingLora, EmbeddingDora, ConvLora, ConvDora, Red,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}

_FORMS = [(method, method.peft) for method in METHODS.values() if method.peft is not None]

# peft_type -> the method it stands for, and how PEFT saves it; and the variants that a config may turn on
PEFT_METHODS: dict[str, tuple[type[Method], PeftForm]] = {
    form.peft_type: (method, form) for method, form in _FORMS if form.flag is None and not form.when
}
PEFT_VARIANTS: tuple[tuple[type[Method], PeftForm], ...] = tuple(
    (method, form) for method, form in _FORMS if form.when
)
# field of a LoraConfig -> the variant of LoRA that it turns on
LORA_VARIANTS: dict[str, tuple[type[Method], PeftForm]] = {
    form.flag: (method, form) for method, form in _FORMS if form.flag is not None
}
# init_lora_weights of a LoraConfig that takes the initial product away from the base -> the method
LORA_INITS: dict[str, type[Method]] = {
    str(form.when["init_lora_weights"]): method for method, form in PEFT_VARIANTS if form.peft_type == "LORA"
}


def find_peft_method(config: Mapping[str, Any]) -> tuple[type[Method], PeftForm]:
    """The method of an adapter_config.json with one of the types of `PEFT_METHODS`, and how PEFT saves it."""
    peft_type = str(config["peft_type"])
    for method, form in PEFT_VARIANTS:
        if form.peft_type == peft_type and all(config.get(name) == value for name, value in form.when.items()):
            return method, form
    return PEFT_METHODS[peft_type]
