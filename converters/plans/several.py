"""Several outputs of one base, written in one pass over it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from converters.errors import OptionError
from converters.plans.merge import Plan


def name_outputs(plans: Sequence[Plan], folder: Path | None) -> dict[Path, Plan]:
    """Output folder -> plan: `folder/<adapter>`, by default `./<base>-<adapter>`.

    Raises `OptionError` when two adapters have the same name.
    """
    outputs: dict[Path, Plan] = {}
    for plan in plans:
        output = plan.default_output if folder is None else folder / plan.name
        if output in outputs:
            paths = " and ".join(str(p.adapters[0].adapter.path) for p in (outputs[output], plan))
            raise OptionError(f"{paths} would both be written to {output}; rename one of the folders")
        outputs[output] = plan
    return outputs


def share_tensors(plans: Mapping[Path, Plan]) -> dict[Path, Plan]:
    """The plans with everything that none of them changes in separate files, which are written only once."""
    same = [{tensor.name for tensor in plan.tensors if tensor.is_untouched} for plan in plans.values()]
    shared = set.intersection(*same)
    if len(plans) == 1:  # nobody to share with but the base: only its own files count
        base = next(iter(plans.values())).base
        mixed = {info.file for name, info in base.tensors.items() if name not in shared}
        shared = {name for name in shared if base.tensors[name].file not in mixed}
    return {output: plan.sharing(shared) for output, plan in plans.items()}
