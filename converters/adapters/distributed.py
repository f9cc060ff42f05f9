"""Adapters that a distributed training saved in pieces, or without their numbers: what happened, and what to do.

DeepSpeed ZeRO-3 leaves an empty tensor in place of each parameter that it has partitioned
(`deepspeed/runtime/zero/partition_parameters.py`). FSDP flattens parameters, and its ranks save what they hold
(`torch/distributed/fsdp/_flat_param.py`, `accelerate/utils/fsdp_utils.py`).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from converters.errors import ThetaError

_ZERO_CURE = (
    'save it again with "stage3_gather_16bit_weights_on_model_save": true in the DeepSpeed config '
    "(zero_optimization), or inside deepspeed.zero.GatheredParameters, or with accelerate's "
    "accelerator.get_state_dict(model); where a checkpoint of the training is left, the zero_to_fp32.py in "
    "it puts the weights together"
)
_FSDP_CURE = (
    "save it with FULL_STATE_DICT (accelerate's fsdp_state_dict_type, "
    "trainer.accelerator.state.fsdp_plugin.set_state_dict_type), or inside "
    "FullyShardedDataParallel.summon_full_params; what SHARDED_STATE_DICT wrote, `accelerate merge-weights` "
    "puts together"
)

# parameters of θ that have two dimensions in every adapter
_MATRIX = re.compile(r".+\.(lora_[AB]|peanut_[AB])(\.[^.]+)?\.weight")
_FLAT = re.compile(r"(.*\.)?_?flat_param(_\d+)?")

# files of checkpoints that no single file of weights is in -> whose they are
_ZERO_FILES = ("zero_pp_rank_*", "*_zero_pp_rank_*", "global_step*/*zero_pp_rank_*", "zero_to_fp32.py")
_FSDP_FILES = ("*.distcp", "*/*.distcp", "*_rank[0-9]*.bin", "*_rank[0-9]*.pt")


def refuse_unassembled(where: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ThetaError` for tensors without numbers, and for flattened ones: name -> shape."""
    if empty := [name for name, shape in shapes.items() if shape == (0,)]:
        raise ThetaError(
            f"{where}: {len(empty)} of {len(shapes)} tensors are empty (the first: {empty[0]}, shape (0,)): "
            f"DeepSpeed ZeRO-3 had partitioned them, and they were saved without being gathered, so their numbers "
            f"are not in this file; {_ZERO_CURE}"
        )
    flat = [name for name in shapes if _FLAT.fullmatch(name)]
    flat += [name for name, shape in shapes.items() if _MATRIX.fullmatch(name) and len(shape) == 1]
    if flat:
        raise ThetaError(
            f"{where}: {flat[0]} has shape {shapes[flat[0]]}, and is a flattened parameter, or a rank's part of one: "
            f"FSDP saved what one process held; {_FSDP_CURE}"
        )


def refuse_pieces(folder: Path) -> None:
    """Raise `ThetaError` if a folder without weights has the files of a distributed checkpoint."""
    for patterns, what, cure in (
        (
            _FSDP_FILES,
            "the part of each process, as FSDP saves it with SHARDED_STATE_DICT or LOCAL_STATE_DICT",
            _FSDP_CURE,
        ),
        (
            _ZERO_FILES,
            "a checkpoint of DeepSpeed ZeRO, whose weights are in the partitions of its optimizer",
            _ZERO_CURE,
        ),
    ):
        found = next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)
        if found is not None:
            raise ThetaError(f"{folder} has no file of weights, but {found.relative_to(folder)}: {what}; {cure}")


def refuse_sharded_objects(where: Path, kinds: str) -> None:
    """Raise `ThetaError` if what a pickle contains (names of classes) is a process's part of a tensor."""
    if "torch.distributed" in kinds:
        raise ThetaError(
            f"{where}: contains tensors that are distributed over several processes (torch.distributed), and only "
            f"the part of one; {_FSDP_CURE}"
        )
