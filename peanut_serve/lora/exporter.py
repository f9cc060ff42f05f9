"""Exports adapters as LoRA adapters of one base, when they are first requested: for vLLM's offline `LLM`."""

import threading
from dataclasses import dataclass
from pathlib import Path

from converters import Checkpoint, load_adapter, open_checkpoint
from converters.errors import AdapterError, MissingScalingError
from converters.serving import ADAPTER_CONFIG, check_base, find_base, read_json
from peanut_serve.lora.cache import Lease, LoraCache
from peanut_serve.variants.lora_export import kind_of, lora_export
from peanut_serve.variants.roots import State, VariantSource

_TRIES = 3


@dataclass(frozen=True)
class Exported:
    """An adapter that can be served.

    Attributes:
        state: of the files it was exported from.
        digest: of θ, W0, dtype and this package's version.
        r: its largest rank.
        kinds: last parts of the names of the modules it updates: `q_proj`, ...
        lease: keeps the LoRA adapter on disk.
    """

    state: State
    digest: str
    r: int
    kinds: frozenset[str]
    lease: Lease


class LoraExporter:
    """Evaluates adapters on one base into a cache. Thread-safe.

    Args:
        base: folder or Hub id of the base that is served.
        revision: of a base on the Hub.
        cache: where the LoRA adapters are written.
        dtype: of the factors: `fp32`, `bf16` or `fp16`.
        device: where f is evaluated.
    """

    def __init__(
        self, base: str, cache: LoraCache, *, revision: str | None = None, dtype: str = "fp32", device: str = "cpu"
    ) -> None:
        self._base_name, self._revision = base, revision
        self._cache, self._dtype, self._device = cache, dtype, device
        self._base: Checkpoint | None = None
        self._lock = threading.Lock()

    def export(self, source: VariantSource) -> Exported:
        """The LoRA adapter of a PEANuT adapter.

        Raises `PeanutError` if the adapter is damaged, belongs to another base, or cannot be expressed as LoRA.
        """
        for _ in range(_TRIES):
            before = source.state()
            try:
                found = self._export(source, before)
            except AdapterError:
                if source.state() == before:
                    raise
            else:
                if source.state() == before:
                    return found
                found.lease.release()
        raise AdapterError(f"the files of {source.name} are being written; try again when they are complete")

    def _export(self, source: VariantSource, state: State) -> Exported:
        try:
            adapter = load_adapter(source.spec)
        except MissingScalingError as error:
            raise AdapterError(
                f"{error}; to serve this adapter, convert it once with peanut-merge --format peft --scaling S"
            ) from None
        base = self._open_base()
        check_base(base, adapter, force=False)  # also if the factors are cached

        export = lora_export(source.name, adapter, base, self._dtype, self._device)
        lease = self._cache.get(export.key, export.write)
        config = read_json(lease.folder / ADAPTER_CONFIG, "adapter config")
        names = [*config["target_modules"], *config.get("target_parameters", ())]
        kinds = frozenset(map(kind_of, names))
        return Exported(state, export.key, max([config["r"], *config["rank_pattern"].values()]), kinds, lease)

    def _open_base(self) -> Checkpoint:
        with self._lock:
            if self._base is None:
                local = Path(self._base_name).expanduser().is_dir()
                found = find_base(self._base_name, None if local else self._revision)
                self._base = open_checkpoint(found.folder, found.repo_id, found.revision)
            self._base.check_unchanged()
            return self._base
