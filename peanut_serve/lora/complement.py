"""Complements: a variant as a LoRA adapter of the merged weights of another variant.

Ranks add. If the engine's weights are `W0 + Δ_resident`, a variant with the delta `Δ_own` is the LoRA
`Δ_own − Δ_resident` on top of them, and the base is `−Δ_resident`. Both deltas have exact factors, so the complement
has them too: `[up_own, −up_resident] @ [down_own; down_resident]`. Nothing is evaluated or approximated: the factors
are those of the two LoRA adapters, as they were rounded once, and negation is exact.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters.serving import ADAPTER_CONFIG, MANIFEST_NAME, PEFT_WEIGHTS, hash_file, read_json, staged, write_json
from peanut_serve.errors import VariantError
from peanut_serve.lora.cache import LoraCache
from peanut_serve.variants.lora_export import LoraExport

_FORM = 1  # of what is written; in the keys of the cache
RESIDENT = "resident"  # in the manifest: digest of the merged weights that a LoRA adapter is added to

_NOT_PLAIN = ("target_parameters", "modules_to_save", "lora_bias", "use_rslora", "use_dora")
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"

# module -> up (out, r) and down (r, in); the delta weight is `up @ down`
Factors = Mapping[str, tuple[Tensor, Tensor]]


def complement(own: Factors, resident: Factors) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of `Δ_own − Δ_resident`, for each module that one of them has; of `−Δ_resident` if `own` is empty.

    Raises `VariantError` if a module has different shapes in the two.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for module in [*own, *(module for module in resident if module not in own)]:
        parts = [own[module]] if module in own else []
        if module in resident:
            up, down = resident[module]
            parts.append((-up, down))
        sizes = {(up.shape[0], down.shape[1]) for up, down in parts}
        if len(sizes) > 1:
            raise VariantError(f"{module} has the shapes {sorted(sizes)} in two adapters of one base; expected one")
        found[module] = torch.cat([up for up, _ in parts], dim=1), torch.cat([down for _, down in parts])
    return found


def complement_export(own: LoraExport | None, resident: LoraExport, digest: str, cache: LoraCache) -> LoraExport:
    """How to write the complement of two LoRA adapters, which are evaluated if they are not in the cache.

    Args:
        own: of the variant that is asked for; None for the base.
        resident: of the variant whose merged weights the engine has.
        digest: of those weights; it stands in the manifest, and workers refuse the adapter with other weights.
        cache: has the LoRA adapters.
    """

    def write(folder: Path) -> None:
        """Concatenate the factors."""
        leases = [cache.get(export.key, export.write) for export in (resident, own) if export is not None]
        try:
            write_complement(*(lease.folder for lease in leases), into=folder, digest=digest)
        finally:
            for lease in leases:
                lease.release()

    facts = ["complement", _FORM, own.key if own is not None else "", resident.key, digest]
    return LoraExport(hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40], write)


def write_complement(resident: Path, own: Path | None = None, *, into: Path, digest: str) -> None:
    """Write the complement of two LoRA adapters on disk as a third, atomically.

    Args:
        resident: folder of the one whose merged weights the engine has.
        own: folder of the one that is asked for; None for the base.
        into: folder to write.
        digest: of the merged weights.

    Raises:
        VariantError: they are not adapters of one base, or not of linear layers alone.
        OutputError: it could not be written.
    """
    folders = [folder for folder in (own, resident) if folder is not None]
    configs = [read_json(folder / ADAPTER_CONFIG, "adapter config") for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        _check(folder, config)
    found = complement(_factors(own) if own is not None else {}, _factors(resident))
    tensors: dict[str, Tensor] = {}
    for module, (up, down) in found.items():
        tensors |= {f"{_PREFIX}{module}{_A}": down.contiguous(), f"{_PREFIX}{module}{_B}": up.contiguous()}
    with staged(into, overwrite=False) as staging:
        file = staging / PEFT_WEIGHTS[0]
        save_file(tensors, file, metadata={"format": "pt"})
        write_json(staging / ADAPTER_CONFIG, {**configs[-1], **_ranks(found)})
        weights = {"file": file.name, "xxh3_128": hash_file(file)}
        write_json(staging / MANIFEST_NAME, {"format": "complement", RESIDENT: digest, "weights": weights})


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `VariantError` for an adapter whose factors cannot simply be concatenated."""
    wrong = [key for key in _NOT_PLAIN if config.get(key)]
    if wrong:
        raise VariantError(
            f"the LoRA adapter in {folder} has {wrong[0]} = {config[wrong[0]]}, so that it has no complement; "
            "expected plain factors of linear layers"
        )


def _factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> factors of an adapter that this package has written: every scale is 1 there."""
    tensors = load_file(folder / PEFT_WEIGHTS[0])
    modules = [name.removeprefix(_PREFIX).removesuffix(_A) for name in tensors if name.endswith(_A)]
    if len(tensors) != 2 * len(modules):
        raise VariantError(
            f"the LoRA adapter in {folder} has {len(tensors)} tensors for {len(modules)} modules; "
            "expected two for each"
        )
    return {module: (tensors[f"{_PREFIX}{module}{_B}"], tensors[f"{_PREFIX}{module}{_A}"]) for module in modules}


def _ranks(found: Factors) -> dict[str, Any]:
    """Modules and ranks, with alphas that make every scale 1, also for a reader that knows no patterns of alpha."""
    ranks = {module: len(down) for module, (_, down) in sorted(found.items())}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in ranks.items() if rank != common}
    patterns = {"rank_pattern": others, "alpha_pattern": others}
    return {"r": common, "lora_alpha": common, **patterns, "target_modules": list(ranks)}
