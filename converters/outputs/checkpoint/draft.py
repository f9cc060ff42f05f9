"""One output folder that is being written: its shard files, its journal, and what is known of each tensor."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from converters._version import __version__
from converters.evaluation.accounting import check_accounts
from converters.evaluation.verify import Verification, check_headers
from converters.files.json_files import write_json
from converters.files.names import INDEX_FILE, MANIFEST_NAME, MODEL_CONFIG
from converters.files.writer import ShardWriter
from converters.outputs.base import Advance
from converters.outputs.checkpoint.journal import Journal, WrittenTensor
from converters.outputs.manifest import build_manifest
from converters.outputs.model_card import build_model_card
from converters.plans.merge import Plan


class Draft:
    """The output of one plan, written into a staging folder.

    Args:
        plan: what is to be written.
        folder: the staging folder.
        advance: called with bytes written and bytes verified: in total `plan.total_size`, twice if it is verified.
    """

    def __init__(self, plan: Plan, folder: Path, advance: Advance) -> None:
        self.plan = plan
        self.folder = folder
        self.advance = advance
        self.written: dict[str, WrittenTensor] = {}
        self.taken_over = 0  # tensors that an earlier run had finished
        self.journal = Journal(folder, _identity(plan))
        self._writers: dict[str, ShardWriter] = {}
        self._metadata = {**plan.base.metadata, "format": "pt"}

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.journal.close()
        for writer in self._writers.values():
            writer.close()

    def open_shard(self, shard: str) -> ShardWriter:
        """The file of a shard that is written tensor by tensor."""
        if shard not in self._writers:
            specs = [tensor.spec for tensor in self.plan.shards[shard]]
            self._writers[shard] = ShardWriter(self.folder / shard, specs, self._metadata)
        return self._writers[shard]

    def record(self, shard: str, name: str, written: WrittenTensor) -> None:
        """A tensor is written, and verified if it is to be."""
        self.written[name] = written
        self.journal.record(shard, name, written)

    def finish(self, verified: bool) -> Verification | None:
        """Sync the weights and write everything else; last the config, which makes the folder a model."""
        plan = self.plan
        for writer in self._writers.values():
            writer.finish()
        verification = None
        if verified:
            check_accounts(plan, plan.tensors, self.written, "the merged checkpoint")
            check_headers(self.folder, plan)
            checks = [(one.recomputed or 0, one.max_ulp) for one in self.written.values()]
            verification = Verification.of(len(plan.tensors), checks)
        if len(plan.shards) > 1:
            write_json(self.folder / INDEX_FILE, _index(plan))
        plan.companions.write(self.folder)
        summary = verification.summary() if verification else None
        hashes = {name: one.digest for name, one in self.written.items()}
        write_json(self.folder / MANIFEST_NAME, build_manifest(plan, hashes, plan.base.fingerprint, summary))
        (self.folder / "README.md").write_text(build_model_card(plan), encoding="utf-8")
        self.journal.remove()
        config = self.folder / f".{MODEL_CONFIG}"
        own_config = plan.base.folder / MODEL_CONFIG
        if _states(own_config, plan.config):
            shutil.copyfile(own_config, config)  # byte for byte
        else:
            write_json(config, plan.config)
        config.rename(self.folder / MODEL_CONFIG)  # never half a config
        return verification


def _states(file: Path, config: Mapping[str, Any]) -> bool:
    """Whether a file says exactly what `config` does, types included, in the encoding that transformers reads."""
    try:
        found = json.loads(file.read_bytes().decode("utf-8"))  # a byte-order mark is an error
    except (OSError, ValueError):
        return False
    return json.dumps(found, sort_keys=True) == json.dumps(config, sort_keys=True)


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {tensor.name: shard for shard, tensors in plan.shards.items() for tensor in tensors}
    return {"metadata": {"total_size": plan.total_size}, "weight_map": weight_map}


def _identity(plan: Plan) -> str:
    """What has to be the same for a finished tensor of an earlier run to be taken over."""
    base = plan.base
    facts: Mapping[str, Any] = {
        "version": __version__,
        "base": f"{base.repo_id}@{base.revision}" if base.stream else base.fingerprint,
        "files": {str(file): str(state) for file, state in base.states.items()},
        "adapters": [(weighted.adapter.digest, weighted.weight) for weighted in plan.adapters],
        "changes": dict(base.changes),  # before the training; the names of stacked layers do not tell them apart
        "options": dict(plan.options),
        "shards": {shard: [asdict(tensor.spec) for tensor in tensors] for shard, tensors in plan.shards.items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
