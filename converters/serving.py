"""The surface for servers: what `peanut_serve` uses of this package beside the public names and the errors.

Each name is imported when it is first used. `tests/test_surface.py` compares this list with what is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.adapters.base_record import check_base
    from converters.adapters.finding import find_adapter
    from converters.adapters.store import ThetaStore
    from converters.evaluation.blocks import tensor_blocks
    from converters.evaluation.factors import rank_of, sum_factors
    from converters.evaluation.pool import Pipeline
    from converters.evaluation.worker import Worker, find_devices
    from converters.files.hashing import hash_file
    from converters.files.header import TensorInfo, TensorSpec
    from converters.files.json_files import read_json
    from converters.files.names import (
        ADAPTER_CONFIG,
        INDEX_FILE,
        MANIFEST_NAME,
        MODEL_CONFIG,
        PEFT_WEIGHTS,
        SINGLE_FILE,
    )
    from converters.files.reader import TensorReader
    from converters.files.sizes import parse_size
    from converters.hub.names import SHORT_NAMES, is_hub_id
    from converters.models.checkpoint import sample_digests
    from converters.models.config import labels_of
    from converters.models.finding import base_folder, find_base
    from converters.outputs.lora import VLLM_RANKS, LoraOptions, as_lora, plan_lora_adapter, write_lora_adapter
    from converters.plans.merge import plan_merge
    from converters.plans.tensor import TensorPlan
    from converters.plans.trained_base.trained import describe_changes

_HOME = {
    "ADAPTER_CONFIG": "files.names",
    "INDEX_FILE": "files.names",
    "MANIFEST_NAME": "files.names",
    "MODEL_CONFIG": "files.names",
    "PEFT_WEIGHTS": "files.names",
    "Pipeline": "evaluation.pool",
    "SHORT_NAMES": "hub.names",
    "SINGLE_FILE": "files.names",
    "TensorInfo": "files.header",
    "TensorPlan": "plans.tensor",
    "TensorReader": "files.reader",
    "TensorSpec": "files.header",
    "ThetaStore": "adapters.store",
    "VLLM_RANKS": "outputs.lora",
    "LoraOptions": "outputs.lora",
    "Worker": "evaluation.worker",
    "as_lora": "outputs.lora",
    "base_folder": "models.finding",
    "check_base": "adapters.base_record",
    "describe_changes": "plans.trained_base.trained",
    "find_adapter": "adapters.finding",
    "find_base": "models.finding",
    "find_devices": "evaluation.worker",
    "hash_file": "files.hashing",
    "is_hub_id": "hub.names",
    "labels_of": "models.config",
    "parse_size": "files.sizes",
    "plan_lora_adapter": "outputs.lora",
    "plan_merge": "plans.merge",
    "rank_of": "evaluation.factors",
    "read_json": "files.json_files",
    "sample_digests": "models.checkpoint",
    "sum_factors": "evaluation.factors",
    "tensor_blocks": "evaluation.blocks",
    "write_lora_adapter": "outputs.lora",
}

__all__ = [
    "ADAPTER_CONFIG",
    "INDEX_FILE",
    "MANIFEST_NAME",
    "MODEL_CONFIG",
    "PEFT_WEIGHTS",
    "SHORT_NAMES",
    "SINGLE_FILE",
    "VLLM_RANKS",
    "LoraOptions",
    "Pipeline",
    "TensorInfo",
    "TensorPlan",
    "TensorReader",
    "TensorSpec",
    "ThetaStore",
    "Worker",
    "as_lora",
    "base_folder",
    "check_base",
    "describe_changes",
    "find_adapter",
    "find_base",
    "find_devices",
    "hash_file",
    "is_hub_id",
    "labels_of",
    "parse_size",
    "plan_lora_adapter",
    "plan_merge",
    "rank_of",
    "read_json",
    "sample_digests",
    "sum_factors",
    "tensor_blocks",
    "write_lora_adapter",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'converters.serving' has no attribute '{name}'")
    return getattr(import_module(f"converters.{_HOME[name]}"), name)
