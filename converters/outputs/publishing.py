"""Publishing outputs: all of them appear whole when everything is written, or nothing is changed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from converters.errors import OutputError
from converters.files.staging import staged
from converters.outputs.base import WriteOptions
from converters.plans.merge import Plan


@contextmanager
def publishing(outputs: Mapping[Path, Sequence[Plan]], options: WriteOptions) -> Iterator[dict[Path, Path]]:
    """Folders to write into, output -> staging folder; they become the outputs when the block ends without an error.

    Args:
        outputs: output folder -> the plans it is made from.
        options: `overwrite` replaces earlier outputs; `resume` keeps the staging folders after an error.

    Raises:
        OutputError: a file could not be written.
        CheckpointError, ThetaError: a base or an adapter changed meanwhile.
    """
    try:
        with ExitStack() as stack:
            yield {
                output: stack.enter_context(staged(output, options.overwrite, keep=options.resume))
                for output in outputs
            }
            _check_inputs_unchanged(plan for plans in outputs.values() for plan in plans)
    except OSError as error:
        names = ", ".join(map(str, outputs))
        raise OutputError(f"{names} could not be written: {error}; no existing output was changed") from error


def _check_inputs_unchanged(plans: Iterable[Plan]) -> None:
    for plan in plans:
        plan.base.check_unchanged()
        for weighted in plan.adapters:
            weighted.adapter.store.check_unchanged()
