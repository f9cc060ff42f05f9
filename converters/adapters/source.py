"""What was given as an adapter, before its layout is known: a folder or file, its config, its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from converters.adapters.distributed import refuse_pieces, refuse_unassembled
from converters.adapters.foreign.files import refuse_foreign_file, refuse_foreign_folder
from converters.adapters.shards import find_index, open_weights
from converters.adapters.store import ThetaStore
from converters.errors import AdapterConfigError, LayoutError, ThetaError
from converters.files.json_files import read_json
from converters.files.names import ADAPTER_CONFIG, MLX_WEIGHTS, NATIVE_CONFIG, PEFT_WEIGHTS, RED_WEIGHTS

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# files that a Trainer writes next to the weights (transformers/trainer.py)
_TRAINER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
_CHECKPOINT_FOLDER = re.compile(r"checkpoint-\d+")

# names that torch.compile, FSDP and activation checkpointing insert into keys; prefixes of PEFT and DDP
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PREFIXES = (["base_model", "model"], ["module"])
# what Tinker calls the output head (tinker-cookbook's `tinker_cookbook/weights/_merge.py`)
_UNEMBEDDING = ["model", "unembed_tokens"]


@dataclass(frozen=True)
class AdapterSource:
    """A folder, or a file of weights. Nothing is read before it is needed.

    Attributes:
        path: the folder or the file.
        repo_id, revision: where on the Hub it came from, if it did.
    """

    path: Path
    repo_id: str | None = None
    revision: str | None = None

    @property
    def folder(self) -> Path:
        """The folder, or the one that contains the file."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def config_path(self) -> Path | None:
        """adapter_config.json; that of the run for a Trainer's `checkpoint-N` without one of its own."""
        for folder in (self.folder, self.folder.resolve().parent):
            if (folder / ADAPTER_CONFIG).is_file():
                return folder / ADAPTER_CONFIG
            if not _CHECKPOINT_FOLDER.fullmatch(self.folder.resolve().name):
                break
        return None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The content of adapter_config.json, if there is one."""
        return None if self.config_path is None else read_json(self.config_path, "adapter config", AdapterConfigError)

    @property
    def has_config(self) -> bool:
        """Whether there is a config, of whatever layout, that states the scaling."""
        return self.config_path is not None or (self.folder / NATIVE_CONFIG).is_file()

    @property
    def peft_type(self) -> str | None:
        """`peft_type` of the config, if there is one."""
        return None if self.config is None else str(self.config.get("peft_type"))

    @cached_property
    def weights(self) -> Path:
        """The file that holds the weights, or the index of several.

        Raises `LayoutError` when there is none, or several without an index, or they are of a program that is not
        read, and `ThetaError` for the files of a distributed checkpoint.
        """
        if self.path.is_file():
            refuse_foreign_file(self.path)
            return self.path
        if self.config is not None:
            for name in (*PEFT_WEIGHTS, MLX_WEIGHTS):
                if (self.path / name).is_file():
                    return self.path / name
        if (index := find_index(self.path)) is not None:
            return index
        if (self.path / RED_WEIGHTS).is_file():
            return self.path / RED_WEIGHTS
        found = sorted(
            path
            for path in self.path.iterdir()
            if path.suffix in _WEIGHT_SUFFIXES and path.is_file() and not _TRAINER_STATE.fullmatch(path.name)
        )
        if len(found) == 1:
            return found[0]
        refuse_foreign_folder(self.path)
        refuse_pieces(self.path)
        if found:
            names = ", ".join(path.name for path in found)
            raise LayoutError(
                f"{self.path} contains several weights files ({names}); give the path of the one to read"
            )
        for path in sorted(self.path.iterdir()):
            refuse_foreign_file(path)
        if self.config is not None:
            raise ThetaError(f"{self.path}: no {' nor '.join(PEFT_WEIGHTS)}; the adapter has a config but no weights")
        nested = sorted(path.parent.name for path in self.path.glob(f"*/{ADAPTER_CONFIG}"))
        if nested:
            raise LayoutError(
                f"{self.path} is not an adapter itself, but contains {', '.join(nested)}; give one of these"
            )
        raise LayoutError(
            f"{self.path} contains neither {ADAPTER_CONFIG} nor weights ({', '.join(_WEIGHT_SUFFIXES)}); "
            "expected the folder of an adapter"
        )

    @cached_property
    def store(self) -> ThetaStore:
        """The tensors in `weights`."""
        store = open_weights(self.weights)
        refuse_unassembled(self.weights, store.shapes)
        return store

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Name of a tensor without what wrappers put into it -> key in the store.

        Raises `ThetaError` when two keys are the same without that.
        """
        names: dict[str, str] = {}
        for key in self.store.shapes:
            name = clean_name(key)
            if name in names:
                raise ThetaError(f"{self.weights}: {names[name]} and {key} name the same tensor")
            names[name] = key
        return names


def clean_name(key: str) -> str:
    """`key` without the names of wrappers: `_orig_mod.base_model.model.lm_head.weight` -> `lm_head.weight`."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while prefix := next((p for p in _PREFIXES if parts[: len(p)] == p and len(parts) > len(p)), None):
        parts = parts[len(prefix) :]
    if parts[:2] == _UNEMBEDDING:
        parts = ["lm_head", *parts[2:]]
    return ".".join(parts)
