"""A base checkpoint on disk: its config, the place of every tensor, and its identity."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError, QuantizedBaseError
from converters.files.header import TensorInfo, read_header
from converters.files.json_files import read_json
from converters.files.names import INDEX_FILE, MANIFEST_NAME, MODEL_CONFIG, SINGLE_FILE
from converters.files.reader import TensorReader
from converters.files.state import FileState

if TYPE_CHECKING:
    from converters.hub.stream import ShardStream

# fingerprint: tensors up to this size are read whole, larger ones at evenly spaced places
_WHOLE_BYTES = 64 << 10
_SAMPLE_BYTES = 4 << 10
_SAMPLES = 16

_QUANTIZED_DTYPES = ("F8_", "F4", "F6_", "I8", "U8", "I4", "U4")
_QUANTIZED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".weight_packed",
    ".absmax",
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config and safetensors weights, opened but not loaded.

    Attributes:
        folder: where it lies.
        config: config.json, as it stands.
        tensors: name -> place, in file order.
        shards: file names in order; one for a single file.
        repo_id: Hub id it came from, if it did.
        revision: commit on the Hub, if it came from there.
        metadata: of the safetensors files.
        states: the files as they were when the headers were read.
        holder: what keeps `folder` alive, if it is temporary.
        stream: what fetches the shards, if they are not there.
        samples: tensor -> its digest in `sample_digests`, of what was streamed.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    repo_id: str | None = None
    revision: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    holder: object = None  # keeps a temporary folder alive
    states: Mapping[Path, FileState | None] = field(default_factory=dict)
    stream: "ShardStream | None" = None
    samples: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Short name: the last part of the Hub id or of the folder."""
        return (self.repo_id or str(self.folder.resolve())).rsplit("/", 1)[-1]

    @property
    def is_merged(self) -> bool:
        """Whether this toolkit wrote it: its weights already hold an adapter."""
        return (self.folder / MANIFEST_NAME).exists()

    @property
    def architecture(self) -> str | None:
        """The class the config names first."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else None

    @property
    def knows_fingerprint(self) -> bool:
        """Whether the weights are there, or have been."""
        return self.stream is None or self.samples.keys() >= self.tensors.keys()

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: a SHA-256 over every tensor's name, dtype, shape and sampled bytes.

        Small tensors count whole, large ones by 16 evenly spaced pieces of 4 KiB, so a 7B model takes
        milliseconds. Two fine-tunings of one model differ; sharding and file names do not matter.
        """
        missing = [info for name, info in self.tensors.items() if name not in self.samples]
        samples = {**self.samples, **sample_digests(missing)}
        digest = hashlib.sha256(b"peanut-serve base fingerprint v1")
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, info.shape, samples[name]]).encode())
        return "sampled-sha256:" + digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file is not as it was when it was opened."""
        for file, state in self.states.items():
            if FileState.of(file) != state:
                raise CheckpointError(
                    f"{file} changed while it was merged; nothing was written; merge again when nothing writes to it"
                )


def sample_digests(infos: Iterable[TensorInfo]) -> dict[str, str]:
    """Tensor -> SHA-256 of its sampled bytes."""
    digests = {}
    with TensorReader() as reader:
        for info in infos:
            digest = hashlib.sha256()
            for start, size in _sample_ranges(info.nbytes):
                digest.update(reader.range(info, start, size))
            digests[info.name] = digest.hexdigest()
    return digests


def _sample_ranges(nbytes: int) -> list[tuple[int, int]]:
    if nbytes <= _WHOLE_BYTES:
        return [(0, nbytes)]
    last = nbytes - _SAMPLE_BYTES
    return [(last * i // (_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_SAMPLES)]


def open_checkpoint(
    folder: str | Path,
    repo_id: str | None = None,
    revision: str | None = None,
    holder: object = None,
    stream: "ShardStream | None" = None,
) -> Checkpoint:
    """Open the base in `folder`. Reads the config and the headers, no weights. See `Checkpoint` for the rest.

    Raises:
        CheckpointError: no model there, an incomplete or corrupt one, or not safetensors.
        QuantizedBaseError: its weights are quantised.
    """
    folder = Path(folder)
    if not (folder / MODEL_CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} is an adapter, wanted a base model; pass it with --adapter")
        raise CheckpointError(f"{folder}: no config.json; wanted a folder with a transformers model")
    config = read_json(folder / MODEL_CONFIG, "model config")
    _refuse_quantized_config(folder, config)
    shards, weight_map = _shards(
        folder, lambda name: (folder / name).is_file() if stream is None else stream.has(name)
    )
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    states = {folder / shard: FileState.of(folder / shard) for shard in shards if stream is None}
    for shard in shards:
        infos, found = read_header(folder / shard) if stream is None else stream.header(shard)
        metadata.update(found)
        for info in infos:
            if info.name in tensors:
                raise CheckpointError(f"{folder}: {info.name} is in {tensors[info.name].file.name} and in {shard}")
            tensors[info.name] = info
    if weight_map is not None and set(weight_map) != set(tensors):
        odd = sorted(set(weight_map) ^ set(tensors))
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} and the shards disagree on {len(odd)} tensors, for example {odd[0]}; "
            "the download is incomplete or mixed"
        )
    _refuse_quantized_tensors(folder, tensors)
    return Checkpoint(folder, config, tensors, shards, repo_id, revision, metadata, holder, states, stream)


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard of a shard index. Raises `CheckpointError` unless shards are files in the same folder."""
    weight_map = read_json(index, "shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: '{name}' is not a file name in the same folder")
    return weight_map


def _shards(folder: Path, has: Callable[[str], bool]) -> tuple[tuple[str, ...], dict[str, str] | None]:
    index = folder / INDEX_FILE
    if has(SINGLE_FILE):  # as in transformers, it wins over an index
        return (SINGLE_FILE,), None
    if index.is_file():
        weight_map = read_weight_map(index)
        names = tuple(sorted(set(weight_map.values())))
        for name in names:
            if not has(name):
                raise CheckpointError(f"{folder}: the shard {name} is missing; fetch the model again")
        return names, weight_map
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({pickles[0]}), wanted safetensors; convert them once with "
            "transformers: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW), with the class of the model"
        )
    raise CheckpointError(
        f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; wanted safetensors weights (a model that is only to be "
        "had as pickles has to be saved once with transformers' save_pretrained)"
    )


def _refuse_quantized_config(folder: Path, config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if isinstance(settings, dict) and method == "bitsandbytes":
            method = "bitsandbytes " + ("4-bit" if settings.get("load_in_4bit") else "8-bit")
        raise QuantizedBaseError(
            f"{folder} is quantised ({method or 'unknown method'}): merge on the weights in training precision, "
            "then quantise the result"
        )


def _refuse_quantized_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for info in tensors.values():
        packed = info.dtype.startswith(_QUANTIZED_DTYPES) and info.name.endswith(".weight")
        if packed or info.name.endswith(_QUANTIZED_SUFFIXES):
            raise QuantizedBaseError(
                f"{folder} is quantised ({info.name} is {info.dtype}): merge on the weights in training "
                "precision, then quantise the result"
            )
