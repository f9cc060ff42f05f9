"""The table of methods in converters/README.md, from what the methods say of themselves."""

import json

from support.method_samples import SAMPLES

from converters.methods.base import Method
from converters.methods.table import METHODS
from converters.methods.weight_delta import Reads

_READS = {
    Reads.NOTHING: "nothing",
    Reads.SHAPE: "its shape",
    Reads.NUMBER: "the same number",
    Reads.ROWS: "rows",
    Reads.COLUMNS: "columns",
    Reads.WHOLE: "all of it",
}


def methods_table() -> list[str]:
    """Its lines."""
    lines = ["| adapter | what it computes | reads of W0 | rank as LoRA | remarks |", "|---|---|---|---|---|"]
    return lines + [_row(method) for method in METHODS.values()]


def _row(method: type[Method]) -> str:
    samples = [make() for make in SAMPLES.values()]
    reads = dict.fromkeys(_READS[sample.reads] for sample in samples if sample.name == method.name)
    cells = (_adapter(method), method.formula, ", ".join(reads), method.lora_rank or "none", method.remark)
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _adapter(method: type[Method]) -> str:
    form = method.peft
    if form is None:
        others = {"lora-embedding": "`LORA` on embeddings", "lora-convolution": "`LORA` on convolutions"}
        others["red"] = "`delta_vector.pth` of the authors of RED"
        others["dora-convolution"] = "`LORA` with `use_dora` on convolutions"
        others["dora-embedding"] = "`LORA` with `use_dora` on embeddings"
        return others.get(method.name, "`PEANUT`, `LORA`, and more layouts")
    if form.flag is not None:
        return f"`{form.peft_type}` with `{form.flag}`"
    when = "".join(f" with `{name}: {json.dumps(value)}`".replace('"', "") for name, value in form.when.items())
    return f"`{form.peft_type}`{when}"
