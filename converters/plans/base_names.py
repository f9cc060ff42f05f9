"""The tensors of a base under the names that transformers gives them in memory."""

from converters.models.architecture import Architecture
from converters.models.checkpoint import Checkpoint


class BaseNames:
    """The tensors of a base under the names of an architecture.

    Args:
        base: the base.
        arch: the class of the merged model.
        switched: it is another class than the base's, because an adapter brings a head.
    """

    def __init__(self, base: Checkpoint, arch: Architecture, switched: bool) -> None:
        self.canonical = {name: arch.canonical(name) for name in sorted(base.tensors)}
        self.by_canonical = {canonical: name for name, canonical in self.canonical.items()}
        self.sources: dict[str, list[str]] = {}  # tensor in memory -> those it is made from
        for name, canonical in self.canonical.items():
            conversion = arch.conversion(name) if arch.converted(name) else None
            for target in conversion.targets if conversion is not None else (canonical,):
                self.sources.setdefault(target, []).append(name)
        self._arch = arch
        self._switched = switched

    def find(self, canonical: str) -> str | None:
        """The base's name of a tensor, or of the one it is tied to."""
        return self.source(canonical) or self.by_canonical.get(self._arch.tied.get(canonical, ""))

    def source(self, canonical: str) -> str | None:
        """The base's name of a tensor, or of one that it is made from."""
        return next(iter(self.sources.get(canonical, ())), None)

    def output(self, name: str) -> str:
        """The name of a base tensor in the output: its own, plus the prefix that a class with a head adds.

        transformers before 5 finds a headless model's tensors inside one with a head only under that prefix.
        """
        prefix = f"{self._arch.prefix}."
        if not self._switched or not self._arch.prefix or name.startswith(prefix):
            return name
        inside = self.canonical[name].startswith(prefix)
        return prefix + name if inside and self._arch.canonical(prefix + name) == self.canonical[name] else name
