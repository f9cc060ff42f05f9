"""What the benchmark of ONNX exports: a vision transformer, and random adapters with heads of their own on it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeanutConfig, get_peft_model
from safetensors import safe_open
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "bench" / "onnx"
LABELS = (37, 196, 10, 100, 5)  # of each task
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclass(frozen=True)
class Case:
    """A base, and a task for each of `LABELS`: PEANuT of rank `r` on q_proj and v_proj, and a classifier."""

    name: str
    base: Path
    r: int

    @property
    def adapters(self) -> list[Path]:
        """A folder for each task, as PEFT saves it."""
        return [WORK / f"{self.name}-adapters" / f"labels-{labels}" for labels in LABELS]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        config = self._config()
        return config["num_channels"], config["image_size"], config["image_size"]

    def changed_bytes(self, adapter: Path) -> int:
        """Bytes in float32 of the weights that an adapter changes: its targets, (hidden, hidden), and its head."""
        hidden, numbers = self._config()["hidden_size"], 0
        with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                if name.endswith("peanut_A.weight"):
                    numbers += shape[1] * hidden
                elif "peanut_" not in name:
                    numbers += torch.Size(shape).numel()
        return 4 * numbers

    def _config(self) -> dict[str, int]:
        found: dict[str, int] = json.loads((self.base / "config.json").read_text())
        return found


CASES = {
    "vit-base": Case("vit-base", WORK / "vit-base", 16),
    "vit-tiny": Case("vit-tiny", ROOT / "tests" / "data" / "vit-tiny" / "base", 4),
}


def make_inputs(case: Case) -> None:
    """Make what is not there."""
    torch.manual_seed(0)
    logging.set_verbosity_error()  # that the base has another head is known
    logging.disable_progress_bar()
    if not case.base.exists():
        make_base(case.base)
    for labels, folder in zip(LABELS, case.adapters, strict=True):
        if not folder.exists():
            make_adapter(case, labels, folder)


def make_base(folder: Path) -> None:
    """A ViT-B/16 for 224 x 224 as transformers initializes it, with the 1000 labels that the real one has."""
    draft = folder.with_name(f"{folder.name}.draft")
    ViTForImageClassification(ViTConfig(num_labels=1000)).save_pretrained(draft)
    (draft / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2))
    draft.rename(folder)


def make_adapter(case: Case, labels: int, folder: Path) -> None:
    """Random θ, about as large as trained ones, and a random head that gives logits of about 1."""
    model = ViTForImageClassification.from_pretrained(case.base, num_labels=labels, ignore_mismatched_sizes=True)
    settings = PeanutConfig(
        r=case.r, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], scaling=1.0
    )
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "peanut_" in name:
            torch.nn.init.normal_(parameter, std=0.08)
        elif "classifier.modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=model.config.hidden_size**-0.5)
    adapted.save_pretrained(str(folder))
