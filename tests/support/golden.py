"""The golden cases: tiny models, θ as the PEANuT authors' own code saves it, and the numbers that code computes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from support.paths import DATA

GOLDEN = DATA / "golden"
VISION, GLUE, LLM = GOLDEN / "authors-vision", GOLDEN / "authors-nlu", GOLDEN / "authors-llm"

_CLASSES = {
    "authors-llm": "LlamaForCausalLM",
    "authors-vision": "ViTForImageClassification",
    "authors-nlu": "RobertaForSequenceClassification",
}


@dataclass(frozen=True)
class Golden:
    """One saved file of one case."""

    folder: Path
    file: str

    @property
    def adapter(self) -> Path:
        return self.folder / self.file

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def options(self) -> dict[str, Any]:
        """What a user has to say besides."""
        stated = self.folder / "scaling.json"
        return json.loads(stated.read_text()) if stated.exists() else {}

    @property
    def deltas(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected_delta.safetensors")

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}/{self.file}"

    def logits(self, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """(of the model in `folder`, loaded by today's transformers; of the authors' adapted model)."""
        inputs = load_file(self.folder / "expected_logits.safetensors")
        expected = inputs.pop("logits")
        model_class = getattr(transformers, _CLASSES[self.folder.parent.name])
        model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return model(**inputs).logits, expected


FILES = ("adapter", "theta.safetensors", "theta.bin", "full_state_dict.bin")
CASES = [Golden(folder, file) for folder in sorted(GOLDEN.glob("*/*")) for file in FILES if (folder / file).exists()]
