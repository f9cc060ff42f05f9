"""A base checkpoint on disk: its config, the location of every tensor, and its identity."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError, QuantizedBaseError
from converters.files.header import TensorInfo, read_header
from converters.files.json_files import read_json
from converters.files.names import INDEX_FILE, MANIFEST_NAME, MODEL_CONFIG
from converters.files.reader import TensorReader
from converters.files.state import FileState
from converters.hub.twins import is_quantized, unquantized
from converters.models.weight_files import find_weights, refuse_gguf, refuse_partial

if TYPE_CHECKING:
    from converters.hub.stream import ShardStream

# fingerprint: tensors up to this size are read whole, larger ones are sampled at evenly spaced positions
_WHOLE_BYTES = 64 << 10
_SAMPLE_BYTES = 4 << 10
_SAMPLES = 16

_QUANTIZED_DTYPES = ("F8_", "F4", "F6_", "I8", "U8", "I4", "U4", "I32", "U32")  # the last two: packed, as by MLX
_QUANTIZED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".weight_packed",
    ".absmax",
    ".q_weight",  # ExLlamaV2
    ".W_q",  # HQQ
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a config and safetensors weights, opened but not loaded.

    Attributes:
        folder: the folder of the checkpoint.
        config: the unmodified config.json.
        tensors: name -> location, in file order.
        shards: file names in order; a single name for an unsharded checkpoint.
        repo_id: the Hub id, if it came from the Hub.
        revision: the commit on the Hub, if it came from there.
        metadata: the metadata of the safetensors files.
        states: the state of each file when its header was read.
        holder: an object that keeps a temporary `folder` alive.
        stream: fetches the shards, if they are not on disk.
        samples: tensor -> its digest from `sample_digests`, for streamed tensors.
        original: the checkpoint on disk, where this one is what a training made of it before it began.
        changes: what that was, for the manifest.
        temporary: an object that keeps a temporary file alive, in which a part of `tensors` is.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    repo_id: str | None = None
    revision: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    holder: object = None
    states: Mapping[Path, FileState | None] = field(default_factory=dict)
    stream: "ShardStream | None" = None
    samples: dict[str, str] = field(default_factory=dict)
    original: "Checkpoint | None" = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    temporary: object = None

    @property
    def name(self) -> str:
        """Short name: the last part of the Hub id or of the folder."""
        return (self.repo_id or str(self.folder.resolve())).rsplit("/", 1)[-1]

    @property
    def is_merged(self) -> bool:
        """Whether this toolkit wrote it, so that its weights already contain an adapter."""
        return (self.folder / MANIFEST_NAME).exists()

    @property
    def architecture(self) -> str | None:
        """The first model class that the config names."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else None

    @property
    def knows_fingerprint(self) -> bool:
        """Whether the weights are on disk or have all been streamed."""
        return self.stream is None or self.samples.keys() >= self.tensors.keys()

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights: a SHA-256 over every tensor's name, dtype, shape and sampled bytes.

        Small tensors are read whole, large ones as 16 evenly spaced samples of 4 KiB, so a 7B model takes
        milliseconds. Two fine-tuned versions of one model differ; sharding and file names do not matter. It is that
        of the checkpoint on disk, whatever a training made of it.
        """
        if self.original is not None:
            return self.original.fingerprint
        missing = [info for name, info in self.tensors.items() if name not in self.samples]
        samples = {**self.samples, **sample_digests(missing)}
        digest = hashlib.sha256(b"peanut-serve base fingerprint v1")
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(json.dumps([name, info.dtype, info.shape, samples[name]]).encode())
        return "sampled-sha256:" + digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file has changed since it was opened."""
        for file, state in self.states.items():
            if FileState.of(file) != state:
                raise CheckpointError(
                    f"{file} changed while it was merged; nothing was written; merge again once nothing writes to it"
                )


def sample_digests(infos: Iterable[TensorInfo]) -> dict[str, str]:
    """The SHA-256 of each tensor's sampled bytes, by name."""
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
    """Open the base in `folder`. Reads the config and the headers, but no weights.

    The other parameters are attributes of `Checkpoint`.

    Raises:
        CheckpointError: there is no model, or it is incomplete, corrupt, or not safetensors.
        QuantizedBaseError: the weights are quantised.
    """
    folder = Path(folder)
    if not (folder / MODEL_CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(f"{folder} is an adapter, expected a base model; pass it as the adapter")
        refuse_gguf(folder)
        raise CheckpointError(f"{folder}: no config.json; expected a folder with a transformers model")
    config = read_json(folder / MODEL_CONFIG, "model config")
    _refuse_quantized_config(folder, config, repo_id)
    shards, weight_map = find_weights(
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
    if weight_map is None:
        refuse_partial(folder, set(tensors))
    elif set(weight_map) != set(tensors):
        unmatched = sorted(set(weight_map) ^ set(tensors))
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} and the shards disagree on {len(unmatched)} tensors, for example "
            f"{unmatched[0]}; the download is incomplete or mixes files of two models"
        )
    _refuse_quantized_tensors(folder, tensors)
    return Checkpoint(folder, config, tensors, shards, repo_id, revision, metadata, holder, states, stream)


def _refuse_quantized_config(folder: Path, config: Mapping[str, Any], repo_id: str | None) -> None:
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if isinstance(settings, dict) and method == "bitsandbytes":
            method = "bitsandbytes " + ("4-bit" if settings.get("load_in_4bit") else "8-bit")
        name = repo_id or folder.resolve().name
        made_from = f"; by its name it was made from {unquantized(name)}" if is_quantized(name) else ""
        raise QuantizedBaseError(
            f"{folder} is quantised ({method or 'unknown method'}): merge into the weights in training precision, "
            f"then quantise the result{made_from}"
        )


def _refuse_quantized_tensors(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for info in tensors.values():
        packed = info.dtype.startswith(_QUANTIZED_DTYPES) and info.name.endswith(".weight")
        if packed or info.name.endswith(_QUANTIZED_SUFFIXES):
            raise QuantizedBaseError(
                f"{folder} is quantised ({info.name} is {info.dtype}): merge into the weights in training "
                "precision, then quantise the result"
            )
