"""Folders that look like exports, without a graph that runs: for what is decided before a session opens."""

import json
from pathlib import Path

from support.companions.preprocessor_folders import WORDS, text_model

from converters.inference.kinds import ModelKind
from converters.serving import MANIFEST_NAME, hash_file

KIND = ModelKind("text-classification", ("input_ids", "attention_mask"), ("logits",))
CONFIG = {"model_type": "distilbert", "vocab_size": len(WORDS), "max_position_embeddings": 24}


def stand_in(folder: Path, labels: tuple[str, ...] = ("bad", "good"), graph: bytes = b"a graph") -> Path:
    """An export of one task in the form `merged`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(graph)
    write_config(folder / "config.json", folder, labels, {"model.onnx": hash_file(folder / "model.onnx")})
    text_model(folder)
    return folder


def stand_in_tasks(folder: Path, names: tuple[str, ...]) -> Path:
    """An export of several tasks in the form `swappable`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(b"a graph")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / MANIFEST_NAME).write_text(json.dumps({"files": {}}))
    for name in names:
        adapter = folder / f"{name}.onnx_adapter"
        adapter.write_bytes(name.encode())
        files = {adapter.name: hash_file(adapter)}
        write_config(folder / f"{name}.config.json", folder, (name, "other"), files, adapter.name)
    return folder


def write_config(
    file: Path, folder: Path, labels: tuple[str, ...], files: dict[str, str], adapter: str | None = None
) -> None:
    own = {
        "base": "b" * 16,
        "kind": KIND.record(),
        "form": "swappable" if adapter else "merged",
        "models": {"fp32": "model.onnx"},
        "adapter": adapter,
        "files": files,
    }
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    file.write_text(json.dumps({**CONFIG, **named, "peanut": own}))


def exchange(link: Path, folder: Path) -> None:
    """Let a link point to another folder, in one step."""
    made = link.with_name(f".{link.name}")
    made.symlink_to(folder)
    made.replace(link)
