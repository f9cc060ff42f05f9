"""One row: adapters of PEFT on a tiny model, exported in every form, compared with PEFT's unmerged forward pass."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from support.onnx_zoo.media_rows import MEDIA_ROWS
from support.onnx_zoo.rows import Row
from support.onnx_zoo.text_rows import TEXT_ROWS

from converters.api.exporting import export_onnx
from converters.inference.kinds import INPUTS, find_kind
from converters.inference.session import LoadedAdapter, Session
from converters.outputs.onnx.options import ExportOptions, Form

ROWS: dict[str, Row] = {**MEDIA_ROWS, **TEXT_ROWS}
SHAPES = ((1, 3), (3, 11), (4, 20))  # batch and length; beyond the sliding windows
TOLERANCE = 1e-4  # relative to the largest output, at least to 1


def lively(parameters: Iterable[torch.nn.Parameter], seed: int = 0) -> None:
    """Make weights of such a size that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


class Trained:
    """An adapter as PEFT has it in memory, and the same on disk."""

    def __init__(self, row: Row, base: Path, labels: int, folder: Path) -> None:
        config = type(row.config()).from_pretrained(base, num_labels=labels)
        torch.manual_seed(labels)
        # eager: the kernels differ where a token sees nothing, as in a sliding window of padding
        model = row.model_class.from_pretrained(
            base, config=config, ignore_mismatched_sizes=True, attn_implementation="eager"
        )
        settings = {"r": 4, "target_modules": row.targets, "modules_to_save": row.heads, "scaling": 0.7}
        self.model = get_peft_model(model, row.adapter(**settings, init_weights=False)).eval()
        lively([p for name, p in self.model.named_parameters() if "modules_to_save" in name], labels)
        self.model.save_pretrained(folder, save_embedding_layers=False)
        self.folder, self.outputs = folder, row.outputs
        self.inputs = find_kind({**config.to_dict(), "architectures": [row.model_class.__name__]}).inputs

    def __call__(self, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
        with torch.inference_mode():
            found = self.model(**inputs)
        return [found[name].numpy() for name in self.outputs]

    def batch(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Inputs; the second text is padded on the right, the third on the left."""
        generator = torch.Generator().manual_seed(batch)
        config = self.model.config
        if self.inputs == ("pixel_values",):
            return {"pixel_values": torch.randn(batch, 3, *[config.image_size] * 2, generator=generator)}
        ids = torch.randint(3, 96, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:2, length - 2 :] = 0
        mask[2:3, : length // 3] = 0
        ids[mask == 0] = config.pad_token_id or 0
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 50).long()}
        return {name: made[name] for name in self.inputs}


def difference(session: Session, adapter: LoadedAdapter | None, trained: Trained) -> float:
    """The largest difference from PEFT, relative to its largest output; padding is not compared."""
    largest = 0.0
    for batch, length in SHAPES:
        inputs = trained.batch(batch, length)
        found = session.run_all({name: value.numpy() for name, value in inputs.items()}, adapter)
        for ours, theirs in zip(found, trained(inputs), strict=True):
            assert ours.shape == theirs.shape
            real = np.ones(theirs.shape[:1], bool)
            if "attention_mask" in inputs and theirs.shape[:2] == inputs["attention_mask"].shape:
                real = inputs["attention_mask"].numpy() == 1
            scale = max(1.0, float(np.abs(theirs[real]).max()))
            assert np.abs(theirs[real]).max() > 0.01  # else nothing is compared
            largest = max(largest, float(np.abs(ours[real] - theirs[real]).max()) / scale)
    return largest


def run_row(row: Row, folder: Path, forms: Sequence[Form]) -> dict[str, float]:
    """Form -> the largest relative difference of any of its tasks from PEFT."""
    torch.manual_seed(0)
    base = row.model_class(row.config())
    lively(base.parameters())
    base.save_pretrained(folder / "base")
    tasks = {f"task{n}": Trained(row, folder / "base", n, folder / f"task{n}") for n in row.labels}
    differences = {}
    for form in forms:
        output = folder / form.value
        single = form is Form.MERGED and len(tasks) == 1
        folders = [trained.folder for trained in tasks.values()]
        export_onnx(folder / "base", folders, output, each=not single, options=ExportOptions(form=form))
        found = []
        for name, trained in tasks.items():
            adapter = LoadedAdapter(output / f"{name}.onnx_adapter") if form is Form.SWAPPABLE else None
            found.append(difference(Session(_graph(output, name, form, single)), adapter, trained))
        differences[form.value] = max(found)
    return differences


def _graph(output: Path, task: str, form: Form, single: bool) -> Path:
    if form is Form.MERGED:
        return output / "model.onnx" if single else output / task / "model.onnx"
    return output / ("model.onnx" if form is Form.SWAPPABLE else f"{task}.onnx")


def model_type(row: Row) -> str:
    found: str = row.model_class.config_class.model_type
    assert found in INPUTS
    return found
