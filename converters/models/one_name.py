"""One name, one thing: the check at every place where the parts of an output get their names.

transformers 5 has one name for weights that a checkpoint stores one by one: those of all experts of a layer, for
example. Whoever writes under the names in memory would keep the last of them and lose the others.
"""

from collections.abc import Iterable
from typing import TypeVar

from converters.errors import ConversionError
from converters.models.architecture import Architecture

T = TypeVar("T")


def name_each(named: Iterable[tuple[str, str, T]], form: str) -> dict[str, T]:
    """Name in the output -> what bears it.

    Args:
        named: (name in the output, where it comes from, what bears it).
        form: what is written, for the message.

    Raises `ConversionError` if two bear the same name.
    """
    found: dict[str, T] = {}
    origins: dict[str, str] = {}
    for name, origin, thing in named:
        if name in found:
            raise ConversionError(
                f"{origins[name]} and {origin} would both be {name} in {form}, which has one place for both; "
                "merge the adapter"
            )
        found[name], origins[name] = thing, origin
    return found


def memory_name(arch: Architecture, tensor: str, form: str) -> str:
    """The name in memory of a checkpoint's tensor that is a tensor in memory, too.

    Raises `ConversionError` if transformers fuses or splits it while loading, so that no name there is its own.
    """
    canonical = arch.canonical(tensor)
    if tensor not in arch.shapes and arch.converted(tensor):
        raise ConversionError(
            f"{tensor} has no name of its own in {arch.name}: the installed transformers makes {canonical} from it "
            f"together with others, or several tensors from it. It cannot be written as {form}; merge the adapter"
        )
    return canonical
