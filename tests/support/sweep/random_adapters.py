"""One adapter with random settings and random θ, merged and compared with PEFT's forward pass of what it saved."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers as tf
from peft import PeftConfig, PeftModel, get_peft_model
from support.peft_methods import IDS, MODELS
from support.sweep.random_configs import draw
from support.sweep.random_settings import NAMES, ROUND
from support.tiny_models import edit_weights

from converters import merge, prepare_merge
from converters.errors import ConversionError, PeanutError
from converters.outputs.lora import plan_lora_adapter, write_lora_adapter

CLOSE = 1e-4  # of the largest logit, in float32


@dataclass(frozen=True)
class Outcome:
    """What came of it: `right`, `wrong` or `refused`.

    Or why nothing can be said: `peft` does not train, save or load it; `forgets`: PEFT computes something else after
    it loaded what it saved, and the merge is that or is refused; `no effect`.

    Attributes:
        kind: one of these.
        about: the model and the settings, or the method.
        sentence: how far off, or what was raised.
    """

    kind: str
    about: str
    sentence: str = ""


class _UnusableError(Exception):
    """PEFT does not take the settings."""


def examine(seed: int, folder: Path) -> Outcome:
    """One adapter; the method follows from the seed as well, all of them in turn."""
    rng, config_class = Random(f"adapter {seed}"), ROUND[seed % len(ROUND)]
    about = NAMES[config_class]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, config = _drawn(rng, config_class)
            about = f"{model} {config.to_dict()}"
            answers = _answers(rng, _model(model, rng), config, folder)
    except _UnusableError as error:
        return Outcome("peft", about, str(error))
    kind, sentence = _compared(answers, folder)
    return Outcome(kind, about, sentence)


def _compared(answers: "_Answers", folder: Path) -> tuple[str, str]:
    """Kind and sentence of an `Outcome`."""
    try:
        merge(folder / "base", folder / "adapter", folder / "merged", dtype="fp32")
    except PeanutError as error:
        return "refused", str(error).replace(f"{folder}/", "")
    merged = answers.model_class.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    far = _far(_logits(merged), answers.reloaded)
    if far > CLOSE:
        return "wrong", f"merged, off by {far:.1e} of the largest logit"
    if _far(answers.trained, answers.reloaded) > CLOSE:
        return "forgets", ""
    if _far(answers.base, answers.reloaded) < 10 * CLOSE:
        return "no effect", ""
    return (not answers.is_half and _as_lora(answers, folder)) or ("right", f"off by {far:.1e}")


def _as_lora(answers: "_Answers", folder: Path) -> tuple[str, str] | None:
    """The same for its exact LoRA in PEFT; None if that is right, or if there is none."""
    plan = prepare_merge(folder / "base", folder / "adapter")
    try:
        write_lora_adapter(plan_lora_adapter(plan, folder / "lora"))
    except ConversionError:
        return None  # what can be written is for tests/outputs
    fresh = answers.model_class.from_pretrained(folder / "base", dtype=torch.float32)
    far = _far(_logits(PeftModel.from_pretrained(fresh, folder / "lora").eval()), answers.reloaded)
    return None if far <= CLOSE else ("wrong", f"as LoRA, off by {far:.1e} of the largest logit")


@dataclass(frozen=True)
class _Answers:
    """Logits of one adapter in PEFT, unmerged: as trained, and as saved and loaded again; and of the base."""

    model_class: Any
    is_half: bool  # whether the base is stored in bfloat16
    base: torch.Tensor
    trained: torch.Tensor
    reloaded: torch.Tensor


def _drawn(rng: Random, config_class: type[PeftConfig]) -> tuple[str, PeftConfig]:
    """Raises `_UnusableError` for settings that PEFT does not take."""
    try:
        return draw(rng, config_class)
    except Exception as error:  # PEFT raises anything
        raise _UnusableError(f"{type(error).__name__}: {error}") from None


def _answers(rng: Random, model: Any, config: PeftConfig, folder: Path) -> _Answers:
    """The oracle: what PEFT computes, of what is saved in `folder`. Raises `_UnusableError`."""
    torch.manual_seed(rng.randrange(1 << 30))
    is_half = rng.random() < 0.2
    for key, parameter in model.named_parameters():
        data = parameter.data + torch.randn_like(parameter) * (0.1 if key.endswith("bias") else 0.05)
        parameter.data = data.bfloat16().float() if is_half else data
    base = _logits(model.eval())
    model.save_pretrained(folder / "base")
    if is_half:
        edit_weights(folder / "base" / "model.safetensors", lambda w: {k: t.bfloat16() for k, t in w.items()})
    try:
        adapted = get_peft_model(model, config).eval()
        is_residual = getattr(config, "init_lora_weights", None) in ("pissa", "olora")  # checked to be near its start
        trained = _trained(adapted, 0.01 if is_residual else 0.1, rng.random() < 0.3)
        adapted.save_pretrained(folder / "adapter")
        fresh = type(model).from_pretrained(folder / "base", dtype=torch.float32)
        reloaded = _logits(PeftModel.from_pretrained(fresh, folder / "adapter").eval())
    except Exception as error:  # whatever PEFT and the model raise
        raise _UnusableError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from None
    return _Answers(type(model), is_half, base, trained, reloaded)


def _trained(adapted: Any, step: float, halved: bool) -> torch.Tensor:
    """The logits after every trained number was changed at random; with `halved`, all become bfloat16."""
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data + torch.randn_like(parameter) * step
        if halved:
            parameter.data = parameter.data.bfloat16().float()
    found = _logits(adapted)
    for parameter in parameters if halved else ():
        parameter.data = parameter.data.bfloat16()
    return found


def _model(name: str, rng: Random) -> Any:
    """A tiny model with random weights."""
    if name in MODELS:
        return MODELS[name]()
    if name == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tied = rng.random() < 0.5
    return tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=96, tie_word_embeddings=tied)
    )


def _logits(model: Any) -> torch.Tensor:
    """Of a text, or of an image for a model of those."""
    is_vit = model.config.model_type == "vit"
    given = (
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)}
        if is_vit
        else {"input_ids": IDS}
    )
    with torch.no_grad():
        found: torch.Tensor = model(**given).logits
    return found.double()


def _far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())
