"""An adapter on a tiny model: what PEFT computes with it, unmerged, on batches of several shapes."""

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from support.companions.sentence_folders import pooled, pooling_modes, write_modules
from support.onnx_zoo.rows import Row
from transformers import PreTrainedModel

from converters.inference.kinds import find_kind

SHAPES = ((1, 3), (3, 11), (4, 20))  # batch and length of texts; beyond the sliding windows


def lively(parameters: Iterable[torch.nn.Parameter], seed: int = 0) -> None:
    """Make weights of such a size that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def count_batches(row: Row, model: PreTrainedModel) -> None:
    """Give batch norms the statistics of a batch; else what they pass on dwindles from layer to layer."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the batch counts whole
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(8, *row.example(0)))


def save_base(row: Row, folder: Path) -> None:
    torch.manual_seed(0)
    base = row.model_class(row.config())
    lively(base.parameters())
    count_batches(row, base)
    base.save_pretrained(folder)
    if row.processor:
        row.processor().save_pretrained(folder)
    if row.pooling:
        write_modules(folder, pooling_modes(row.pooling), "Normalize", max_length=20)


def load_base(row: Row, folder: Path, labels: int) -> PreTrainedModel:
    config = type(row.config()).from_pretrained(folder, num_labels=labels)
    torch.manual_seed(labels)
    # eager: the kernels differ where a token sees nothing, as in a sliding window of padding
    return row.model_class.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, attn_implementation="eager"
    )


class Trained:
    """An adapter that was saved, and is loaded again as people do."""

    def __init__(self, row: Row, base: Path, labels: int, folder: Path) -> None:
        settings = {"r": 4, "target_modules": row.targets, "modules_to_save": row.heads, "scaling": 0.7}
        adapted = get_peft_model(load_base(row, base, labels), row.adapter(**settings, init_weights=False))
        lively([p for name, p in adapted.named_parameters() if "modules_to_save" in name], labels)
        adapted.save_pretrained(folder, save_embedding_layers=False)
        self.model = PeftModel.from_pretrained(load_base(row, base, labels), folder).eval()
        self.folder, self.row = folder, row
        config = {**self.model.config.to_dict(), "architectures": [row.model_class.__name__]}
        self.inputs = find_kind(config).inputs
        self._check_that_theta_matters()

    def _check_that_theta_matters(self) -> None:
        """Else a graph of the base would do as well."""
        whole, adapted = self.model, self(self.batch(1))
        self.model = copy.deepcopy(whole)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "modules_to_save" not in name and any(kind in name for kind in ("lora_", "peanut_")):
                    parameter.zero_()
        bare = self(self.batch(1))
        self.model = whole
        for ours, theirs in zip(adapted, bare, strict=True):
            assert np.abs(ours - theirs).max() > 0.01 * np.abs(ours).max()

    def __call__(self, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """The outputs that are compared; those of texts still have their padding."""
        with torch.inference_mode():
            if self.row.embed:
                return [self.row.embed(self.model.base_model.model, *inputs.values()).numpy()]
            found = self.model(**inputs)
        outputs = [found[name].numpy() for name in self.row.outputs]
        if not self.row.pooling:
            return outputs
        masks = inputs["attention_mask"].numpy() == 1
        texts = [states[mask] for states, mask in zip(outputs[0], masks, strict=True)]
        return [np.stack([pooled(states, self.row.pooling, normalised=True) for states in texts])]

    def batch(self, turn: int) -> dict[str, torch.Tensor]:
        """Inputs; the second text is padded on the right, the third on the left."""
        batch, length = SHAPES[turn]
        generator = torch.Generator().manual_seed(batch)
        if "input_ids" not in self.inputs:
            (name,) = self.inputs
            return {name: torch.randn(batch, *self.row.example(turn), generator=generator)}
        ids = torch.randint(3, 96, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:2, length - 2 :] = 0
        if "cls_token" not in self.row.pooling:  # sentence-transformers takes the first column, padding or not
            mask[2:3, : length // 3] = 0
        ids[mask == 0] = self.model.config.pad_token_id or 0
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 50).long()}
        return {name: made[name] for name in self.inputs}
