"""What a run of all rows found, in tests/data, and the table in converters/README.md that is made from it."""

import json
from typing import TYPE_CHECKING, Any

from support.paths import DATA

from converters.inference.kinds import find_kind
from converters.outputs.onnx.options import Form

if TYPE_CHECKING:  # it imports transformers
    from support.onnx_zoo.rows import Row
    from support.onnx_zoo.running import Found

RECORD = DATA / "onnx_models.json"
_FORMS = {
    Form.MERGED.value: "alone",
    Form.SHARED.value: "`--share`",
    Form.SWAPPABLE.value: "`--swappable`",
    Form.SELF_MERGING.value: "`--self-merging`",
}


def entry_of(row: "Row", found: "Found") -> dict[str, Any]:
    """What is kept of a run of a row."""
    config = {**row.config().to_dict(), "architectures": [row.model_class.__name__]}
    files = {} if found.files is None else {"files": found.files}
    return {
        "model": row.model,
        "model_type": config["model_type"],
        "class": row.model_class.__name__,
        "task": "sentence-similarity" if row.pooling else find_kind(config).task,
        "differences": {name: float(f"{one:.0e}") for name, one in {**found.forms, **files}.items()},
    }


def read_record() -> dict[str, dict[str, Any]]:
    """Row -> what its last run found."""
    rows: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())["rows"]
    return rows


def models_table() -> list[str]:
    """Its lines, one for each model."""
    models: dict[str, list[dict[str, Any]]] = {}
    for entry in read_record().values():
        models.setdefault(entry["model"], []).append(entry)
    lines = ["| model | tasks | forms | largest difference |", "|---|---|---|---|"]
    for model, entries in models.items():
        tasks = ", ".join(dict.fromkeys(entry["task"] for entry in entries))
        forms = set.intersection(*(set(entry["differences"]) & set(_FORMS) for entry in entries))
        largest = max(found for entry in entries for found in entry["differences"].values())
        named = "all" if forms == set(_FORMS) else ", ".join(name for form, name in _FORMS.items() if form in forms)
        lines.append(f"| {model} | {tasks} | {named} | {largest:.0e} |")
    return lines
