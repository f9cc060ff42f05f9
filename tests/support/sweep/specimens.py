"""One small model of any type with PEFT's defaults, merged and compared with PEFT's forward pass of what it saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
from support.sweep.small_configs import MOST, small_config
from transformers.models.auto import modeling_auto

from converters import load_adapter, merge
from converters.errors import PeanutError

RANK = 4
CLOSE = 1e-4  # of the largest logit, in float32


@dataclass(frozen=True)
class Task:
    """A kind of models: their auto class, PEFT's task type, and transformers' table of them."""

    auto: str
    task_type: str | None
    table: str

    @property
    def model_types(self) -> list[str]:
        """All types of models that transformers has for it."""
        return sorted(getattr(modeling_auto, self.table))


TASKS = {
    "causal": Task("AutoModelForCausalLM", "CAUSAL_LM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "sequence": Task(
        "AutoModelForSequenceClassification", "SEQ_CLS", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    ),
    "token": Task("AutoModelForTokenClassification", "TOKEN_CLS", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "image": Task("AutoModelForImageClassification", None, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
}


@dataclass(frozen=True)
class Outcome:
    """What came of it: `right`, `refused` or `wrong`; or why nothing can be said: `unbuilt`, `peft`, `no effect`."""

    kind: str
    sentence: str = ""


class _UnusableError(Exception):
    """Nothing can be said about a type, for a reason that is not the merge's."""

    def __init__(self, kind: str, cause: object) -> None:
        self.outcome = Outcome(kind, " ".join(f"{type(cause).__name__}: {cause}".split())[:300])


def examine(task_name: str, model_type: str, folder: Path) -> Outcome:
    """Train nothing, save everything, merge, and compare."""
    task = TASKS[task_name]
    try:
        model, inputs, base = _answering(task_name, model_type)
        wanted = _adapted(task, model, inputs, folder)
    except _UnusableError as unusable:
        return unusable.outcome
    if _far(base, wanted) < 10 * CLOSE:
        return Outcome("no effect")
    try:
        merge(folder / "base", load_adapter(folder / "adapter", layout="lora"), folder / "merged")
    except PeanutError as error:
        return Outcome("refused", str(error).replace(f"{folder}/", ""))
    merged = type(model).from_pretrained(folder / "merged", dtype=torch.float32).eval()
    far = _far(_logits(merged, inputs), wanted)
    return Outcome("right", f"{far:.1e}") if far <= CLOSE else Outcome("wrong", f"off by {far:.1e} of the largest")


def _answering(task_name: str, model_type: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A small model, what it is asked, and its logits. Raises `_UnusableError` if there is none that works."""
    for layers in (2, 4):  # some have a layer of every kind only from four on
        try:
            model = _model(TASKS[task_name], model_type, layers)
            inputs = _inputs(task_name, model)
            return model, inputs, _logits(model, inputs)
        except Exception as error:  # constructors and models raise anything
            failure = error
    raise _UnusableError("unbuilt", failure)


def _model(task: Task, model_type: str, layers: int) -> Any:
    """A small model with random weights. Raises whatever transformers raises."""
    torch.manual_seed(0)
    config = small_config(model_type, layers, num_labels=3)
    config.get_text_config().pad_token_id = config.pad_token_id = 0
    found = getattr(modeling_auto, task.table)[model_type]
    config.architectures = [found if isinstance(found, str) else found[0]]  # which of several
    auto = getattr(tf, task.auto)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size} parameters")
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.dim() or bool((parameter == 0).all()):
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def _inputs(task_name: str, model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    if task_name != "image":
        tokens = torch.randint(3, 100, (2, 16), generator=generator)
        tokens[:, -1] = 2  # the end of a sentence, as in `small_config`
        return {"input_ids": tokens}
    config = getattr(model.config, "vision_config", model.config)
    side = getattr(config, "image_size", 64)
    high, wide = side if isinstance(side, list | tuple) else (side, side)
    return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), high, wide, generator=generator)}


def _adapted(task: Task, model: Any, inputs: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """The logits of PEFT's unmerged model, of what is saved in `folder`. Raises `_UnusableError` where PEFT fails."""
    head = {} if task.task_type else {"modules_to_save": [_head(model)]}
    config = peft.LoraConfig(r=RANK, task_type=task.task_type, target_modules=_targets(model), **head)
    model.save_pretrained(folder / "base")
    try:
        adapted = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder / "adapter")
        fresh = type(model).from_pretrained(folder / "base", dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(fresh, folder / "adapter").eval()
        wanted, before = _logits(again, inputs), _logits(adapted, inputs)
    except Exception as error:  # whatever PEFT and the model raise
        raise _UnusableError("peft", error) from None
    if _far(_logits(again, inputs), wanted) > CLOSE:
        raise _UnusableError("peft", ValueError("the model answers otherwise every time"))
    if _far(before, wanted) > CLOSE:
        raise _UnusableError("peft", ValueError("PEFT computes something else after loading the adapter again"))
    return wanted


def _targets(model: Any) -> list[str] | str:
    """PEFT's default targets; without any, the linear layers below the head, or the convolutions that PEFT takes."""
    if found := TARGETS.get(model.config.model_type):
        return found if isinstance(found, str) else list(found)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for kind in (torch.nn.Linear, torch.nn.Conv2d):
        inside = [
            f"{prefix}{name}"
            for name, module in model.base_model.named_modules()
            if isinstance(module, kind) and RANK % getattr(module, "groups", 1) == 0
        ]
        if inside and (prefix or kind is torch.nn.Conv2d):
            return inside
    return "all-linear"


def _head(model: Any) -> str:
    """Its `classifier`, or `fc` where that is a list of steps, which PEFT does not save."""
    return "fc" if isinstance(getattr(model, "classifier", None), torch.nn.ModuleList) else "classifier"


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(7)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    if not bool(found.isfinite().all()):
        raise ValueError("the logits are not finite")
    return found.double()


def _far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())
