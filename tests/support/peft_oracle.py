"""What HF PEFT computes with an adapter that it loads itself, beside what the authors' code computed."""

from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from support.golden import Golden


def logits_in_peft(case: Golden, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the adapter in PEFT, unmerged; of the authors' adapted model)."""
    inputs = load_file(case.folder / "expected_logits.safetensors")
    expected = inputs.pop("logits")
    glue = case.folder.parent.name == "authors-nlu"
    name = "RobertaForSequenceClassification" if glue else "ViTForImageClassification"
    model = getattr(transformers, name).from_pretrained(case.base, num_labels=expected.shape[1])
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits, expected
